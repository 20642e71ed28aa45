"""Runs cases in worker processes, and reports what they find, their deaths included."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tests.fuzz.case import STATUS_BYTES, Label, Status

ROOT = Path(__file__).parents[2]

#: A step that crashed or failed so often is left out from then on.
ENOUGH_CRASHES, ENOUGH = 3, 30


class Finding(NamedTuple):
    """One fault, and how to see it again."""

    kind: str
    family: str
    operation: str
    mutation: str
    detail: str
    seed: int
    step: int
    skip: tuple[Label, ...]

    def reproduction(self, package: str | None) -> str:
        """The command that runs this case alone."""
        words = ["python", "-m", "tests.fuzz", "--case", str(self.seed), "--layouts", self.family]
        words += ["--package", package] if package else []
        for label in self.skip:
            words += ["--skip", "/".join(label)]
        return shlex.join(words)


class Driver:
    """Runs workers one after the other until the time is over.

    Parameters
    ----------
    families : list of str
    seconds : float
    seed : int
        Of the first case.
    package : str, optional
        Directory that holds the `sparselab` to test; the one of this checkout if None.
    hang_seconds : float
        A step that lasts longer hangs.
    last_seed : int
        The case to stop before.
    """

    def __init__(
        self, families: list[str], seconds: float, seed: int = 0, package: str | None = None,
        hang_seconds: float = 300, last_seed: int = 2**62,
    ) -> None:  # fmt: skip
        self.families, self.seconds, self.package = families, seconds, package
        self.hang_seconds = hang_seconds
        #: The next case, counted over seeds and families, and the one to stop before.
        self.at, self.stop = seed * len(families), last_seed * len(families)
        self.findings: list[Finding] = []
        self.skip: set[Label] = set()
        self.calls: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.cases = 0
        self._seen: Counter[Label] = Counter()

    def run(self) -> list[Finding]:
        """All the faults that were found."""
        end = time.monotonic() + self.seconds
        with tempfile.TemporaryDirectory() as directory:
            while time.monotonic() < end and self.at < self.stop:
                if not self._run_worker(Path(directory), end - time.monotonic()):
                    break
        return self.findings

    def _run_worker(self, directory: Path, seconds: float) -> bool:
        """Run one worker to its end; False if it ended in order."""
        status, errors, before = directory / "status", directory / "errors", len(self.findings)
        status.write_bytes(b" " * STATUS_BYTES)
        job = {
            "families": self.families, "seconds": seconds, "at": self.at, "stop": self.stop,
            "package": self.package, "status": str(status), "skip": sorted(self.skip), "enough": ENOUGH,
        }  # fmt: skip
        # The twins' small dense products gain nothing from threads, and lose much on a busy machine.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
        with errors.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.worker", json.dumps(job)], cwd=ROOT, env=environment,
                stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip
        hung = True
        try:
            done, hung = self._listen(process, status)
        finally:
            _end(process, 0 if hung else 30)
        if not done:
            self._note_death(process, hung, Status.read(status), errors.read_text(errors="replace"), before)
        return not done

    def _listen(self, process: subprocess.Popen[str], status: Path) -> tuple[bool, bool]:
        """Take in what a worker says. Whether it came to its end, and whether it hangs."""
        assert process.stdout is not None
        lines, text = process.stdout.fileno(), b""
        last, since = "", time.monotonic()
        while True:
            if not select.select([lines], [], [], min(1.0, self.hang_seconds))[0]:
                now = Status.read(status)
                if now != last:
                    last, since = now, time.monotonic()
                elif now and time.monotonic() - since > self.hang_seconds:
                    return False, True
                continue
            came = os.read(lines, 1 << 16)
            if not came:
                return False, False
            *whole, text = (text + came).split(b"\n")
            for line in whole:
                if self._take(json.loads(line)):
                    return True, False

    def _take(self, message: dict[str, Any]) -> bool:
        """Note a message; whether it is the last."""
        if "found" in message:
            kind, family, operation, mutation, detail = message["found"]
            skip = self._skipped(family, [Label(*label) for label in message["skip"]])
            self._add(
                Finding(kind, family, operation, mutation, detail, message["seed"], message["step"], skip)
            )
            return False
        self.calls += Counter(message["calls"])
        self.refusals += Counter(message["refusals"])
        self.cases += message["cases"]
        self.at = message["at"]
        return bool(message.get("done"))

    def _skipped(self, family: str, labels: Iterable[Label]) -> tuple[Label, ...]:
        """Those of the labels that this family has."""
        mine = {Label(found.operation, found.mutation) for found in self.findings if found.family == family}
        return tuple(sorted(mine & set(labels)))

    def _add(self, finding: Finding) -> None:
        self.findings.append(finding)
        label = Label(finding.operation, finding.mutation)
        self._seen[label] += 1
        deadly = finding.kind in ("crash", "hang")
        if self._seen[label] >= (ENOUGH_CRASHES if deadly else ENOUGH):
            self.skip.add(label)

    def _note_death(self, process: Any, hung: bool, status: str, errors: str, before: int) -> None:
        """Note the death of a worker that was started when there were so many findings."""
        if not status:
            raise RuntimeError(f"the worker did not start (exit status {process.returncode})\n{errors}")
        family, seed, step, operation, mutation = status.split("\t")
        code = process.returncode
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        detail = f"no end after {self.hang_seconds:.0f} s" if hung else f"{name} in {_innermost(errors)}"
        kind = "hang" if hung else "crash"
        if faults := self.findings[before:]:
            detail += f", where case {faults[-1].seed} of {faults[-1].family} had gone wrong before"
        skip = self._skipped(family, self.skip)
        self._add(Finding(kind, family, operation, mutation, detail, int(seed), int(step), skip))
        self.at = int(seed) * len(self.families) + self.families.index(family) + 1


def _end(process: subprocess.Popen[str], patience: float) -> None:
    """End a worker and what it forked, after so many seconds in which it may end by itself."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _innermost(errors: str) -> str:
    """The innermost frame of the package in what faulthandler wrote, or else the last line of it."""
    current = errors.split("Current thread")[-1]
    frames = re.findall(r'File "[^"]*(sparselab/[^"]*)", line (\d+) in (\w+)', current)
    if frames:
        return f"{frames[0][0]}:{frames[0][1]} ({frames[0][2]})"
    elsewhere = re.findall(r'File "([^"]*)", line (\d+) in (\w+)', current)
    return f"{elsewhere[0][0]}:{elsewhere[0][1]} ({elsewhere[0][2]})" if elsewhere else "an unknown place"
