"""GraNet: prune the network gradually, and let each layer regenerate what it lost elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from sparselab.dst.budget.targets import Budget, Exchange, Prune, annealed
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.parts.drop import DropScore, lowest, lowest_of_network
from sparselab.dst.parts.grow import GradientGrowth
from sparselab.dst.parts.redistribute import Redistribution
from sparselab.dst.parts.select import NetworkSelection, UpdateContext, as_selection
from sparselab.dst.schedules.schedule import Schedule
from sparselab.dst.schedules.when import UpdateSchedule
from sparselab.dst.view import LayerUpdate, LayerView
from sparselab.kernels.arrays import Array


class GraNet(DynamicSparsityAlgorithm):
    """Prune by magnitude over all layers together, then replace the weakest of each layer by gradient.

    An update at step t first drops the smallest ``|w|`` of the network down to ``sparsity(t)``. Then each
    layer drops the fraction ``drop_fraction(t)`` of what it has left, again the smallest, and grows as many
    where ``|dY^T X|`` is largest among all positions that are not kept. The second part goes on when the
    schedule of the first has ended. Both are one change of topology: what is dropped and grown again keeps
    its weight and its optimizer state.

    Parameters
    ----------
    sparsity : Schedule or callable
        As of `GMP`, of all layers together. The paper's is ``PolynomialSchedule(init, final, stop)``,
        beginning either dense (0) or with layers of sparsity 0.5 shared out by ERK (see `allocate`).
    drop_fraction : float, Schedule or callable
        Neuroregeneration, in ``[0, 1]``. The paper's is ``CosineSchedule(0.5, steps, minimum=0.005)`` over
        the whole training.
    update_freq : int, optional
        Optimizer steps between updates; 100 if `update` says nothing else.
    update : dict, list of int, or UpdateSchedule, optional
        The steps that end with an update, where a period does not say it; see `DynamicSparsityAlgorithm`.
    stop : int, optional
        The optimizer step from which on nothing is rewired. A `drop_fraction` that is a number then falls
        from it to 0 as a cosine, which ends there; without `stop` it stays, and updates go on.
        The schedule of the sparsity must have ended by then.
    seed : int
        Nothing is drawn; kept for a common interface.
    scope : {"network", "layer"}
        Whether the schedule holds for the network or for each layer.
    drop : DropScore, optional
        By default `Magnitude`.
    grad_accumulation : int
        Backward passes per optimizer step; the gradient is the sum over them.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range, or the sparsity constant.

    Notes
    -----
    The gradient's largest entries are exact; see `GradientGrowth` for how they are found without the whole
    gradient. Each layer keeps at least one connection. A layer that no backward pass reached, or whose
    gradient is not finite, keeps its topology and stands outside the total until it is reached again.
    Memory beside the layers: O(nnz) and one block of the gradient.

    The paper updates every 1000 steps on CIFAR, every 4000 on ImageNet. The released code decides ties at its
    threshold one way for one data set and the other for another; here counts are exact, and equal scores keep
    the earlier layer and the lower position.

    References
    ----------
    Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS 2021,
    section 4, Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from sparselab.dst import GraNet, PolynomialSchedule
    >>> from sparselab.nn import SparseLinear
    >>> layers = SparseLinear(64, 32, sparsity=0.5), torch.nn.ReLU(), SparseLinear(32, 8, sparsity=0.5)
    >>> model = torch.nn.Sequential(*layers)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> algorithm = GraNet(PolynomialSchedule(0.5, 0.9, stop=20), update_freq=10, stop=40)
    >>> handle = algorithm.attach(model, optimizer)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 64)).square().mean().backward()
    ...     optimizer.step()
    >>> model[0].nnz + model[2].nnz
    230
    """

    def __init__(
        self,
        sparsity: Schedule | Callable[[int], float],
        *,
        drop_fraction: float | Schedule | Callable[[int], float] = 0.5,
        update_freq: int | None = None,
        update: Mapping[str, Any] | Sequence[int] | UpdateSchedule | None = None,
        stop: int | None = None,
        seed: int = 0,
        scope: Literal["layer", "network"] = "network",
        drop: DropScore | None = None,
        grad_accumulation: int = 1,
    ) -> None:
        budget = Prune(sparsity, annealed(drop_fraction, update, stop))
        whole = Regenerate(budget) if scope == "network" else as_selection(scope, ("layer", "network"))
        super().__init__(
            budget,
            update_freq=update_freq,
            update=update,
            stop=stop,
            seed=seed,
            scope=whole,
            drop=drop,
            grow=GradientGrowth(grad_accumulation),
        )


class Regenerate(NetworkSelection):
    """The network drops what its schedule says; then each layer replaces a fraction of what it has left.

    Parameters
    ----------
    budget : Exchange
        Of the algorithm.
    """

    def __init__(self, budget: Exchange) -> None:
        self._budget = budget

    def select(self, context: UpdateContext) -> list[LayerUpdate]:
        """What happens to each layer."""
        nnz = sum(view.nnz for view in context.views)
        pruned = lowest_of_network(context.scores, nnz - context.network_targets()[1])
        updates = []
        for view, scores, gone in zip(context.views, context.scores, pruned, strict=True):
            n_new = self._budget.exchanged(view.step, view.nnz - gone.size)
            # What the network drops comes first in the layer's own order too.
            updates.append(LayerUpdate(view, lowest(scores, gone.size + n_new), n_new))
        return updates

    def most_growth(
        self, views: Sequence[LayerView], index: int, budget: Budget, redistribute: Redistribution | None
    ) -> int | Array:
        """As if the layer lost nothing to the schedule."""
        return self._budget.exchanged(views[index].step, views[index].nnz)
