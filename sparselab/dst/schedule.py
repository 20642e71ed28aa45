"""When and how much: numbers that depend on the training step and on nothing else.

A schedule has no state, so resuming a run needs only the step.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass

from sparselab.dst._checks import require_finite


class Schedule(abc.ABC):
    """A number for every training step; subclasses define ``__call__(step) -> float``."""

    @abc.abstractmethod
    def __call__(self, step: int) -> float:
        """Value at `step`, the count of finished optimizer steps."""

    def describe(self) -> str:
        """Name and settings, for comparing a saved run with the one that resumes it."""
        return type(self).__name__


@dataclass(frozen=True)
class Constant(Schedule):
    """The same number at every step.

    Parameters
    ----------
    value : float
        The number.

    Raises
    ------
    TypeError, ValueError
        If `value` is not a number, or not finite.
    """

    value: float

    def __post_init__(self) -> None:
        require_finite("value", self.value)

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        return float(self.value)

    def describe(self) -> str:
        """Name and settings."""
        return f"Constant({float(self.value)!r})"


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from `init` down to `minimum`, and `minimum` from then on.

    ``f(t) = minimum + (init - minimum) / 2 * (1 + cos(pi * t / half_period))`` for ``t < half_period``.

    Parameters
    ----------
    init : float
        Value at step 0.
    half_period : int or float
        Step at which `minimum` is reached; positive. It never rises again.
    minimum : float
        Final value, at most `init`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a number, not finite, or outside the range given above.

    References
    ----------
    Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, section 3 (update schedule).
    """

    init: float
    half_period: float
    minimum: float = 0.0

    def __post_init__(self) -> None:
        for name in ("init", "half_period", "minimum"):
            require_finite(name, getattr(self, name))
        if self.half_period <= 0:
            raise ValueError(f"half_period must be a positive number of steps; got {self.half_period!r}")
        if self.minimum > self.init:
            raise ValueError(
                f"minimum must not exceed init, because this schedule only falls; "
                f"got init={self.init!r}, minimum={self.minimum!r}"
            )

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        if step >= self.half_period:
            return float(self.minimum)
        height = (self.init - self.minimum) / 2
        return float(self.minimum + height * (1 + math.cos(math.pi * step / self.half_period)))

    def describe(self) -> str:
        """Name and settings."""
        return f"Cosine({float(self.init)!r}, {float(self.half_period)!r}, {float(self.minimum)!r})"


class _FromCallable(Schedule):
    def __init__(self, function: Callable[[int], float]) -> None:
        self._function = function

    def __call__(self, step: int) -> float:
        return float(self._function(step))

    def __repr__(self) -> str:
        return f"as_schedule({self._function!r})"


def as_schedule(value: float | Schedule | Callable[[int], float]) -> Schedule:
    """Turn a number or a function into a schedule.

    Parameters
    ----------
    value : float, Schedule or callable
        A number becomes `Constant`; a schedule is returned as it is; a function is called with the step.

    Raises
    ------
    TypeError
        If `value` is none of these.
    ValueError
        If `value` is a number that is not finite.
    """
    if isinstance(value, Schedule):
        return value
    if callable(value):
        return _FromCallable(value)
    require_finite("value", value, "a number, a Schedule or a function of the step")
    return Constant(float(value))
