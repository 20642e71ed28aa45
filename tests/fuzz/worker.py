"""The process that runs cases. It may die or hang; `tests.fuzz.driver` watches it."""

from __future__ import annotations

import faulthandler
import json
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

#: A size that came from a wrong number must fail, not fill the machine.
MEMORY_BYTES = 24 << 30


def families(chosen: list[str]) -> dict[str, Any]:
    """The sequences by name; importing them imports the package."""
    import warnings

    warnings.simplefilter("ignore")
    from tests.fuzz import adapter, kernel_sequence

    adapter.use_threads_for_little_work()
    found: dict[str, Any] = dict(kernel_sequence.FAMILIES)
    if any(name not in found for name in chosen):
        from tests.fuzz import layer_sequence, operator_sequence

        found |= {**operator_sequence.FAMILIES, **layer_sequence.FAMILIES}
    from tests.fuzz import planted

    found |= planted.FAMILIES
    return {name: found[name] for name in chosen}


def work(job: dict[str, Any]) -> None:
    """Run cases and write what happens to standard output, a JSON object a line."""
    from tests.fuzz.case import Case, Label, Status, run_case

    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sequences = families(job["families"])
    status = Status(Path(job["status"]))
    skip = {Label(*label) for label in job["skip"]}
    seen: Counter[Label] = Counter()
    end, said = time.monotonic() + job["seconds"], time.monotonic()
    calls: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    names = list(sequences)
    cases, at = 0, job["at"]

    def say(**message: Any) -> None:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()

    # Every family runs each seed, in turns.
    while time.monotonic() < end and at < job["stop"]:
        seed, family = divmod(at, len(names))
        case = Case(names[family], seed, status, frozenset(skip))
        found = run_case(case, sequences[names[family]])
        calls += case.calls
        refusals += case.refusals
        cases, at = cases + 1, at + 1
        if found is not None:
            what = [found.kind, names[family], *case.label, found.detail]
            say(found=what, seed=seed, step=case.step, skip=sorted(skip))
            seen[case.label] += 1
            if seen[case.label] >= job["enough"]:
                skip.add(case.label)
        if time.monotonic() - said > 1:
            said = time.monotonic()
            say(calls=calls, refusals=refusals, cases=cases, at=at)
            calls, refusals, cases = Counter(), Counter(), 0
    say(calls=calls, refusals=refusals, cases=cases, at=at, done=True)


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    if job["package"]:
        sys.path.insert(0, job["package"])
    work(job)
