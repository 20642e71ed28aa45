"""Gradual magnitude pruning: ever fewer connections, the largest of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.schedules.schedule import Constant, Schedule, as_schedule
from sparselab.dst.schedules.when import UpdateSchedule


class GMP(DynamicSparsityAlgorithm):
    """Every so often, drop the smallest ``|w|`` down to what a sparsity schedule says; grow nothing.

    Parameters
    ----------
    sparsity : Schedule or callable
        Of each layer, or of all together if the scope is the network; called with the step. The paper's is
        ``Polynomial(init, final, steps)``. It must not be constant. Layers start as dense as they were
        built, and one that has fewer connections than the schedule says keeps them.
    drop_fraction : float, Schedule or callable
        Fraction of what the schedule leaves to replace at each update, as `DynamicSparsityAlgorithm` does.
        0, the default, is the paper's algorithm.
    update : int, mapping, list of int, or UpdateSchedule
        The steps that end with an update. Pruning ends with the last of them: let one come at or after the
        step at which the schedule reaches its final value.
    seed : int
        Draws nothing unless something is grown.
    **settings
        `scope` and other parts; see `DynamicSparsityAlgorithm`.

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
    >>> from sparselab.dst import GMP, Polynomial
    >>> from sparselab.nn import SparseLinear
    >>> model = torch.nn.Sequential(SparseLinear(64, 32, sparsity=0.0))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> algorithm = GMP(Polynomial(0.0, 0.9, steps=20), update=10)
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
        drop_fraction: float | Schedule | Callable[[int], float] = 0.0,
        update: int | Mapping[str, Any] | list[int] | tuple[int, ...] | UpdateSchedule = 100,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        if isinstance(schedule := as_schedule(sparsity), Constant):
            raise ValueError(
                f"sparsity must be a schedule that changes, such as Polynomial(0.0, 0.9, steps), for "
                f"{type(self).__name__}, which prunes while it trains; got the constant {schedule.value!r}"
            )
        super().__init__(schedule, drop_fraction, update, seed, **settings)

    def _total(self, step: int, nnz: int, size: int) -> int:
        return min(nnz, super()._total(step, nnz, size))
