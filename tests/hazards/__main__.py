"""``python -m tests.hazards``: run every hazard in a process of its own and print what came of it.

``--only TEXT`` runs those whose topic or name contains the text. A process that dies is a fault as a wrong
number is; the exit status is 1 if there was one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys

from tests.hazards import programs  # noqa: F401
from tests.hazards.cases import HAZARDS, Outcome, outcome_of

#: Seconds until a hazard counts as hanging.
_LIMIT = 120


def run_apart(index: int) -> Outcome:
    """Run a hazard in another process."""
    command = [sys.executable, "-m", "tests.hazards", "--number", str(index)]
    # A session of its own, so that children of a hazard that hangs are ended with it.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Outcome("HANGS", f"no answer in {_LIMIT} s")
    if process.returncode:
        code = process.returncode
        return Outcome("CRASH", signal.Signals(-code).name if code < 0 else f"exit {code}")
    return Outcome(**json.loads(output.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hazards", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.number is not None:
        print(json.dumps(vars(outcome_of(HAZARDS[options.number]))))
        return 0
    faults = 0
    for index, hazard in enumerate(HAZARDS):
        if options.only not in f"{hazard.topic} {hazard.name}":
            continue
        outcome = run_apart(index)
        faults += outcome.is_fault
        print(f"| {hazard.topic} | {hazard.name} | {outcome.kind} | {outcome.text} |", flush=True)
    print(f"{faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
