"""Dynamic sparse reparameterization: one threshold for the whole network, connections move between layers."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from sparselab.dst.checks import require_count, require_finite
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.parts.drop import Scores, lowest_of_network
from sparselab.dst.parts.grow import RandomGrowth
from sparselab.dst.parts.redistribute import ByRemaining
from sparselab.dst.parts.view import LayerView
from sparselab.kernels.arrays import Array

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
        See `DynamicSparsityAlgorithm`.
    n_prune : int or float
        How many connections should be below H: a number, or a fraction of all connections, in (0, 1).
    update, seed
        See `DynamicSparsityAlgorithm`.
    threshold : float
        H of the first update; positive.
    tolerance : float
        In [0, 1).
    settings
        Of `DynamicSparsityAlgorithm`. Drop scores other than ``|w|`` are compared with H just the same.

    Attributes
    ----------
    threshold : float
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

    The paper updates every 1000 steps at first and every 8000 at last (``update=[...]``). Its `n_prune` is a
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
    >>> algorithm = DSR(sparsity=0.9, n_prune=0.2, update=1, threshold=0.5)
    >>> _ = model.apply(algorithm)
    >>> algorithm.step()
    >>> algorithm.threshold, sum(layer.nnz for layer in algorithm.layers)
    (0.25, 218)
    """

    _SCOPES = ("network",)
    _FOLLOWS_SCHEDULE = False
    _OF_BLOCKS = False

    def __init__(
        self,
        sparsity: float | None = None,
        n_prune: int | float = 0.1,
        update: Any = 1000,
        seed: int = 0,
        *,
        threshold: float = 1e-3,
        tolerance: float = 0.1,
        **settings: Any,
    ) -> None:
        settings.setdefault("redistribute", ByRemaining())
        grow = RandomGrowth(regrow=False)
        super().__init__(sparsity, 1.0, update, seed, grow=grow, scope="network", **settings)
        self.n_prune = _check_n_prune(n_prune)
        require_finite("threshold", threshold)
        if threshold <= 0:
            raise ValueError(f"threshold must be positive; got {threshold!r}")
        require_finite("tolerance", tolerance)
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must lie in [0, 1); got {tolerance!r}")
        self.threshold = float(threshold)
        self.tolerance = tolerance

    def _drop(self, views: Sequence[LayerView], step: int) -> list[Array]:
        scores = [self.drop(view) for view in views]
        drops = [_below(layer, self.threshold) for layer in scores]
        n_below = sum(drop.size for drop in drops)
        self._adjust(n_below, sum(view.nnz for view in views))
        room = sum(view.size - view.nnz for view in views)
        return drops if n_below <= room else lowest_of_network(scores, room)

    def _adjust(self, n_below: int, nnz: int) -> None:
        """Double or halve the threshold for the next update."""
        wanted = self.n_prune if isinstance(self.n_prune, int) else self.n_prune * nnz
        if n_below < (1 - self.tolerance) * wanted:
            self.threshold = min(2 * self.threshold, _LARGEST)
        elif n_below > (1 + self.tolerance) * wanted:
            self.threshold = max(self.threshold / 2, _SMALLEST)

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "n_prune": self.n_prune, "tolerance": float(self.tolerance)}

    def _memory(self) -> dict[str, Any]:
        return {**super()._memory(), "threshold": self.threshold}

    def _remember(self, memory: dict[str, Any]) -> None:
        require_finite("state['memory']['threshold']", memory["threshold"])
        super()._remember(memory)
        self.threshold = float(memory["threshold"])


def _check_n_prune(value: object) -> int | float:
    if isinstance(value, numbers.Integral):
        return require_count("n_prune", value, minimum=1)
    require_finite("n_prune", value, "a number of connections, or a fraction in (0, 1)")
    fraction = float(cast(float, value))
    if not 0 < fraction < 1:
        raise ValueError(f"n_prune must be a whole number, or a fraction in (0, 1); got {value!r}")
    return fraction


def _below(scores: Scores, threshold: float) -> Array:
    """Slots whose score is not at least the threshold, ascending; the best one is never among them."""
    slots = np.flatnonzero(~(scores >= threshold))
    if slots.size < scores.size or not slots.size:
        return slots
    return np.delete(slots, np.argmax(np.where(np.isnan(scores), -np.inf, scores)))
