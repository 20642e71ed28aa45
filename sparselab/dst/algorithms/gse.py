"""Guided stochastic exploration: grow by gradient, but look at a sample of positions only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from sparselab.dst.budget.targets import Exchange, annealed
from sparselab.dst.engine.describe import setting
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.parts.drop import DropScore
from sparselab.dst.parts.grow_sampled import SampledGradientGrowth, Sampler
from sparselab.dst.parts.grown import GrownValue
from sparselab.dst.parts.redistribute import Redistribution
from sparselab.dst.parts.select import as_selection
from sparselab.dst.schedules.schedule import Schedule
from sparselab.dst.schedules.when import UpdateSchedule
from sparselab.dst.view import LayerUpdate
from sparselab.kernels.rewiring.topk import largest
from sparselab.nn.follow.state_move import GrownState


class GSE(DynamicSparsityAlgorithm):
    """Grow the positions of largest ``|G|`` in a random sample S, then drop as many of smallest ``|w|``.

    Of nnz connections ``min(ceil(f * nnz), |S|)`` are replaced, ``f = drop_fraction(t)``. What is grown has
    no weight before, so it is never what is dropped, and what is dropped does not grow back at once.

    Parameters
    ----------
    sparsity : float, Schedule or None
        The sparsity that every attached layer must have; None leaves each layer its own. A schedule is where
        every update takes the layers to, whatever they had before.
    drop_fraction : float, Schedule or callable
        The paper lets it fall from 0.2 to 0, after three fifths of the training: ``stop=0.6 * steps``.
    update_freq : int, optional
        Optimizer steps between updates; 100 if `update` says nothing else.
    update : dict, list of int, or UpdateSchedule, optional
        The steps that end with an update, where a period does not say it; see `DynamicSparsityAlgorithm`.
    stop : int, optional
        The optimizer step from which on nothing is rewired. A `drop_fraction` that is a number then falls
        from it to 0 as a cosine, which ends there; without `stop` it stays, and updates go on.
    seed : int
        Also decides the samples: they depend on it, the layer and the step.
    scope : {"layer", "network"}
        With "network", the default of the authors' program, weights are ranked over all layers together, and
        so are the gradients of their samples (unless `redistribute` says how many each layer grows).
    gamma : float
        Sampled pairs per connection; 1 for CIFAR and 2 for ImageNet in the paper.
    sampler : {"uniform", "grabo", "graest"}
        What guides the sample; see `SampledGradientGrowth`.
    drop, redistribute, grown_value, grown_state
        See `DynamicSparsityAlgorithm`.
    grad_accumulation : int
        Backward passes per optimizer step; G is the sum over them.

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
    >>> algorithm = GSE(sparsity=0.9, update_freq=2, sampler="grabo")
    >>> handle = algorithm.attach(model, optimizer)
    >>> for _ in range(2):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 64)).square().mean().backward()
    ...     optimizer.step()
    >>> algorithm.last_update[0].grown, model[0].nnz
    (41, 205)
    """

    def __init__(
        self,
        sparsity: float | Schedule | None = None,
        *,
        drop_fraction: float | Schedule | Callable[[int], float] = 0.2,
        update_freq: int | None = None,
        update: Mapping[str, Any] | Sequence[int] | UpdateSchedule | None = None,
        stop: int | None = None,
        seed: int = 0,
        scope: Literal["layer", "network"] = "layer",
        gamma: float = 1.0,
        sampler: Sampler = "uniform",
        drop: DropScore | None = None,
        redistribute: Redistribution | None = None,
        grown_value: float | GrownValue = 0.0,
        grown_state: GrownState = "young",
        grad_accumulation: int = 1,
    ) -> None:
        growth = SampledGradientGrowth(gamma, sampler, grad_accumulation)
        selection = as_selection(scope, ("layer", "network"))
        if redistribute is None and scope == "network":
            redistribute = BySample(growth)
        super().__init__(
            RoundedUp(sparsity, annealed(drop_fraction, update, stop)),
            update_freq=update_freq,
            update=update,
            stop=stop,
            seed=seed,
            scope=selection,
            drop=drop,
            grow=growth,
            redistribute=redistribute,
            grown_value=grown_value,
            grown_state=grown_state,
        )

    gamma = setting("grow", "gamma")
    sampler = setting("grow", "sampler")


class RoundedUp(Exchange):
    """As `Exchange`, but rounded up."""

    def exchanged(self, step: int, n: int) -> int:
        """How many of `n` connections are replaced."""
        return math.ceil(self.fraction(step) * n)


class BySample(Redistribution):
    """The largest gradients of all samples together grow, whichever layer they are in.

    Parameters
    ----------
    growth : SampledGradientGrowth
        Whose samples they are.
    """

    def __init__(self, growth: SampledGradientGrowth) -> None:
        self._growth = growth

    def shares(self, updates: Sequence[LayerUpdate], n_grow: int, caps: Sequence[int]) -> list[int]:
        """How many connections each layer grows."""
        scores = [self._growth.gradient(update.view).free_scores for update in updates]
        ends = np.cumsum([0, *(layer.size for layer in scores)])
        best = largest(np.concatenate(scores), n_grow)
        return [int(n) for n in np.diff(np.searchsorted(best, ends))]
