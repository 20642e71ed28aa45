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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
#: A turn goes on for at least so long, whatever the number of calls, so that short ones are not noise; and
#: for at most so many calls.
TURN_S, MOST_CALLS = 0.03, 300
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


def write_case(
    case: Case, folder: Path, block_shape: tuple[int, int] = (1, 1)
) -> dict[str, np.ndarray[Any, Any]]:
    """Write w (dense, with zeros), b, x and d (dy) to ``.npy`` files; return what must come out.

    Connections are blocks of that shape, which must divide the layer's; gradients of weights come block by
    block, in the order of the grid.
    """
    random = np.random.default_rng(0)
    height, width = block_shape
    grid = case.out_features // height, case.in_features // width
    size = grid[0] * grid[1]
    live = np.sort(random.choice(size, round((1 - case.sparsity) * size), replace=False))
    fan_in = max(1.0, (1 - case.sparsity) * case.in_features)
    blocks = np.zeros((size, height, width), np.float32)
    # Bounded away from zero: peers know the connections by their values.
    shape = (len(live), height, width)
    signs = random.choice((-1, 1), shape)
    blocks[live] = signs * random.uniform(0.5, 1.5, shape) / math.sqrt(fan_in)
    w = blocks.reshape(*grid, height, width).swapaxes(1, 2).reshape(case.out_features, case.in_features)
    b = random.standard_normal(case.out_features, np.float32)
    x = random.standard_normal((case.tokens, case.in_features), np.float32)
    d = random.standard_normal((case.tokens, case.out_features), np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in {"w": w, "b": b, "x": x, "d": d}.items():
        np.save(folder / f"{name}.npy", array)
    w64, b64, x64, d64 = (torch.from_numpy(array).double() for array in (w, b, x, d))
    y, dx, dw = x64 @ w64.T + b64, d64 @ w64, d64.T @ x64
    by_block = dw.numpy().reshape(grid[0], height, grid[1], width).swapaxes(1, 2).reshape(blocks.shape)
    return {"y": y.numpy(), "dx": dx.numpy(), "dw": by_block[live].reshape(-1)}


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


class Contest:
    """Drivers that are loaded with the same work and timed in turns.

    Parameters
    ----------
    drivers : mapping
        Processes that answer as `benchmarks/driver.py` does; they are not closed.
    optional : collection of str
        Drivers that may fail: a text saying why takes the place of their timings.
    """

    def __init__(self, drivers: Mapping[str, Driver], optional: Collection[str] = ()) -> None:
        self.drivers, self.optional = drivers, optional
        self.failures: dict[str, str] = {}

    def ask(self, name: str, do: str, **arguments: object) -> dict[str, Any]:
        """The answer of a driver; nothing if it has failed and may.

        Raises
        ------
        TurnError
            If a driver fails that must not.
        """
        if name in self.failures:
            return {}
        with self.excused(name):
            return self.drivers[name].ask(do, **arguments)
        return {}

    @contextlib.contextmanager
    def excused(self, name: str) -> Iterator[None]:
        """Remember why a driver failed that may."""
        try:
            yield
        except TurnError as error:
            if name not in self.optional:
                raise
            self.failures[name] = str(error)

    def time(self, operations: Iterable[str], turns: int, calls: int, label: str) -> Timings:
        """Milliseconds of each operation and driver.

        Parameters
        ----------
        operations : iterable of str
        turns, calls : int
            Turns that count (one before them does not), and timed calls in each: more of those that are over
            in less than `TURN_S`, equally many for every driver.
        label : str
            What the progress bar says.
        """
        results: Timings = {}
        for operation in operations:
            seconds: dict[str, list[float]] = {name: [] for name in self.drivers}
            first = [self._seconds(name, operation, calls) for name in self.drivers]
            slowest = max((max(each) for each in first if each), default=TURN_S)
            more = max(calls, min(MOST_CALLS, math.ceil(TURN_S / max(slowest, 1e-9))))
            for _ in tqdm(range(turns), desc=f"{label}, {operation}", leave=False):
                for name, found in seconds.items():
                    found += self._seconds(name, operation, more)
            results[operation] = {
                name: self.failures[name] if name in self.failures else Timing.of(found)
                for name, found in seconds.items()
            }
        return results

    def _seconds(self, name: str, operation: str, calls: int) -> list[float]:
        answer = self.ask(name, "time", operation=operation, calls=calls)
        found: list[float] = answer.get("seconds", [])
        if len(found) != calls and name not in self.failures:
            with self.excused(name):
                raise TurnError(f"{name} answered 'time' with {answer}, not the seconds of {calls} calls")
        return found


def compare(
    case: Case,
    drivers: Mapping[str, Driver],
    folder: Path,
    turns: int,
    calls: int,
    optional: Collection[str] = (),
    block_shape: tuple[int, int] | None = None,
) -> Timings:
    """Time the operations of one case, every driver in turns, after a check of what each computes.

    Parameters
    ----------
    case : Case
    drivers, optional
        As of `Contest`.
    folder : Path
        Where the case and the answers are written.
    turns, calls : int
        As of `Contest.time`.
    block_shape : (int, int), optional
        Of layers whose connections are blocks; drivers are told.

    Returns
    -------
    dict
        Timings, in milliseconds, by operation and driver.

    Raises
    ------
    TurnError
        If a driver that is not optional fails, or is refused by `check`.
    """
    expected = write_case(case, folder / "case", block_shape or (1, 1))
    contest = Contest(drivers, optional)
    blocks = {} if block_shape is None else {"block_shape": list(block_shape)}
    for name, driver in drivers.items():
        for quantity in expected:
            (driver.folder / f"{quantity}.npy").unlink(missing_ok=True)
        contest.ask(name, "load", case=str(folder / "case"), answers=str(driver.folder), **blocks)
        if name not in contest.failures:
            with contest.excused(name):
                check(name, driver.folder, expected)
    return contest.time(OPERATIONS, turns, calls, str(case))
