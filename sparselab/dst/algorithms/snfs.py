"""Sparse momentum: move connections to the layers, and within them to the positions, of large momentum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.parts.drop import lowest
from sparselab.dst.parts.grow_momentum import MomentumGrowth
from sparselab.dst.parts.redistribute import ByMomentum
from sparselab.dst.parts.view import LayerView, Vacancy
from sparselab.dst.schedules.schedule import Schedule
from sparselab.kernels.arrays import Array


class SNFS(DynamicSparsityAlgorithm):
    """Drop the smallest ``|w|`` of each layer; share what is grown by momentum, and grow where it is largest.

    An update drops ``ceil(f * nnz)`` connections of each layer. All that were dropped are shared out over the
    layers in proportion to the mean ``|momentum|`` of their connections (`ByMomentum`), so layers change in
    size and the total stays. A layer grows the positions of largest ``|momentum|`` among all that it does not
    keep (`MomentumGrowth`).

    Parameters
    ----------
    sparsity : float, Schedule or None
        See `DynamicSparsityAlgorithm`.
    drop_fraction : float, Schedule or callable
        The paper's is ``Cosine(0.5, steps, minimum=0.005)``.
    update, seed
        See `DynamicSparsityAlgorithm`.
    momentum_bytes : int
        Memory for averages of the dense gradient. The momentum at positions without a weight is not in any
        optimizer; layers that fit into this budget keep their own, at the price of a dense weight gradient
        on every step. The others, all of them if it is 0, grow by the gradient of the updating step.
    momentum : float
        What a step leaves of these averages.
    grad_accumulation : int
        Backward passes per optimizer step.
    settings
        Of `DynamicSparsityAlgorithm`. ``redistribute=None`` leaves each layer its number of connections;
        `ByMagnitude` and `ByRemaining` are the other rules of the paper's code.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range.
    RuntimeError
        By `step`, if the optimizer keeps no momentum for any layer, as plain SGD.

    Notes
    -----
    O(nnz) memory beside the averages. As in the released code a layer that is nearly dense and still growing
    (sparsity s below 0.2, mean momentum above the average over layers) drops ``ceil(s * nnz)`` at most. Every
    layer keeps at least one connection.

    Departures from the paper: counts are exact, where its code corrects their drift by an average; a layer
    may become full, where its code stops at 99 %; growth ranks plain averages of the gradient, also under
    Adam (where the shares do use ``exp_avg / sqrt(exp_avg_sq)``); state of grown connections starts at zero;
    and updates are counted in steps, where the paper's come once per epoch.

    References
    ----------
    Dettmers and Zettlemoyer, "Sparse Networks from Scratch: Faster Training without Losing Performance",
    2019, section 3.2 and Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from sparselab.dst import SNFS, Cosine
    >>> from sparselab.nn import SparseLinear
    >>> model = torch.nn.Sequential(SparseLinear(64, 32), torch.nn.ReLU(), SparseLinear(32, 4))
    >>> algorithm = SNFS(sparsity=0.9, drop_fraction=Cosine(0.5, 40, minimum=0.005), update=10)
    >>> _ = algorithm.attach(model, optimizer := torch.optim.Adam(model.parameters()))
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 64)).square().mean().backward()
    ...     optimizer.step()
    >>> sum(layer.nnz for layer in algorithm.layers)
    218
    """

    _SCOPES = ("layer",)

    def __init__(
        self,
        sparsity: float | Schedule | None = None,
        drop_fraction: float | Schedule | Callable[[int], float] = 0.5,
        update: Any = 100,
        seed: int = 0,
        *,
        momentum_bytes: int = 64 << 20,
        momentum: float = 0.9,
        grad_accumulation: int = 1,
        **settings: Any,
    ) -> None:
        settings.setdefault("redistribute", ByMomentum())
        grow = MomentumGrowth(momentum_bytes, momentum, grad_accumulation)
        super().__init__(sparsity, drop_fraction, update, seed, grow=grow, **settings)

    def _exchanged(self, step: int, n: int) -> int:
        return max(0, min(math.ceil(self._fraction(step) * n), n - 1))

    def _drop(self, views: Sequence[LayerView], step: int) -> list[Array]:
        return [
            lowest(self.drop(view), self._n_dropped(view, step, growing))
            for view, growing in zip(views, self._growing(views), strict=True)
        ]

    def _n_dropped(self, view: LayerView, step: int, growing: bool) -> int:
        kept, total = self._targets(step, view.nnz, view.size)
        n_free = view.size - view.nnz
        if not growing or n_free >= 0.2 * view.size:
            return view.nnz - kept
        return min(view.nnz - kept, max(0, view.nnz - total) + math.ceil(n_free * view.nnz / view.size))

    def _growing(self, views: Sequence[LayerView]) -> list[bool]:
        """Which layers get more than an equal share."""
        if self.redistribute is None:
            return [False] * len(views)
        weights = [self.redistribute.weight(Vacancy(view, np.empty(0, np.int64))) for view in views]
        return [weight * len(views) > sum(weights) for weight in weights]
