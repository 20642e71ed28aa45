"""Sparse momentum: move connections to the layers, and within them to the positions, of large momentum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sparselab.dst.budget.targets import Exchange, annealed
from sparselab.dst.engine.describe import setting
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.parts.drop import DropScore, lowest
from sparselab.dst.parts.grow_momentum import MomentumGrowth
from sparselab.dst.parts.grown import GrownValue
from sparselab.dst.parts.redistribute import ByMomentum, ByWeight
from sparselab.dst.parts.select import LayerSelection, UpdateContext
from sparselab.dst.schedules.schedule import Schedule
from sparselab.dst.schedules.when import UpdateSchedule
from sparselab.dst.view import LayerUpdate, LayerView
from sparselab.kernels.arrays import Array
from sparselab.nn.follow.state_move import GrownState

BY_MOMENTUM = ByMomentum()


class SNFS(DynamicSparsityAlgorithm):
    """Drop the smallest ``|w|`` of each layer; share what is grown by momentum, and grow where it is largest.

    An update drops ``ceil(f * nnz)`` connections of each layer. All that were dropped are shared out over the
    layers in proportion to the mean ``|momentum|`` of their connections (`ByMomentum`), so layers change in
    size and the total stays. A layer grows the positions of largest ``|momentum|`` among all that it does not
    keep (`MomentumGrowth`).

    Parameters
    ----------
    sparsity : float, Schedule or None
        The sparsity that every attached layer must have; None leaves each layer its own. A schedule is what
        the layers have together after every update.
    drop_fraction : float, Schedule or callable
        The paper's is ``CosineSchedule(0.5, steps, minimum=0.005)``.
    update_freq : int, optional
        Optimizer steps between updates; 100 if `update` says nothing else.
    update : dict, list of int, or UpdateSchedule, optional
        The steps that end with an update, where a period does not say it; see `DynamicSparsityAlgorithm`.
    stop : int, optional
        The optimizer step from which on nothing is rewired. A `drop_fraction` that is a number then falls
        from it to 0 as a cosine, which ends there; without `stop` it stays, and updates go on.
    seed : int
        Nothing is drawn; kept for a common interface.
    momentum_bytes : int
        Memory for averages of the dense gradient. The momentum at positions without a weight is not in any
        optimizer; layers that fit into this budget keep their own, at the price of a dense weight gradient
        on every step. The others, all of them if it is 0, grow by the gradient of the updating step.
    momentum : float
        What a step leaves of these averages.
    drop : DropScore, optional
        By default `Magnitude`.
    redistribute : ByWeight or None
        None leaves each layer its number of connections; `ByMagnitude` and `ByRemaining` are the other rules
        of the paper's code.
    grown_value, grown_state
        See `DynamicSparsityAlgorithm`.
    grad_accumulation : int
        Backward passes per optimizer step.

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
    >>> from sparselab.dst import SNFS
    >>> from sparselab.nn import SparseLinear
    >>> model = torch.nn.Sequential(SparseLinear(64, 32), torch.nn.ReLU(), SparseLinear(32, 4))
    >>> algorithm = SNFS(sparsity=0.9, update_freq=10, stop=40)
    >>> _ = algorithm.attach(model, optimizer := torch.optim.Adam(model.parameters()))
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 64)).square().mean().backward()
    ...     optimizer.step()
    >>> sum(layer.nnz for layer in algorithm.layers)
    218
    """

    redistribute: ByWeight | None

    def __init__(
        self,
        sparsity: float | Schedule | None = None,
        *,
        drop_fraction: float | Schedule | Callable[[int], float] = 0.5,
        update_freq: int | None = None,
        update: Mapping[str, Any] | Sequence[int] | UpdateSchedule | None = None,
        stop: int | None = None,
        seed: int = 0,
        momentum_bytes: int = 64 << 20,
        momentum: float = 0.9,
        drop: DropScore | None = None,
        redistribute: ByWeight | None = BY_MOMENTUM,
        grown_value: float | GrownValue = 0.0,
        grown_state: GrownState = "young",
        grad_accumulation: int = 1,
    ) -> None:
        super().__init__(
            AllButOne(sparsity, annealed(drop_fraction, update, stop)),
            update_freq=update_freq,
            update=update,
            stop=stop,
            seed=seed,
            scope=SpareTheGrowing(redistribute),
            drop=drop,
            grow=MomentumGrowth(momentum_bytes, momentum, grad_accumulation),
            redistribute=redistribute,
            grown_value=grown_value,
            grown_state=grown_state,
        )

    momentum_bytes = setting("grow", "momentum_bytes")
    momentum = setting("grow", "momentum")


class AllButOne(Exchange):
    """As `Exchange`, but rounded up, and one connection always stays."""

    def exchanged(self, step: int, n: int) -> int:
        """How many of `n` connections are replaced."""
        return max(0, min(math.ceil(self.fraction(step) * n), n - 1))


class SpareTheGrowing(LayerSelection):
    """A layer that is nearly dense and gets more than an equal share drops no more than it lacks.

    Parameters
    ----------
    redistribute : ByWeight or None
        What the shares are in proportion to.
    """

    of_blocks = False

    def __init__(self, redistribute: ByWeight | None) -> None:
        self._redistribute = redistribute

    def drop(self, context: UpdateContext) -> list[Array]:
        """Slots of the lowest scores of each layer."""
        return [
            lowest(scores, self._n_dropped(context, view, growing))
            for view, scores, growing in zip(
                context.views, context.scores, self._growing(context.views), strict=True
            )
        ]

    def _n_dropped(self, context: UpdateContext, view: LayerView, growing: bool) -> int:
        kept, total = context.targets(view)
        n_free = view.size - view.nnz
        if not growing or n_free >= 0.2 * view.size:
            return view.nnz - kept
        return min(view.nnz - kept, max(0, view.nnz - total) + math.ceil(n_free * view.nnz / view.size))

    def _growing(self, views: Sequence[LayerView]) -> list[bool]:
        if self._redistribute is None:
            return [False] * len(views)
        weights = [self._redistribute.weight(LayerUpdate(view, np.empty(0, np.int64))) for view in views]
        return [weight * len(views) > sum(weights) for weight in weights]
