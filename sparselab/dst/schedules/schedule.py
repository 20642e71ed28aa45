"""How much: numbers that depend on the training step and on nothing else.

A schedule has no state, so resuming a run needs only the step. When topologies change is in `when`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparselab.dst.checks import require_finite, require_several


class Schedule(abc.ABC):
    """A number for every training step; subclasses define ``__call__(step) -> float``."""

    @abc.abstractmethod
    def __call__(self, step: int) -> float:
        """Value at `step`, the count of finished optimizer steps."""

    def describe(self) -> str:
        """Name and settings, for comparing a saved run with the one that resumes it."""
        return type(self).__name__

    def __repr__(self) -> str:
        return self.describe()


class _Formula(Schedule):
    """A schedule whose settings, the fields of a dataclass, are finite numbers."""

    def __post_init__(self) -> None:
        for name, number in vars(self).items():
            require_finite(name, number)
            if name in ("power", "steepness") and number <= 0:
                raise ValueError(f"{name} must be positive, got {number!r}")
        stop, start = vars(self).get("stop"), vars(self).get("start", 0)
        if stop is not None and stop <= start:
            raise ValueError(f"stop must be a step after step {start!r}, got {stop!r}")

    def describe(self) -> str:
        """Name and settings."""
        return f"{type(self).__name__}({', '.join(repr(float(number)) for number in vars(self).values())})"


@dataclass(frozen=True)
class ConstantSchedule(_Formula):
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

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        return float(self.value)


@dataclass(frozen=True)
class CosineSchedule(_Formula):
    """Half a cosine from `init` down to `minimum`, and `minimum` from then on.

    ``f(t) = minimum + (init - minimum) / 2 * (1 + cos(pi * t / stop))`` for ``t < stop``.

    Parameters
    ----------
    init : float
        Value at step 0.
    stop : int or float
        The step from which on it is `minimum`; positive. It never rises again.
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
    stop: float
    minimum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minimum > self.init:
            raise ValueError(
                f"minimum must not exceed init, because this schedule only falls; "
                f"got init={self.init!r}, minimum={self.minimum!r}"
            )

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        if step >= self.stop:
            return float(self.minimum)
        height = (self.init - self.minimum) / 2
        return float(self.minimum + height * (1 + math.cos(math.pi * step / self.stop)))


@dataclass(frozen=True)
class LinearSchedule(_Formula):
    """A straight line from `init` to `final`, and `final` from then on.

    Parameters
    ----------
    init : float
        Value at step 0.
    final : float
        Value from step `stop` on; above or below `init`.
    stop : int or float
        The step from which on it is `final`; positive.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a number, not finite, or outside the range given above.

    Examples
    --------
    >>> [LinearSchedule(0.0, 0.8, stop=100)(step) for step in (0, 50, 100, 200)]
    [0.0, 0.4, 0.8, 0.8]
    """

    init: float
    final: float
    stop: float

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        return _approach(self.init, self.final, 1 - step / self.stop)


@dataclass(frozen=True)
class PolynomialSchedule(_Formula):
    """Fast at first, then ever slower: the usual schedule of a sparsity that grows during training.

    ``f(t) = final + (init - final) * (1 - (t - start) / (stop - start)) ** power`` for ``start <= t < stop``,
    `init` before, `final` after.

    Parameters
    ----------
    init : float
        Value up to step `start`.
    final : float
        Value from step `stop` on; above or below `init`.
    stop : int or float
        The step from which on it is `final`; after `start`.
    power : int or float
        Exponent, positive. 1 is a straight line.
    start : int or float
        Step that still has `init`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a number, not finite, or outside the range given above.

    References
    ----------
    Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017,
    equation 1, where power is 3 and stop is ``start + n * dt``.

    Examples
    --------
    >>> [PolynomialSchedule(0.0, 0.8, stop=110, start=10)(step) for step in (0, 10, 60, 110)]
    [0.0, 0.0, 0.7000000000000001, 0.8]
    """

    init: float
    final: float
    stop: float
    power: float = 3
    start: float = 0

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        left = min(max(1 - (step - self.start) / (self.stop - self.start), 0.0), 1.0)
        return _approach(self.init, self.final, left**self.power)


