"""Gradual magnitude pruning: ever fewer connections, the largest of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from sparselab.dst.budget.targets import Prune
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.parts.drop import DropScore
from sparselab.dst.parts.select import as_selection
from sparselab.dst.schedules.schedule import Schedule
from sparselab.dst.schedules.when import UpdateSchedule


class GMP(DynamicSparsityAlgorithm):
    """Every so often, drop the smallest ``|w|`` down to what a sparsity schedule says; grow nothing.

    Parameters
    ----------
    sparsity : Schedule or callable
        Of each layer, or of all together if the scope is the network; called with the step. The paper's is
        ``PolynomialSchedule(init, final, stop)``. It must not be constant. Layers start as dense as they were
        built, and one that has fewer connections than the schedule says keeps them.
    update_freq : int, optional
        Optimizer steps between updates; 100 if `update` says nothing else.
    update : dict, list of int, or UpdateSchedule, optional
        The steps that end with an update, where a period does not say it; see `DynamicSparsityAlgorithm`.
    stop : int, optional
        The optimizer step from which on nothing is pruned: after an update that has the final sparsity.
    seed : int
        Nothing is drawn; kept for a common interface.
    scope : {"layer", "network"}
        Whether the schedule holds for each layer or for the network.
    drop : DropScore, optional
        By default `Magnitude`.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range, or the sparsity constant.

    Notes
    -----
    Nothing is stored for a weight that was pruned, so layers get smaller and faster as they are pruned; a
    pruned weight never comes back. In the paper's code masked weights may, since the mask is made anew from
    all weights at every update, but they are still zero then. O(nnz) memory and time per update. A
    `SparseLinear` of sparsity 0 takes more memory than a dense layer; begin with a dense model and `sparsify`
    it where it is already sparse if that matters.

    References
    ----------
    Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017,
    section 3, equation 1.

    Examples
    --------
    >>> import torch
    >>> from sparselab.dst import GMP, PolynomialSchedule
    >>> from sparselab.nn import SparseLinear
    >>> model = torch.nn.Sequential(SparseLinear(64, 32, sparsity=0.0))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> algorithm = GMP(PolynomialSchedule(0.0, 0.9, stop=20), update_freq=10)
    >>> handle = algorithm.attach(model, optimizer)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 64)).square().mean().backward()
    ...     optimizer.step()
    ...     if algorithm.steps_done % 10 == 0:
    ...         print(model[0].nnz)
    435
    205
    """

    def __init__(
        self,
        sparsity: Schedule | Callable[[int], float],
        *,
        update_freq: int | None = None,
        update: Mapping[str, Any] | Sequence[int] | UpdateSchedule | None = None,
        stop: int | None = None,
        seed: int = 0,
        scope: Literal["layer", "network"] = "layer",
        drop: DropScore | None = None,
    ) -> None:
        super().__init__(
            Prune(sparsity),
            update_freq=update_freq,
            update=update,
            stop=stop,
            seed=seed,
            scope=as_selection(scope, ("layer", "network")),
            drop=drop,
        )
