"""Cannistraci-Hebb training, soft rule: drop by weight and chance, grow by the paths of the topology."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sparselab.dst.budget.targets import Exchange
from sparselab.dst.checks import require_finite
from sparselab.dst.engine.describe import setting
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.parts.drop import DropScore, RelativeImportance, Scores, Soft, lowest
from sparselab.dst.parts.grow_paths import PathGrowth
from sparselab.dst.parts.grown import GrownValue
from sparselab.dst.parts.select import LayerSelection, UpdateContext
from sparselab.dst.schedules.schedule import Schedule, SigmoidSchedule
from sparselab.dst.schedules.when import UpdateSchedule
from sparselab.dst.view import LayerView
from sparselab.kernels.arrays import Array
from sparselab.nn.follow.state_move import GrownState


class CHTs(DynamicSparsityAlgorithm):
    """Keep connections drawn in proportion to ``score ** T``, grow positions in proportion to CH2-L3n.

    No gradient is needed for either; see `Soft` and `PathGrowth` for the two draws.

    Parameters
    ----------
    sparsity : float, Schedule or None
        The sparsity that every attached layer must have; None leaves each layer its own. Where a schedule
        lowers the number of connections, those of least `prune` go first, surely; then `drop_fraction` of the
        others by chance.
    drop_fraction : float, Schedule or callable
        The paper replaces 0.3 in perceptrons once an epoch, and in language models 0.1, falling as a cosine,
        every 100 steps.
    update_freq : int, optional
        Optimizer steps between updates; 100 if `update` says nothing else.
    update : dict, list of int, or UpdateSchedule, optional
        The steps that end with an update, where a period does not say it; see `DynamicSparsityAlgorithm`.
    stop : int, optional
        The optimizer step from which on nothing is rewired.
    seed : int
        All random draws depend on ``(seed, layer, step)`` and nothing else.
    temperature : float, Schedule or callable
        T. It rises during training in the paper, for language models as ``LinearSchedule(1, 9, steps)``.
    score : DropScore, optional
        What the draw goes by: `Magnitude` by default, or `RelativeImportance`.
    prune : DropScore, optional
        What a schedule removes by; `RelativeImportance` by default.
    chains : sequence of (str, str)
        Names of two layers of which the second reads what the first puts out, unit by unit. After the drop, a
        unit between them without a connection on one side loses those on the other, too. The layers then grow
        to their number elsewhere. Nobody but the caller knows which layers these are, so none by default.
    grown_value, grown_state
        See `DynamicSparsityAlgorithm`.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range; at the first update also if `chains` names a
        layer that is not attached, or two whose sizes do not meet.

    Notes
    -----
    O(nnz) memory per update; time about ``nnz * (fan_in + fan_out)``, so it is meant for high sparsity.
    Departure: the authors' program for language models grows the highest scores, also under the name of the
    soft rule; here they are drawn, as in the paper. It also treats the heads of attention apart; here a layer
    is one. A unit that is cut off still puts out its bias.

    References
    ----------
    Zhang et al., "Brain network science modelling of sparse neural networks enables Transformers and LLMs to
    perform as fully connected", NeurIPS 2025, arXiv 2501.19107.

    Examples
    --------
    >>> import torch
    >>> from sparselab.dst import CHTs, LinearSchedule
    >>> from sparselab.nn import SparseLinear
    >>> model = torch.nn.Sequential(SparseLinear(64, 32, sparsity=0.8), torch.nn.ReLU(), SparseLinear(32, 16))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> algorithm = CHTs(temperature=LinearSchedule(1, 9, stop=10), update_freq=2, chains=[("0", "2")])
    >>> handle = algorithm.attach(model, optimizer)
    >>> for _ in range(2):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 64)).square().mean().backward()
    ...     optimizer.step()
    >>> [report.nnz for report in algorithm.last_update]
    [410, 51]
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
        temperature: float | Schedule | Callable[[int], float] = 1.0,
        score: DropScore | None = None,
        prune: DropScore | None = None,
        chains: Sequence[tuple[str, str]] = (),
        grown_value: float | GrownValue = 0.0,
        grown_state: GrownState = "young",
    ) -> None:
        prune = RelativeImportance() if prune is None else prune
        super().__init__(
            Exchange(sparsity, drop_fraction),
            update_freq=update_freq,
            update=update,
            stop=stop,
            seed=seed,
            scope=PruneThenDraw(prune, chains),
            drop=Soft(score, temperature),
            grow=PathGrowth(),
            grown_value=grown_value,
            grown_state=grown_state,
        )

    temperature = setting("drop", "temperature")
    score = setting("drop", "score")
    prune = setting("selection", "prune")
    chains = setting("selection", "chains")


