"""Guided stochastic exploration: grow by gradient, but look at a sample of positions only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.parts.grow_sampled import SampledGradientGrowth, Sampler
from sparselab.dst.parts.view import Vacancy
from sparselab.dst.schedules.schedule import Schedule
from sparselab.kernels.rewiring.topk import largest


class GSE(DynamicSparsityAlgorithm):
    """Grow the positions of largest ``|G|`` in a random sample S, then drop as many of smallest ``|w|``.

    Of nnz connections ``min(ceil(f * nnz), |S|)`` are replaced, ``f = drop_fraction(t)``. What is grown has
    no weight before, so it is never what is dropped, and what is dropped does not grow back at once.

    Parameters
    ----------
    sparsity : float, Schedule or None
        See `DynamicSparsityAlgorithm`.
    drop_fraction : float, Schedule or callable
        The paper lets it fall from 0.2 to 0: ``Cosine(0.2, half_period)``, `half_period` after three fifths
        of the training.
    update : int, mapping, sequence of int, or UpdateSchedule
        The steps that update.
    seed : int
        Also decides the samples: they depend on it, the layer and the step.
    gamma : float
        Sampled pairs per connection; 1 for CIFAR and 2 for ImageNet in the paper.
    sampler : {"uniform", "grabo", "graest"}
        What guides the sample; see `SampledGradientGrowth`.
    grad_accumulation : int
        Backward passes per optimizer step; G is the sum over them.
    settings
        See `DynamicSparsityAlgorithm`. With ``scope="network"``, the default of the authors' program, weights
        are ranked over all layers together, and so are the gradients of their samples (unless `redistribute`
        says how many each layer grows).

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range.

    Notes
    -----
    ``|S| * n_tokens`` multiply-adds and O(nnz) memory per update: the gradient is formed at the sample,
    inside the backward pass, and nowhere else. Layers of sparsity 0.5 or less, where a sample saves nothing,
    are ranked by their whole gradient.

    Departures: G is that of the training step itself, where the authors draw ten further examples of each
    class for it; the signs of "graest" are independent, theirs a hash that is 4-wise independent. A layer
    whose operands are not finite keeps its topology.

    References
    ----------
    Heddes et al., "Always-Sparse Training by Growing Connections with Guided Stochastic Exploration", 2024,
    arXiv 2401.06898; counts and defaults also from the authors' program.

    Examples
    --------
    >>> import torch
    >>> from sparselab.dst import GSE
    >>> from sparselab.nn import SparseLinear
    >>> model = torch.nn.Sequential(SparseLinear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> algorithm = GSE(sparsity=0.9, update=2, sampler="grabo")
    >>> handle = algorithm.attach(model, optimizer)
    >>> for _ in range(2):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 64)).square().mean().backward()
    ...     optimizer.step()
    >>> algorithm.last_update[0].grown, model[0].nnz
    (41, 205)
    """

    _SCOPES = ("layer", "network")
    grow: SampledGradientGrowth

    def __init__(
        self,
        sparsity: float | Schedule | None = None,
        drop_fraction: Any = 0.2,
        update: Any = 1000,
        seed: int = 0,
        *,
        gamma: float = 1.0,
        sampler: Sampler = "uniform",
        grad_accumulation: int = 1,
        **settings: Any,
    ) -> None:
        growth = SampledGradientGrowth(gamma, sampler, grad_accumulation)
        super().__init__(sparsity, drop_fraction, update, seed, grow=growth, **settings)

    def _exchanged(self, step: int, kept: int) -> int:
        return math.ceil(self._fraction(step) * kept)

    def _allot(self, vacancies: Sequence[Vacancy], step: int) -> list[int]:
        shares = super()._allot(vacancies, step)
        if self.scope == "layer" or self.redistribute is not None or not vacancies:
            return shares
        scores = [self.grow.scores(vacancy.view.index) for vacancy in vacancies]
        ends = np.cumsum([0, *(layer.size for layer in scores)])
        best = largest(np.concatenate(scores), sum(shares))
        return [int(n) for n in np.diff(np.searchsorted(best, ends))]
