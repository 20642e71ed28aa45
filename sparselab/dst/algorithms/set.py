"""Sparse evolutionary training: drop the weakest connections, grow random ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from sparselab.dst.budget.targets import Exchange
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.parts.drop import DropScore
from sparselab.dst.parts.grown import GrownValue
from sparselab.dst.parts.redistribute import Redistribution
from sparselab.dst.schedules.schedule import Schedule
from sparselab.dst.schedules.when import UpdateSchedule
from sparselab.nn.follow.state_move import GrownState


class SET(DynamicSparsityAlgorithm):
    """Drop the smallest ``|w|``, grow uniformly at random among all positions that are not kept.

    Parameters
    ----------
    sparsity : float, Schedule or None
        The sparsity that every attached layer must have; None leaves each layer its own. A schedule is where
        every update takes the layers to, whatever they had before.
    drop_fraction : float, Schedule or callable
        Fraction of the connections to replace, in ``[0, 1]``. It stays, as in the paper, unless a schedule
        says otherwise.
    update_freq : int, optional
        Optimizer steps between updates; 100 if `update` says nothing else.
    update : dict, list of int, or UpdateSchedule, optional
        The steps that end with an update, where a period does not say it; see `DynamicSparsityAlgorithm`.
    stop : int, optional
        The optimizer step from which on nothing is rewired.
    seed : int
        All random draws depend on ``(seed, layer, step)`` and nothing else.
    scope, drop, redistribute, grown_value, grown_state
        See `DynamicSparsityAlgorithm`.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range.

    Notes
    -----
    O(nnz) memory and time per update. Three departures from the original: weights are dropped by ``|w|`` over
    the layer, not by sign (``drop=SignedMagnitude()`` does); grown weights start at zero, not at a small
    random number (``grown_value=Normal(0.1)`` does); and updates are counted in steps, not epochs. These are
    the conventions of the RigL paper, so that the two differ in growth only.

    References
    ----------
    Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired
    by network science", Nature Communications 9:2383 (2018), Algorithm 1.
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
    ) -> None:
        super().__init__(
            Exchange(sparsity, drop_fraction),
            update_freq=update_freq,
            update=update,
            stop=stop,
            seed=seed,
            scope=scope,
            drop=drop,
            redistribute=redistribute,
            grown_value=grown_value,
            grown_state=grown_state,
        )