class CHTss(CHTs):
    """`CHTs` that starts at half the connections, or another sparsity, and gives them up along a sigmoid.

    Parameters
    ----------
    sparsity : float
        The sparsity reached in the end.
    init : float
        The sparsity at first, which the layers should have.
    sparsity_stop : float
        The step from which on it is reached; the authors take four fifths of the training.
    steepness : float
        Of the sigmoid; see `SigmoidSchedule`.
    drop_fraction : float, Schedule or callable
        As of `CHTs`.
    update_freq : int, optional
        Optimizer steps between updates; 100 if `update` says nothing else.
    update : dict, list of int, or UpdateSchedule, optional
        The steps that end with an update, where a period does not say it; see `DynamicSparsityAlgorithm`.
    stop : int, optional
        The optimizer step from which on nothing is rewired.
    seed : int
        All random draws depend on ``(seed, layer, step)`` and nothing else.
    temperature : float, Schedule or callable
        T. It rises during training in the paper, for language models as ``LinearSchedule(1, 9, steps)``.
    score : DropScore, optional
        What the draw goes by: `Magnitude` by default, or `RelativeImportance`.
    prune : DropScore, optional
        What a schedule removes by; `RelativeImportance` by default.
    chains : sequence of (str, str)
        Names of two layers of which the second reads what the first puts out, unit by unit. After the drop, a
        unit between them without a connection on one side loses those on the other, too. The layers then grow
        to their number elsewhere. Nobody but the caller knows which layers these are, so none by default.
    grown_value, grown_state
        See `DynamicSparsityAlgorithm`.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range.

    References
    ----------
    As `CHTs`.

    Examples
    --------
    >>> CHTss(0.99, sparsity_stop=8000).sparsity
    SigmoidSchedule(init=0.5, final=0.99, stop=8000, steepness=6, start=0)
    """

    def __init__(
        self,
        sparsity: float,
        *,
        init: float = 0.5,
        sparsity_stop: float,
        steepness: float = 6,
        drop_fraction: float | Schedule | Callable[[int], float] = 0.3,
        update_freq: int | None = None,
        update: Mapping[str, Any] | Sequence[int] | UpdateSchedule | None = None,
        stop: int | None = None,
        seed: int = 0,
        temperature: float | Schedule | Callable[[int], float] = 1.0,
        score: DropScore | None = None,
        prune: DropScore | None = None,
        chains: Sequence[tuple[str, str]] = (),
        grown_value: float | GrownValue = 0.0,
        grown_state: GrownState = "young",
    ) -> None:
        for name, value in (("sparsity", sparsity), ("init", init)):
            require_finite(name, value)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
        super().__init__(
            SigmoidSchedule(init, sparsity, sparsity_stop, steepness),
            drop_fraction=drop_fraction,
            update_freq=update_freq,
            update=update,
            stop=stop,
            seed=seed,
            temperature=temperature,
            score=score,
            prune=prune,
            chains=chains,
            grown_value=grown_value,
            grown_state=grown_state,
        )


class PruneThenDraw(LayerSelection):
    """What a schedule takes away goes by one score, surely; then the draw decides, and chains are cut.

    Parameters
    ----------
    prune : DropScore
    chains : sequence of (str, str)
        See `CHTs`.
    """

    of_blocks = False

    def __init__(self, prune: DropScore, chains: Sequence[tuple[str, str]]) -> None:
        self.prune = prune
        self.chains = [(before, after) for before, after in chains]

    def drop(self, context: UpdateContext) -> list[Array]:
        """Slots that each layer loses."""
        drops = [
            self._drop(context, view, scores)
            for view, scores in zip(context.views, context.scores, strict=True)
        ]
        for before, after in self._linked(context):
            reading = _reached(context.views[after], drops[after], axis=1)
            drops[before] = _without_ends(context.views[before], drops[before], 0, reading)
            written = _reached(context.views[before], drops[before], axis=0)
            drops[after] = _without_ends(context.views[after], drops[after], 1, written)
        return drops

    def _drop(self, context: UpdateContext, view: LayerView, scores: Scores) -> Array:
        kept, total = context.targets(view)
        if total < view.nnz:
            scores[lowest(self.prune.checked(view), view.nnz - total)] = -np.inf
        return lowest(scores, view.nnz - kept)

    def _linked(self, context: UpdateContext) -> list[tuple[int, int]]:
        """The chains by number of view; without those of which a layer is not being updated."""
        views = {context.names[view.index]: number for number, view in enumerate(context.views)}
        found = []
        for before, after in self.chains:
            if missing := {before, after} - set(context.names):
                raise ValueError(f"chains must name attached layers {context.names}, got {sorted(missing)}")
            if before not in views or after not in views:
                continue
            pair = views[before], views[after]
            n_out, n_in = context.views[pair[0]].layer.shape[0], context.views[pair[1]].layer.shape[1]
            if n_out != n_in:
                raise ValueError(
                    f"chains must join layers where the second reads the first, got {before!r} with "
                    f"{n_out} outputs and {after!r} with {n_in} inputs"
                )
            found.append(pair)
        return found


def _ends(view: LayerView, axis: int) -> Array:
    """Row (axis 0) or column (axis 1) of each slot."""
    ends: Array = np.divmod(view.matrix.positions(), view.grid[1])[axis]
    return ends


def _reached(view: LayerView, drop: Array, axis: int) -> Array:
    """bool: which rows (axis 0) or columns (axis 1) keep a connection."""
    reached = np.zeros(view.grid[axis], np.bool_)
    reached[np.delete(_ends(view, axis), drop)] = True
    return reached


def _without_ends(view: LayerView, drop: Array, axis: int, alive: Array) -> Array:
    """The slots to drop, and those whose row (axis 0) or column (axis 1) is not alive; ascending."""
    dropped = ~alive[_ends(view, axis)]
    dropped[drop] = True
    return np.flatnonzero(dropped)