@dataclass(frozen=True)
class SigmoidSchedule(_Formula):
    """Slow at both ends and fast half way: a logistic curve, stretched so that it meets its ends.

    ``f(t) = final + (init - final) * (1 - g(t))`` for ``start <= t < stop``, `init` before, `final` after,
    with ``g`` rising from 0 to 1 as ``1 / (1 + exp(-steepness * (2 * (t - start) / (stop - start) - 1)))``
    does between its values at both ends.

    Parameters
    ----------
    init : float
        Value up to step `start`.
    final : float
        Value from step `stop` on; above or below `init`.
    stop : int or float
        The step from which on it is `final`; after `start`.
    steepness : int or float
        Positive. Near 0 is a straight line.
    start : int or float
        Step that still has `init`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a number, not finite, or outside the range given above.

    References
    ----------
    Zhang et al., "Brain network science modelling of sparse neural networks enables Transformers and LLMs to
    perform as fully connected", NeurIPS 2025, arXiv 2501.19107 (sigmoid gradual density decay, with 6 as
    steepness).

    Examples
    --------
    >>> [round(SigmoidSchedule(0.5, 0.9, stop=100)(step), 3) for step in (0, 25, 50, 75, 100)]
    [0.5, 0.518, 0.7, 0.882, 0.9]
    """

    init: float
    final: float
    stop: float
    steepness: float = 6
    start: float = 0

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        # tanh(x / 2) is the logistic curve centred on 0 and twice as high; it cannot overflow.
        done = 2 * (step - self.start) / (self.stop - self.start) - 1
        reached = math.tanh(self.steepness * done / 2) / math.tanh(self.steepness / 2)
        return _approach(self.init, self.final, min(max((1 - reached) / 2, 0.0), 1.0))


@dataclass(frozen=True)
class ExponentialSchedule(_Formula):
    """Every step leaves the fraction `gamma` of the distance to `final`, which is never quite reached.

    ``f(t) = final + (init - final) * gamma ** t``.

    Parameters
    ----------
    init : float
        Value at step 0.
    gamma : float
        What a step leaves of the distance, in (0, 1].
    final : float
        The limit; above or below `init`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a number, not finite, or outside the range given above.

    Examples
    --------
    >>> [ExponentialSchedule(0.5, 0.5)(step) for step in (0, 1, 2)]
    [0.5, 0.25, 0.125]
    """

    init: float
    gamma: float
    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must lie in (0, 1], got {self.gamma!r}")

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        return _approach(self.init, self.final, self.gamma**step)


@dataclass(frozen=True)
class CyclingSchedule(Schedule):
    """One value after the other, then again from the first: ``values[t % len(values)]``.

    It counts optimizer steps, not updates: updates every 100 steps never see more than the first of two.

    Parameters
    ----------
    values : sequence of float
        At least one.

    Raises
    ------
    TypeError, ValueError
        If `values` is empty, or one of them is not a number or not finite.
    """

    values: Sequence[float]

    def __post_init__(self) -> None:
        values = require_several("values", self.values)
        for index, number in enumerate(values):
            require_finite(f"values[{index}]", number)
        object.__setattr__(self, "values", values)

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        return float(self.values[step % len(self.values)])

    def describe(self) -> str:
        """Name and settings."""
        return f"CyclingSchedule({[float(number) for number in self.values]})"


def _approach(init: float, final: float, left: float) -> float:
    """The number that is the fraction `left` of the whole way before `final`; the ends are exact."""
    if left >= 1:
        return float(init)
    return float(final + (init - final) * left) if left > 0 else float(final)


class _FromCallable(Schedule):
    def __init__(self, function: Callable[[int], float]) -> None:
        self._function = function

    def __call__(self, step: int) -> float:
        return float(self._function(step))

    def describe(self) -> str:
        # A function cannot tell its settings, so two of one name count as the same.
        return f"as_schedule({getattr(self._function, '__qualname__', type(self._function).__name__)})"

    def __repr__(self) -> str:
        return f"as_schedule({self._function!r})"


def as_schedule(
    value: float | Schedule | list[float] | tuple[float, ...] | Callable[[int], float],
    name: str = "value",
) -> Schedule:
    """Turn a number, a list or a function into a schedule.

    Parameters
    ----------
    value : float, Schedule, list, tuple or callable
        A number becomes `ConstantSchedule`, a list or tuple `CyclingSchedule`; a schedule is returned as it
        is; a function is called with the step.
    name : str
        What errors call it.

    Raises
    ------
    TypeError
        If `value` is none of these.
    ValueError
        If `value` is or holds a number that is not finite, or is empty.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, (list, tuple)):
        return CyclingSchedule(value)
    if callable(value):
        return _FromCallable(value)
    require_finite(name, value, "a number, a list, a Schedule or a function of the step")
    return ConstantSchedule(float(value))
