"""How much: the connections that an update leaves, and those that there are after it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparselab.dst.checks import require_finite
from sparselab.dst.part import Part
from sparselab.dst.schedules.schedule import ConstantSchedule, CosineSchedule, Schedule, as_schedule
from sparselab.dst.schedules.when import UpdateSchedule, when_to_update
from sparselab.kernels.arrays import n_connections
from sparselab.nn.layers.base import SparseLayer


class Budget(Part, abc.ABC):
    """How many connections stay, and how many there are in the end, of a layer or of all layers together.

    Parameters
    ----------
    sparsity : float, Schedule or None
        What layers are told to have: a number that every attached layer must have already, a schedule that
        updates take them along, or None, which leaves each layer its own.

    Raises
    ------
    TypeError, ValueError
        If it is none of these.
    """

    of_blocks = True

    def __init__(self, sparsity: float | Schedule | None = None) -> None:
        self.sparsity = check_sparsity(sparsity)

    @abc.abstractmethod
    def targets(self, step: int, nnz: int, size: int) -> tuple[int, int]:
        """Connections after the drop and after the growth.

        Parameters
        ----------
        step : int
            Finished optimizer steps.
        nnz, size : int
            Connections and positions now: of a layer or, with ``scope="network"``, of all of them.

        Returns
        -------
        kept, total : int
            ``kept <= min(nnz, total)``.
        """

    def check(self, layer: SparseLayer) -> None:
        """Raise ValueError if an update could not start from what the layer has."""
        check_count(layer, self.sparsity)

    def describe(self) -> str:
        """Name and settings, for comparing a saved run with the one that resumes it."""
        sparsity = self.sparsity
        return f"{type(self).__name__}({sparsity.describe() if isinstance(sparsity, Schedule) else sparsity})"


class Exchange(Budget):
    """Replace a fraction of the connections; their number stays, or becomes what a schedule says.

    Parameters
    ----------
    sparsity : float, Schedule or None
        See `Budget`. A schedule is where every update takes the layers to, whatever they had before.
    drop_fraction : float, Schedule or callable
        Fraction of the connections to replace, in ``[0, 1]``, rounded down; a schedule or function is called
        with the step.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range.

    Examples
    --------
    >>> Exchange(0.9, drop_fraction=0.3).targets(step=100, nnz=50, size=500)
    (35, 50)
    """

    def __init__(
        self,
        sparsity: float | Schedule | None = None,
        drop_fraction: float | Schedule | Callable[[int], float] = 0.3,
    ) -> None:
        super().__init__(sparsity)
        self.drop_fraction = as_schedule(drop_fraction, "drop_fraction")
        if isinstance(self.drop_fraction, ConstantSchedule):
            self.fraction(0)

    def fraction(self, step: int) -> float:
        """`drop_fraction` at a step; raise ValueError if that is none."""
        fraction = self.drop_fraction(step)
        if not 0 <= fraction <= 1:
            raise ValueError(f"drop_fraction must lie in [0, 1], got {fraction!r} at step {step}")
        return fraction

    def exchanged(self, step: int, n: int) -> int:
        """How many of `n` connections are replaced."""
        return int(self.fraction(step) * n)

    def total(self, step: int, nnz: int, size: int) -> int:
        """Connections after the growth; a layer that has any keeps one."""
        if not isinstance(self.sparsity, Schedule):
            return nnz
        return max(min(nnz, 1), n_connections((1, size), self.sparsity(step)))

    def targets(self, step: int, nnz: int, size: int) -> tuple[int, int]:
        """Connections after the drop and after the growth."""
        total = self.total(step, nnz, size)
        kept = min(nnz, total)
        return kept - self.exchanged(step, kept), total

    def describe(self) -> str:
        """Name and settings, for comparing a saved run with the one that resumes it."""
        return f"{super().describe()[:-1]}, {self.drop_fraction.describe()})"


class Prune(Exchange):
    """As `Exchange` along a schedule, but layers only ever lose: fewer than it says stay as few.

    Parameters
    ----------
    sparsity : Schedule or callable
        Called with the step; not constant.
    drop_fraction : float, Schedule or callable
        Fraction of what the schedule leaves to replace.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range.
    """

    sparsity: Schedule

    def __init__(
        self,
        sparsity: Schedule | Callable[[int], float],
        drop_fraction: float | Schedule | Callable[[int], float] = 0.0,
    ) -> None:
        schedule = as_schedule(sparsity, "sparsity")
        if isinstance(schedule, ConstantSchedule):
            raise ValueError(
                f"sparsity must be a schedule that changes, such as PolynomialSchedule(0.0, 0.9, stop), "
                f"since connections are pruned while the model trains, got the constant {schedule.value!r}"
            )
        super().__init__(schedule, drop_fraction)

    def total(self, step: int, nnz: int, size: int) -> int:
        """Connections after the growth, never more than before."""
        return min(nnz, super().total(step, nnz, size))


class KeepCount(Budget):
    """The number of connections stays, and any of them may be dropped: a `Selection` says which.

    Parameters
    ----------
    sparsity : float or None
        See `Budget`.

    Raises
    ------
    TypeError, ValueError
        If it is a schedule, or no sparsity.
    """

    def __init__(self, sparsity: float | None = None) -> None:
        if isinstance(sparsity, Schedule):
            raise TypeError(
                f"sparsity must be a number or None, because the number of connections is kept, got a "
                f"{type(sparsity).__name__}"
            )
        super().__init__(sparsity)

    def targets(self, step: int, nnz: int, size: int) -> tuple[int, int]:
        """``(0, nnz)``."""
        return 0, nnz


def check_sparsity(sparsity: float | Schedule | None) -> float | Schedule | None:
    """`sparsity` itself; raise TypeError or ValueError if it is none."""
    if sparsity is not None and not isinstance(sparsity, Schedule):
        require_finite("sparsity", sparsity, "a number in [0, 1], or None")
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity must lie in [0, 1], the fraction without a weight, got {sparsity!r}")
    return sparsity


def by_rows(layer: SparseLayer, sparsity: float) -> int:
    """Connections of a layer whose rows have that sparsity each, which rounds for every row."""
    rows, columns = layer.grid
    return rows * n_connections((1, columns), sparsity)


def check_count(layer: SparseLayer, sparsity: float | Schedule | None) -> None:
    """Raise ValueError if `sparsity` is a number and the layer has another number of connections."""
    if sparsity is None or isinstance(sparsity, Schedule):
        return
    expected = n_connections(layer.grid, sparsity)
    if layer.nnz not in (expected, by_rows(layer, sparsity)):
        raise ValueError(
            f"sparsity={sparsity} means {expected} connections for a layer of shape {tuple(layer.shape)}, "
            f"but it has {layer.nnz} (sparsity {layer.sparsity:.6g}). An algorithm keeps the number of "
            f"connections: build the layer with that sparsity, or pass sparsity=None to keep each layer's own"
        )


def annealed(
    drop_fraction: float | Schedule | Callable[[int], float],
    update: Mapping[str, Any] | Sequence[int] | UpdateSchedule | None,
    stop: int | None,
) -> float | Schedule | Callable[[int], float]:
    """A number as the cosine that falls from it to 0 at the horizon, if there is one; else what was given.

    Parameters
    ----------
    drop_fraction : float, Schedule or callable
    update, stop
        As an algorithm takes them: either may say where the horizon is.

    Examples
    --------
    >>> annealed(0.3, None, 750)
    CosineSchedule(init=0.3, stop=750, minimum=0.0)
    >>> annealed(0.3, None, None)
    0.3
    """
    _, stop = when_to_update(None, update, stop)
    schedule = as_schedule(drop_fraction, "drop_fraction")
    if stop and isinstance(schedule, ConstantSchedule):
        Exchange(None, schedule)
        return CosineSchedule(schedule.value, stop)
    return drop_fraction
