"""When topologies change: which optimizer steps end with an update."""

from __future__ import annotations

import abc
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sparselab.dst.checks import require_count, require_several


class UpdateSchedule(abc.ABC):
    """Yes or no for every optimizer step; subclasses define ``__call__(step) -> bool``.

    Attributes
    ----------
    stop : int or None
        The step from which on nothing changes any more, if it is known.
    """

    stop: int | None = None

    @abc.abstractmethod
    def __call__(self, step: int) -> bool:
        """Whether optimizer step number `step` (the first is 1) ends with an update."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Settings as plain values, for comparing a saved run with the one that resumes it."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.describe().items())})"


@dataclass(frozen=True)
class EverySteps(UpdateSchedule):
    """Step t updates if ``t % freq == 0`` and ``start <= t`` and t is below `stop`.

    Parameters
    ----------
    freq : int
        Steps between updates, at least 1.
    start : int
        First step that may update.
    stop : int or None
        Step from which nothing changes any more; None means never.

    Raises
    ------
    TypeError, ValueError
        If an argument is not an integer, or too small.

    Examples
    --------
    >>> [step for step in range(1000) if EverySteps(100, start=200, stop=500)(step)]
    [200, 300, 400]
    """

    freq: int
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "freq", require_count("freq", self.freq, minimum=1))
        object.__setattr__(self, "start", require_count("start", self.start))
        if self.stop is not None:
            object.__setattr__(self, "stop", require_count("stop", self.stop))

    def __call__(self, step: int) -> bool:
        """Whether optimizer step number `step` (the first is 1) ends with an update."""
        return (
            step > 0
            and step % self.freq == 0
            and self.start <= step
            and (self.stop is None or step < self.stop)
        )

    def describe(self) -> dict[str, Any]:
        """``{"freq": ..., "start": ..., "stop": ...}``."""
        return {"freq": self.freq, "start": self.start, "stop": self.stop}


@dataclass(frozen=True)
class AtSteps(UpdateSchedule):
    """The steps of a list update, no others.

    Parameters
    ----------
    steps : sequence of int
        Positive and ascending, at least one.

    Raises
    ------
    TypeError, ValueError
        If `steps` is empty, or holds something else.
    """

    steps: Sequence[int]

    def __post_init__(self) -> None:
        several = require_several("steps", self.steps)
        steps = tuple(require_count(f"steps[{i}]", step, minimum=1) for i, step in enumerate(several))
        for before, after in pairwise(steps):
            if before >= after:
                raise ValueError(f"steps must ascend, got {after} after {before}")
        object.__setattr__(self, "steps", steps)

    def __call__(self, step: int) -> bool:
        """Whether optimizer step number `step` (the first is 1) ends with an update."""
        index = bisect_left(self.steps, step)
        return index < len(self.steps) and self.steps[index] == step

    def describe(self) -> dict[str, Any]:
        """``{"steps": [...]}``."""
        return {"steps": list(self.steps)}


def as_update_schedule(value: Mapping[str, Any] | Sequence[int] | UpdateSchedule) -> UpdateSchedule:
    """Turn a dict or a list into an update schedule.

    Parameters
    ----------
    value : dict, list, tuple or UpdateSchedule
        A list or tuple holds the steps of `AtSteps`; a dict has the arguments of either, as
        `UpdateSchedule.describe` returns them; a schedule is returned as it is.

    Raises
    ------
    TypeError
        If `value` is none of these, or holds something else than integers.
    ValueError
        If keys are unknown or missing, or numbers outside their range.

    Examples
    --------
    >>> as_update_schedule({"freq": 100, "stop": 750})
    EverySteps(freq=100, start=0, stop=750)
    >>> as_update_schedule([10, 100, 1000])
    AtSteps(steps=(10, 100, 1000))
    """
    if isinstance(value, UpdateSchedule):
        return value
    if isinstance(value, Mapping):
        if value.keys() == {"steps"}:
            return AtSteps(value["steps"])
        if {"freq"} <= value.keys() <= {"freq", "start", "stop"}:
            return EverySteps(**value)
        raise ValueError(
            f"update must have the key 'steps' alone, or 'freq' and if need be 'start' and 'stop', "
            f"got {list(value)}"
        )
    if isinstance(value, (list, tuple)):
        return AtSteps(value)
    raise TypeError(
        f"update must be a dict with the key 'freq' or 'steps', a list of steps or an UpdateSchedule, "
        f"got {value!r} (the number of steps between updates is update_freq)"
    )


def when_to_update(
    update_freq: int | None,
    update: Mapping[str, Any] | Sequence[int] | UpdateSchedule | None,
    stop: int | None,
    default: int = 100,
) -> tuple[UpdateSchedule, int | None]:
    """What the three arguments of an algorithm say together.

    Parameters
    ----------
    update_freq : int, optional
        Steps between updates; `default` if `update` is None, too.
    update : dict, list, tuple or UpdateSchedule, optional
        For what a period cannot say; see `as_update_schedule`.
    stop : int, optional
        The optimizer step from which on nothing is rewired.
    default : int

    Returns
    -------
    UpdateSchedule, int or None
        Which steps update, unless they have reached the second: the horizon, from whichever argument.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range, or two of them say the same thing.

    Examples
    --------
    >>> when_to_update(50, None, 750)
    (EverySteps(freq=50, start=0, stop=750), 750)
    """
    if stop is not None:
        stop = require_count("stop", stop)
    if update is None:
        freq = default if update_freq is None else require_count("update_freq", update_freq, minimum=1)
        return EverySteps(freq, stop=stop), stop
    if update_freq is not None:
        raise ValueError(
            f"update_freq must be left out where update says when, got update_freq={update_freq!r} and "
            f"update={update!r}"
        )
    schedule = as_update_schedule(update)
    if stop is not None and schedule.stop not in (None, stop):
        raise ValueError(f"stop must be given once, got stop={stop} and update={update!r}")
    return schedule, schedule.stop if stop is None else stop
