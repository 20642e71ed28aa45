"""Dynamic sparse reparameterization: one threshold for the whole network, connections move between layers."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from sparselab.dst.budget.targets import KeepCount
from sparselab.dst.checks import require_count, require_finite
from sparselab.dst.engine.describe import setting
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.parts.drop import DropScore, Scores, lowest_of_network
from sparselab.dst.parts.grow import RandomGrowth
from sparselab.dst.parts.grown import GrownValue
from sparselab.dst.parts.redistribute import ByRemaining, Redistribution
from sparselab.dst.parts.select import NetworkSelection, UpdateContext
from sparselab.dst.schedules.when import UpdateSchedule
from sparselab.kernels.arrays import Array
from sparselab.nn.follow.state_move import GrownState
from sparselab.nn.layers.base import SparseLayer

# So that doubling or halving without end reaches neither infinity nor 0, from where there is no way back.
_SMALLEST, _LARGEST = 1e-30, 1e30


class DSR(DynamicSparsityAlgorithm):
    """Drop every ``|w|`` below a threshold H, wherever it is; regrow at random, most where most is left.

    All that were dropped are shared out over the layers in proportion to the connections they have left, and
    grow at random positions that were empty before. H then doubles if too few connections were below it, and
    halves if too many were:

        ``H <- 2 H    if n < (1 - tolerance) * n_prune``
        ``H <- H / 2  if n > (1 + tolerance) * n_prune``

    Parameters
    ----------
    sparsity : float or None
        The sparsity that every attached layer must have; None leaves each layer its own.
    update_freq : int, optional
        Optimizer steps between updates; 100 if `update` says nothing else.
    update : dict, list of int, or UpdateSchedule, optional
        The steps that end with an update, where a period does not say it; see `DynamicSparsityAlgorithm`.
    stop : int, optional
        The optimizer step from which on nothing is rewired.
    seed : int
        All random draws depend on ``(seed, layer, step)`` and nothing else.
    n_prune : int or float
        How many connections should be below H: a number, or a fraction of all connections, in (0, 1).
    threshold : float
        H of the first update; positive.
    tolerance : float
        In [0, 1).
    drop : DropScore, optional
        By default `Magnitude`; others are compared with H just the same.
    redistribute : Redistribution, optional
        By default `ByRemaining`.
    grown_value, grown_state
        See `DynamicSparsityAlgorithm`.

    Attributes
    ----------
    current_threshold : float
        H of the next update. It is saved and resumed.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range.

    Notes
    -----
    O(nnz) memory and time per update. Every layer keeps at least one connection, its best. The total is
    exact: what a full layer has no room for goes to the others, and if more connections are below H than
    there are empty positions in the network, only the lowest of them are dropped. NaN is below every H.

    The paper updates every 1000 steps at first and every 8000 at last (``update=[...]``), here it is every
    100 by default. Its `n_prune` is a
    number for each network; the default fraction is ours.

    References
    ----------
    Mostafa and Wang, "Parameter efficient training of deep convolutional neural networks by dynamic sparse
    reparameterization", ICML 2019, section 3, Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from sparselab.dst import DSR
    >>> from sparselab.nn import SparseLinear
    >>> model = torch.nn.Sequential(SparseLinear(64, 32), torch.nn.ReLU(), SparseLinear(32, 4))
    >>> algorithm = DSR(sparsity=0.9, n_prune=0.2, update_freq=1, threshold=0.5)
    >>> _ = model.apply(algorithm)
    >>> algorithm.step()
    >>> algorithm.current_threshold, sum(layer.nnz for layer in algorithm.layers)
    (0.25, 218)
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        update_freq: int | None = None,
        update: Mapping[str, Any] | Sequence[int] | UpdateSchedule | None = None,
        stop: int | None = None,
        seed: int = 0,
        n_prune: int | float = 0.1,
        threshold: float = 1e-3,
        tolerance: float = 0.1,
        drop: DropScore | None = None,
        redistribute: Redistribution | None = None,
        grown_value: float | GrownValue = 0.0,
        grown_state: GrownState = "young",
    ) -> None:
        super().__init__(
            KeepCount(sparsity),
            update_freq=update_freq,
            update=update,
            stop=stop,
            seed=seed,
            scope=BelowThreshold(n_prune, threshold, tolerance),
            drop=drop,
            grow=RandomGrowth(regrow=False),
            redistribute=ByRemaining() if redistribute is None else redistribute,
            grown_value=grown_value,
            grown_state=grown_state,
        )

    n_prune = setting("selection", "n_prune")
    threshold = setting("selection", "threshold")
    tolerance = setting("selection", "tolerance")
    current_threshold = setting("selection", "current_threshold")


class BelowThreshold(NetworkSelection):
    """Whatever scores below a threshold goes, which then doubles or halves.

    Parameters
    ----------
    n_prune : int or float
    threshold : float
        Of the first update.
    tolerance : float
    """

    of_blocks = False

    def __init__(self, n_prune: int | float, threshold: float, tolerance: float) -> None:
        self.n_prune = _check_n_prune(n_prune)
        require_finite("threshold", threshold)
        if threshold <= 0:
            raise ValueError(f"threshold must be positive, got {threshold!r}")
        require_finite("tolerance", tolerance)
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must lie in [0, 1), got {tolerance!r}")
        self.threshold = self.current_threshold = float(threshold)
        self.tolerance = tolerance

    def drop(self, context: UpdateContext) -> list[Array]:
        """Slots below the threshold, as many as can be replaced."""
        drops = [_below(scores, self.current_threshold) for scores in context.scores]
        n_below = sum(drop.size for drop in drops)
        self._adjust(n_below, sum(view.nnz for view in context.views))
        room = sum(context.rooms)
        return drops if n_below <= room else lowest_of_network(context.scores, room)

    def _adjust(self, n_below: int, nnz: int) -> None:
        """Double or halve the threshold for the next update."""
        wanted = self.n_prune if isinstance(self.n_prune, int) else self.n_prune * nnz
        if n_below < (1 - self.tolerance) * wanted:
            self.current_threshold = min(2 * self.current_threshold, _LARGEST)
        elif n_below > (1 + self.tolerance) * wanted:
            self.current_threshold = max(self.current_threshold / 2, _SMALLEST)

    def detach(self, layers: Iterable[SparseLayer]) -> None:
        """Begin with the first threshold again."""
        self.current_threshold = self.threshold

    def state_dict(self) -> dict[str, Any]:
        """The threshold of the next update."""
        return {"threshold": self.current_threshold}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError if it is no threshold; change nothing."""
        require_finite("the saved threshold", state["threshold"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the threshold."""
        self.current_threshold = float(state["threshold"])


def _check_n_prune(value: object) -> int | float:
    if isinstance(value, numbers.Integral):
        return require_count("n_prune", value, minimum=1)
    require_finite("n_prune", value, "a number of connections, or a fraction in (0, 1)")
    fraction = float(cast(float, value))
    if not 0 < fraction < 1:
        raise ValueError(f"n_prune must be a whole number, or a fraction in (0, 1), got {value!r}")
    return fraction


def _below(scores: Scores, threshold: float) -> Array:
    """Slots whose score is not at least the threshold, ascending; the best one is never among them."""
    slots = np.flatnonzero(~(scores >= threshold))
    if slots.size < scores.size or not slots.size:
        return slots
    return np.delete(slots, np.argmax(np.where(np.isnan(scores), -np.inf, scores)))
