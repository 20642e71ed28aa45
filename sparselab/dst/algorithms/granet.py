"""GraNet: prune the network gradually, and let each layer regenerate what it lost elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from sparselab.dst.algorithms.gmp import GMP
from sparselab.dst.parts.drop import DropScore, lowest, lowest_of_network
from sparselab.dst.parts.grow import GradientGrowth
from sparselab.dst.parts.view import LayerView, Vacancy, total_size
from sparselab.dst.schedules.schedule import Schedule
from sparselab.dst.schedules.when import UpdateSchedule


class GraNet(GMP):
    """Prune by magnitude over all layers together, then replace the weakest of each layer by gradient.

    An update at step t first drops the smallest ``|w|`` of the network down to ``sparsity(t)``. Then each
    layer drops the fraction ``drop_fraction(t)`` of what it has left, again the smallest, and grows as many
    where ``|dY^T X|`` is largest among all positions that are not kept. The second part goes on when the
    schedule of the first has ended. Both are one change of topology: what is dropped and grown again keeps
    its weight and its optimizer state.

    Parameters
    ----------
    sparsity : Schedule or callable
        As of `GMP`, of all layers together. The paper's is ``Polynomial(init, final, steps)``, beginning
        either dense (0) or with layers of sparsity 0.5 shared out by ERK (see `allocate`).
    drop_fraction : float, Schedule or callable
        Neuroregeneration, in ``[0, 1]``. The paper's is ``Cosine(0.5, steps, minimum=0.005)`` over the whole
        training; the default stays at 0.5.
    update : int, mapping, list of int, or UpdateSchedule
        The steps that end with an update: 1000 apart, as the paper's on CIFAR (4000 on ImageNet).
    seed : int
        Nothing is drawn; kept for a common interface.
    grad_accumulation : int
        Backward passes per optimizer step; the gradient is the sum over them.
    scope : {"network", "layer"}
        Whether the schedule holds for the network or for each layer.
    drop : DropScore, optional
        By default `Magnitude`.

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

    The released code decides ties at its threshold one way for one data set and the other for another; here
    counts are exact, and equal scores keep the earlier layer and the lower position.

    References
    ----------
    Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS 2021,
    section 4, Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from sparselab.dst import Cosine, GraNet, Polynomial
    >>> from sparselab.nn import SparseLinear
    >>> layers = SparseLinear(64, 32, sparsity=0.5), torch.nn.ReLU(), SparseLinear(32, 8, sparsity=0.5)
    >>> model = torch.nn.Sequential(*layers)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> algorithm = GraNet(Polynomial(0.5, 0.9, steps=20), Cosine(0.5, 40, minimum=0.005), update=10)
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
        drop_fraction: float | Schedule | Callable[[int], float] = 0.5,
        update: int | Mapping[str, Any] | list[int] | tuple[int, ...] | UpdateSchedule = 1000,
        seed: int = 0,
        *,
        grad_accumulation: int = 1,
        scope: Literal["layer", "network"] = "network",
        drop: DropScore | None = None,
    ) -> None:
        grow = GradientGrowth(grad_accumulation)
        super().__init__(sparsity, drop_fraction, update, seed, grow=grow, scope=scope, drop=drop)

    def _plan(self, views: Sequence[LayerView], step: int) -> list[Vacancy]:
        if self.scope == "layer":
            return super()._plan(views, step)
        nnz = sum(view.nnz for view in views)
        scores = [self.drop(view) for view in views]
        pruned = lowest_of_network(scores, nnz - self._total(step, nnz, total_size(views)))
        plan = []
        for view, own, gone in zip(views, scores, pruned, strict=True):
            n_new = int(self._fraction(step) * (view.nnz - gone.size))
            # What the network drops comes first in the layer's own order too.
            plan.append(Vacancy(view, lowest(own, gone.size + n_new), n_new))
        return plan

    def _most_growth(self, step: int, index: int) -> int:
        return int(self._fraction(step) * self._layers[index].nnz)
