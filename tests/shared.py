"""What the worker processes of one test run share, how long its runs are, and what it leaves out."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings


@contextlib.contextmanager
def once(path: Path) -> Iterator[bool]:
    """Whether `path` is still to be made, with every other process waiting meanwhile.

    A file or directory beside it, ``<name>.made``, says that it was made without an error.
    """
    made = path.with_name(f"{path.name}.made")
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not made.exists()
        made.touch()


def usual(is_usual: bool, *values: Any) -> Any:
    """Values of a parametrized test, which is left to make test-all unless they are among the usual."""
    return pytest.param(*values, marks=[] if is_usual else pytest.mark.slow)


def n_steps(few: int, many: int) -> int:
    """How long a run of training is: `many` steps in make test-all, where Hypothesis tries more as well."""
    return few if settings().max_examples <= settings.get_profile("repeatable").max_examples else many


def half(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Every other combination; of three axes or more, any two values of any two axes are in one of them."""
    corners = itertools.product(*map(enumerate, axes))
    return [tuple(value for _, value in each) for each in corners if sum(at for at, _ in each) % 2 == 0]
