"""RigL: drop the weakest connections, grow where the dense gradient is largest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from sparselab.dst.budget.targets import Exchange, annealed
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.parts.drop import DropScore
from sparselab.dst.parts.grow import GradientGrowth
from sparselab.dst.parts.grown import GrownValue
from sparselab.dst.parts.redistribute import Redistribution
from sparselab.dst.schedules.schedule import Schedule
from sparselab.dst.schedules.when import UpdateSchedule
from sparselab.nn.follow.state_move import GrownState


class RigL(DynamicSparsityAlgorithm):
    """Grow the positions of largest ``|G|``, ``G = dY^T X``, among all that are not kept.

    Parameters
    ----------
    sparsity : float, Schedule or None
        The sparsity that every attached layer must have; None leaves each layer its own. A schedule is where
        every update takes the layers to, whatever they had before.
    drop_fraction : float, Schedule or callable
        Fraction of the connections to replace, in ``[0, 1]``.
    update_freq : int, optional
        Optimizer steps between updates; 100 if `update` says nothing else.
    update : dict, list of int, or UpdateSchedule, optional
        The steps that end with an update, where a period does not say it; see `DynamicSparsityAlgorithm`.
    stop : int, optional
        The optimizer step from which on nothing is rewired. A `drop_fraction` that is a number then falls
        from it to 0 as a cosine, which ends there; without `stop` it stays, and updates go on.
    seed : int
        Nothing is drawn, unless by parts of one's own.
    scope, drop, redistribute, grown_value, grown_state
        See `DynamicSparsityAlgorithm`.
    grad_accumulation : int
        Backward passes per optimizer step; G is the sum over them.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range.

    Notes
    -----
    The selection is exact and layer-wide; see `GradientGrowth` for how G is formed. The update follows the
    optimizer step, where the paper puts it in place of the step, and weights are ranked after it. A layer
    that no backward pass reached, or whose gradient is not finite, keeps its topology; ``last_update`` says
    so. Where several processes hold replicas, the gradient is the mean over all of them; see `Replicas`.

    The paper's settings are the defaults with `stop` at three quarters of the training. Those of Liu et al.,
    "Do we actually need dense over-parameterization?" (ICML 2021), explore longer, with updates further apart
    and to the end: ``drop_fraction=CosineSchedule(0.5, steps, minimum=0.005), update_freq=1000``.

    References
    ----------
    Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, section 3, Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from sparselab.dst import RigL
    >>> from sparselab.nn import SparseLinear
    >>> model = torch.nn.Sequential(SparseLinear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> algorithm = RigL(sparsity=0.9, drop_fraction=0.3, update_freq=10, stop=40)
    >>> _ = model.apply(algorithm)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 64)).square().mean().backward()
    ...     optimizer.step()
    ...     algorithm.step()
    >>> algorithm.last_update[0].grown, model[0].nnz
    (30, 205)
    """

    def __init__(
        self,
        sparsity: float | Schedule | None = None,
        *,
        drop_fraction: float | Schedule | Callable[[int], float] = 0.3,
        update_freq: int | None = None,
        update: Mapping[str, Any] | Sequence[int] | UpdateSchedule | None = None,
        stop: int | None = None,
        seed: int = 0,
        scope: Literal["layer", "network", "row"] = "layer",
        drop: DropScore | None = None,
        redistribute: Redistribution | None = None,
        grown_value: float | GrownValue = 0.0,
        grown_state: GrownState = "young",
        grad_accumulation: int = 1,
    ) -> None:
        super().__init__(
            Exchange(sparsity, annealed(drop_fraction, update, stop)),
            update_freq=update_freq,
            update=update,
            stop=stop,
            seed=seed,
            scope=scope,
            drop=drop,
            grow=GradientGrowth(grad_accumulation),
            redistribute=redistribute,
            grown_value=grown_value,
            grown_state=grown_state,
        )
