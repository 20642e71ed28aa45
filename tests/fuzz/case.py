"""One case: a sequence of steps from one seed, what it reports, and the rules by which a step is judged."""

from __future__ import annotations

import mmap
import re
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

#: What a wrong call may raise. An AttributeError is clean where an attribute was to be set.
CLEAN = (TypeError, ValueError, RuntimeError)
STATUS_BYTES = 512

#: What `Case.attempt` returns where the call raised a clean error.
REFUSED = object()


class Found(Exception):
    """A fault: its kind, and what happened."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


class Skipped(Exception):
    """The step cannot be made in this state, or has been found to fail often enough."""


class Status:
    """The running step in a file that outlives the process."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), STATUS_BYTES)

    def write(self, text: str) -> None:
        """Replace the text."""
        self._memory[:] = text.encode()[:STATUS_BYTES].ljust(STATUS_BYTES)

    @staticmethod
    def read(path: Path) -> str:
        """The text that was written last."""
        return path.read_bytes()[:STATUS_BYTES].decode(errors="replace").strip()


class Label(NamedTuple):
    """What a step does: an operation and what is odd about this call of it."""

    operation: str
    mutation: str


class Case:
    """What the steps of one case share.

    Parameters
    ----------
    family : str
        Name of the sequence that is run.
    seed : int
    status : Status, optional
        Where the running step is written before it runs.
    skip : set of Label
        Steps that are left out.
    """

    def __init__(
        self, family: str, seed: int, status: Status | None = None, skip: frozenset[Label] = frozenset()
    ) -> None:
        self.family, self.seed, self.status, self.skip = family, seed, status, skip
        self.step = 0
        self.label = Label("start", "")
        self.calls: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.rng = np.random.default_rng([seed, 0])

    def next_step(self) -> None:
        """Begin another step, with random numbers of its own."""
        self.step += 1
        self.rng = np.random.default_rng([self.seed, self.step])

    def note(self, operation: str, mutation: str = "valid") -> None:
        """Say what is about to be called. Raises `Skipped` if that is left out."""
        self.label = Label(operation, mutation)
        if self.label in self.skip:
            raise Skipped
        self.calls[operation] += 1
        if self.status is not None:
            self.status.write(f"{self.family}\t{self.seed}\t{self.step}\t{operation}\t{mutation}")

    def attempt(self, call: Callable[[], Any], *names: str, also: tuple[type[Exception], ...] = ()) -> Any:
        """The result of a call that may be wrong, or REFUSED if it raised a clean error.

        Parameters
        ----------
        call : callable
        names : str
            What the error must name one of.
        also : tuple of exception types
            Clean here, beside those that always are.
        """
        try:
            return call()
        except Exception as error:
            if isinstance(error, MemoryError) and not names:
                return REFUSED
            if not isinstance(error, (*CLEAN, *also)):
                raise Found("unclean", f"{describe(error)}") from error
            if names and not any(re.search(rf"\b{re.escape(name)}\b", str(error)) for name in names):
                raise Found("unclean", f"names none of {', '.join(names)}: {describe(error)}") from error
            self.refusals[self.label.operation] += 1
            return REFUSED

    def valid(self, call: Callable[[], Any]) -> Any:
        """The result of a call that is right."""
        try:
            return call()
        except Exception as error:
            raise Found("refused", describe(error)) from error

    def refuse(
        self, call: Callable[[], Any], *names: str, what: str = "a result came",
        also: tuple[type[Exception], ...] = (),
    ) -> None:  # fmt: skip
        """A call that has no right result: it must raise a clean error."""
        if self.attempt(call, *names, also=also) is not REFUSED:
            raise Found("wrong", f"accepted: {what}")

    def chance(self, probability: float) -> bool:
        """True that often."""
        return bool(self.rng.random() < probability)

    def pick(self, options: Any) -> Any:
        """One of them."""
        return options[int(self.rng.integers(len(options)))]


def describe(error: BaseException) -> str:
    """The error in one line, with where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:300]}"


def run_case(case: Case, steps: Callable[[Case], None]) -> Found | None:
    """Run a sequence; the fault that ended it, if one did."""
    try:
        steps(case)
    except Found as found:
        return found
    except Skipped:
        pass
    except AssertionError as wrong:
        return Found("wrong", describe(wrong))
    except Exception as error:
        return Found("unclean", describe(error))
    return None
