"""Contenders that cannot share a process, timed in turns: each answers lines of JSON from its own process."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from tqdm import tqdm

from sparselab.bench.contenders.linear import Case
from sparselab.bench.measure.timing import Timing, plain_timings

OPERATIONS = ("forward", "forward + backward")
#: Largest difference from float64, relative to the largest entry. float32 sums of a few thousand terms stay
#: near 1e-6 in any order; a lost connection or token is off by 1e-2.
TOLERANCE = 1e-5

Timings = dict[str, dict[str, "Timing | str"]]


class TurnError(RuntimeError):
    """A contender could not be started, died, answered nonsense, or computed something else."""


class Driver:
    """A process that answers each line of JSON with one line of JSON.

    Parameters
    ----------
    name : str
        What error messages call it.
    command : sequence of str
    folder : Path
        Its working directory, which must exist; standard error goes to a file in it.
    environment : mapping
        Added to the environment variables of this process, without its ``PYTHONPATH``.
    timeout_s : float
        Longest wait for one answer, in seconds.

    Raises
    ------
    TurnError
        If the command cannot be started.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 600,
    ) -> None:
        self.name, self.folder, self.timeout_s = name, folder, timeout_s
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self._errors = folder / "stderr.txt"
        try:
            with self._errors.open("w") as errors:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                    cwd=folder, env={**inherited, **(environment or {})},
                )  # fmt: skip
        except OSError as error:
            raise TurnError(f"{name} cannot be started: {error}") from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests: IO[str] = self._process.stdin
        self._answers: IO[str] = self._process.stdout
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._answers:
            self._lines.put(line)
        self._lines.put(None)

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises
        ------
        TurnError
            If the process is gone or goes, does not answer in time, or answers something else than an
            object of JSON without the key ``error``. Only after an ``error`` will it take another request.
        """
        try:
            self._requests.write(json.dumps({"do": do, **arguments}) + "\n")
            self._requests.flush()
            line = self._lines.get(timeout=self.timeout_s)
        except (OSError, ValueError):
            line = None
        except queue.Empty:
            self._process.kill()
            self.close()
            raise TurnError(f"{self.name} did not answer {do!r} within {self.timeout_s:g} s") from None
        if line is None:
            self.close()
            raise TurnError(f"{self.name} ended with status {self._process.returncode}{self._last_words()}")
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict):
            self.close()
            raise TurnError(f"{self.name} answered {do!r} with {line.strip()[:200]!r}, not an object of JSON")
        if "error" in answer:
            raise TurnError(f"{self.name} cannot {do}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def close(self) -> None:
        """End the process, by force if it does not end by itself; does nothing the second time."""
        with contextlib.suppress(OSError):
            self._requests.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._answers.close()

    def __enter__(self) -> Driver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start(
    name: str,
    contender: str,
    folder: Path,
    threads: int,
    python: str | Path = sys.executable,
    environment: Mapping[str, str] | None = None,
) -> Driver:
    """A process of `benchmarks/driver.py` for one of its contenders, started in a new folder.

    The script is copied there first: beside itself, Python finds modules before all others.
    """
    folder.mkdir(parents=True)
    script = shutil.copy(Path(__file__).with_name("driver.py"), folder)
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [str(python), str(script), contender]
    return Driver(name, command, folder, {**limits, **(environment or {})})


def cases(shapes: Iterable[tuple[int, int, int]], sparsities: Sequence[float]) -> list[Case]:
    """Every shape ``(in_features, out_features, tokens)`` at every sparsity."""
    return [
        Case(in_features, out_features, tokens, sparsity)
        for in_features, out_features, tokens in shapes
        for sparsity in sparsities
    ]


def write_case(case: Case, folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Write w (dense, with zeros), b, x and d (dy) to ``.npy`` files; return what must come out."""
    random = np.random.default_rng(0)
    size = case.out_features * case.in_features
    live = np.sort(random.choice(size, round((1 - case.sparsity) * size), replace=False))
    fan_in = max(1.0, (1 - case.sparsity) * case.in_features)
    w = np.zeros((case.out_features, case.in_features), np.float32)
    # Bounded away from zero: peers know the connections by their values.
    signs = random.choice((-1, 1), len(live))
    w.reshape(-1)[live] = signs * random.uniform(0.5, 1.5, len(live)) / math.sqrt(fan_in)
    b = random.standard_normal(case.out_features, np.float32)
    x = random.standard_normal((case.tokens, case.in_features), np.float32)
    d = random.standard_normal((case.tokens, case.out_features), np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in {"w": w, "b": b, "x": x, "d": d}.items():
        np.save(folder / f"{name}.npy", array)
    w64, b64, x64, d64 = (torch.from_numpy(array).double() for array in (w, b, x, d))
    y, dx, dw = x64 @ w64.T + b64, d64 @ w64, d64.T @ x64
    return {"y": y.numpy(), "dx": dx.numpy(), "dw": dw.numpy().reshape(-1)[live]}


def check(name: str, folder: Path, expected: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Compare the answers in a folder with the right ones.

    Raises
    ------
    TurnError
        If an answer is missing, has another shape, or differs by more than `TOLERANCE`.
    """
    for quantity, right in expected.items():
        try:
            answer = np.load(folder / f"{quantity}.npy")
        except (OSError, ValueError) as error:
            raise TurnError(f"{name} left no {quantity}: {error}") from None
        if answer.shape != right.shape:
            raise TurnError(f"{name} is refused: {quantity} is {answer.shape}, must be {right.shape}")
        off = float(np.max(np.abs(answer - right), initial=0) / (np.max(np.abs(right), initial=0) or 1))
        if not off <= TOLERANCE:
            raise TurnError(f"{name} is refused: {quantity} is off by {off:.1e} of its largest entry")


def timing_cell(timing: Timing | str, base: Timing | str | None = None) -> str:
    """Median in milliseconds and, in brackets, how many times that of the base."""
    if isinstance(timing, str):
        return "cannot run"
    times = f" ({timing.median / base.median:.2f}x)" if isinstance(base, Timing) else ""
    return f"{timing.median:.2f}{times}"


def as_rows(case: Case, results: Timings) -> list[dict[str, Any]]:
    """One row for each operation, ready for JSON."""
    return [
        {
            "case": asdict(case),
            "operation": operation,
            "timings_ms": plain_timings(timings),
        }
        for operation, timings in results.items()
    ]


def compare(
    case: Case,
    drivers: Mapping[str, Driver],
    folder: Path,
    turns: int,
    calls: int,
    optional: Collection[str] = (),
) -> Timings:
    """Time the operations of one case, every driver in turns, after a check of what each computes.

    Parameters
    ----------
    drivers : mapping
        Processes that answer as `benchmarks/driver.py` does; they are not closed.
    folder : Path
        Where the case and the answers are written.
    turns, calls : int
        Turns that count (one before them does not), and timed calls in each.
    optional : collection of str
        Drivers that may fail: a text saying why takes the place of their timings.

    Returns
    -------
    dict
        Timings, in milliseconds, by operation and driver.

    Raises
    ------
    TurnError
        If a driver that is not optional fails, or is refused by `check`.
    """
    expected = write_case(case, folder / "case")
    failures: dict[str, str] = {}

    def attempt(name: str, do: str, **arguments: object) -> dict[str, Any]:
        if name in failures:
            return {}
        try:
            answer = drivers[name].ask(do, **arguments)
            if do == "load":
                check(name, drivers[name].folder, expected)
            elif len(answer.get("seconds", ())) != calls:
                raise TurnError(f"{name} answered {do!r} with {answer}, not the seconds of {calls} calls")
        except TurnError as error:
            if name not in optional:
                raise
            failures[name] = str(error)
            return {}
        return answer

    for name, driver in drivers.items():
        for quantity in expected:
            (driver.folder / f"{quantity}.npy").unlink(missing_ok=True)
        attempt(name, "load", case=str(folder / "case"), answers=str(driver.folder))
    results: Timings = {}
    for operation in OPERATIONS:
        seconds: dict[str, list[float]] = {name: [] for name in drivers}
        for turn in tqdm(range(1 + turns), desc=f"{case}, {operation}", leave=False):
            for name in drivers:
                answer = attempt(name, "time", operation=operation, calls=calls)
                if turn > 0:
                    seconds[name] += answer.get("seconds", ())
        results[operation] = {
            name: failures[name] if name in failures else Timing.of(seconds[name]) for name in drivers
        }
    return results
