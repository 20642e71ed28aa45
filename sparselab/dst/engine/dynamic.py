"""The drop-grow loop: when to update, what each layer loses and gains, and what follows the connections."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from sparselab.dst.budget.targets import Budget, Exchange
from sparselab.dst.checks import require_count, require_of_blocks
from sparselab.dst.engine.asking import NOTHING, MostGrowth, warn_if_stuck
from sparselab.dst.engine.base import SparsityAlgorithm
from sparselab.dst.engine.describe import setting
from sparselab.dst.engine.optimizer_state import OptimizerTracker
from sparselab.dst.engine.together import CommonUpdate, settings_of
from sparselab.dst.parts.drop import DropScore, Magnitude
from sparselab.dst.parts.grow import Growth, RandomGrowth
from sparselab.dst.parts.grown import GrownValue, as_grown_value, check_grown_state
from sparselab.dst.parts.redistribute import Redistribution
from sparselab.dst.parts.select import Selection, UpdateContext, as_selection
from sparselab.dst.replicas import Ranks, find_ranks
from sparselab.dst.schedules.schedule import Schedule
from sparselab.dst.schedules.when import UpdateSchedule, when_to_update
from sparselab.dst.view import LayerUpdate, LayerView, UpdateReport
from sparselab.kernels.arrays import Array
from sparselab.nn.follow.state_move import GrownState, StateMove
from sparselab.nn.layers.base import SparseLayer

UpdateHook = Callable[["DynamicSparsityAlgorithm"], None]


class DynamicSparsityAlgorithm(SparsityAlgorithm):
    """Every so often, drop the weakest connections and grow others elsewhere.

    An update scores the connections (`drop`), drops the lowest and says how many come instead (`budget`,
    `scope`, `redistribute`), and chooses where (`grow`) and with what they start. Named algorithms are
    choices of these parts, and so is an algorithm of one's own: see the example.

    Parameters
    ----------
    budget : Budget, optional
        How many stay and come, which includes the sparsity; by default `Exchange`.
    update_freq : int, optional
        Optimizer steps between updates; 100 if `update` says nothing else.
    update : dict, list of int, or UpdateSchedule, optional
        The optimizer steps (the first is 1) that end with an update, where a period does not say it:
        ``{"freq", "start", "stop"}``, or a list of steps.
    stop : int, optional
        The optimizer step from which on nothing is rewired.
    seed : int
        All random draws depend on ``(seed, layer, step)`` and nothing else.
    scope : {"layer", "network", "row"} or Selection
        Whether the lowest scores are those of each layer, of all layers together, or of each row, that is, of
        the connections of one output. In a network each layer keeps at least one connection. By rows, each
        row loses a share of what the layer drops in proportion to its connections (the largest remainders
        round up) and grows as many, so all rows keep their number; where a schedule changes the layer's, the
        rows share the new one in proportion.
    drop : DropScore, optional
        The score; by default `Magnitude`.
    grow : Growth, optional
        Where to grow; by default `RandomGrowth`.
    redistribute : Redistribution, optional
        How growth is shared among layers. By default each layer, and always each row, regrows what it lost.
    grown_value : float or callable
        Weight of a new connection: a number, or a function of ``(LayerUpdate, positions)`` that returns one
        for each; see `sparselab.dst.parts.grown`.
    grown_state : {"young", "zero", "mean"} or Young
        Optimizer state of a new connection: 0, or the mean over the layer's surviving connections. With
        "young" Adam, AdamW, NAdam, RAdam and Adamax correct a new connection for bias by the steps that it
        has taken itself; with "zero" by all of theirs, as papers before SMET (arXiv 2606.00888) do, so that
        its first moves are up to 6.6 times as large as a weight's of their first steps. See
        `sparselab.nn.follow.bias_correction`; of other optimizers both are the same. ``Young(warmup=100)``
        also lets moves of new connections grow over so many steps.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or out of range, or a part does not go with ``scope="row"``.

    Notes
    -----
    Connections are kept in the order ``(score descending, position ascending)``, so ties, which are common
    among grown weights that are still zero, never change a count. NaN counts as the lowest score. A
    connection that was just dropped may grow back, and then keeps its weight and its optimizer state. Layers
    whose weights do not require a gradient are left alone.

    Optimizers are found by a hook that torch calls after every ``optimizer.step()``; see `track` for others.
    Every state tensor with one number per weight is moved; another one is an error as early as it can be
    known: when the optimizer is attached, before its first step, or after it.

    Examples
    --------
    RigL's growth, with connections that move to the layers whose weights are largest:

    >>> from sparselab.dst import ByMagnitude, DynamicSparsityAlgorithm, Exchange, GradientGrowth
    >>> class Wandering(DynamicSparsityAlgorithm):
    ...     def __init__(self, sparsity=None, *, drop_fraction=0.3, update_freq=100, stop=None):
    ...         super().__init__(
    ...             Exchange(sparsity, drop_fraction), update_freq=update_freq, stop=stop,
    ...             grow=GradientGrowth(), redistribute=ByMagnitude(),
    ...         )
    >>> Wandering(0.9, stop=750)
    Wandering(sparsity=0.9, drop_fraction=0.3, update_freq=100, stop=750) of 0 layers after 0 steps
    """

    def __init__(
        self,
        budget: Budget | None = None,
        *,
        update_freq: int | None = None,
        update: Mapping[str, Any] | Sequence[int] | UpdateSchedule | None = None,
        stop: int | None = None,
        seed: int = 0,
        scope: Literal["layer", "network", "row"] | Selection = "layer",
        drop: DropScore | None = None,
        grow: Growth | None = None,
        redistribute: Redistribution | None = None,
        grown_value: float | GrownValue = 0.0,
        grown_state: GrownState = "young",
    ) -> None:
        self.budget = Exchange() if budget is None else budget
        super().__init__(self.budget.sparsity)
        self.update, self.stop = when_to_update(update_freq, update, stop)
        self._check_horizon()
        self._warn_if_idle()
        self.seed = require_count("seed", seed)
        self.drop = Magnitude() if drop is None else drop
        self.grow = RandomGrowth() if grow is None else grow
        self.redistribute = redistribute
        self.selection = as_selection(scope)
        if self.scope == "row" and not (self.grow.by_row and redistribute is None):
            raise ValueError(
                f'scope="row" needs a growth that chooses by row and no redistribution, got '
                f"{self.grow.describe()} and {redistribute and redistribute.describe()}"
            )
        self.grown_value = grown_value
        self._start = as_grown_value(grown_value)
        self.grown_state = check_grown_state(grown_state)
        self.parts |= {"budget": self.budget, "drop": self.drop, "selection": self.selection}
        self.parts |= {"grow": self.grow} | ({} if redistribute is None else {"redistribute": redistribute})
        self._tracker = OptimizerTracker(self._layers, self.grow.settle, self._may_update)
        self._hooks: OrderedDict[int, UpdateHook] = OrderedDict()

    drop_fraction = setting("budget", "drop_fraction")

    @property
    def update_freq(self) -> int | None:
        """Optimizer steps between updates; None where no period says it."""
        return getattr(self.update, "freq", None)

    @property
    def scope(self) -> str:
        """Among which connections scores are ranked: "layer", "network" or "row"."""
        return self.selection.scope

    def __repr__(self) -> str:
        return super().__repr__() + (", no stop: updates go on" if self.stop is None else "")

    def _check_horizon(self) -> None:
        """Raise ValueError if a sparsity schedule cannot end before the updates do."""
        end = getattr(self.sparsity, "stop", None)
        if self.stop is None or not isinstance(self.sparsity, Schedule) or end is None:
            return
        last = next((step for step in range(self.stop - 1, 0, -1) if self.update(step)), 0)
        if last < end:
            raise ValueError(
                f"stop must leave an update at step {end} or later, where sparsity reaches its final value, "
                f"got stop={self.stop}, before which the last update is at step {last}, with sparsity "
                f"{self.sparsity(last):.6g}"
            )

    def _warn_if_idle(self) -> None:
        if self.stop and not any(self.update(step) for step in range(1, self.stop)):
            warnings.warn(
                f"no update will ever come: update={self.update} has no step before stop={self.stop}; give "
                f"update_freq a smaller number",
                stacklevel=4,
            )

    def _check_layer(self, layer: SparseLayer) -> None:
        if layer.block_shape != (1, 1):
            require_of_blocks(type(self).__name__, layer.block_shape, self.parts.values())
        if layer.stored.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"layers to rewire must have weights of float32 or float64, got {layer.stored.dtype}: small "
                f"updates would be lost to its rounding. Keep them in float32, and compute in bfloat16 under "
                f"torch.autocast"
            )
        self.budget.check(layer)

    def track(self, optimizer: Optimizer) -> None:
        """Name an optimizer whose state must follow the connections.

        Only needed for one that torch does not report: that does not derive from ``torch.optim.Optimizer``,
        or whose state was loaded and which has not stepped since. Held weakly.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer
            Or any object with the same ``param_groups`` and ``state``.

        Raises
        ------
        TypeError
            If it has no ``param_groups`` and ``state``.
        RuntimeError
            If it keeps state that cannot follow the connections.
        """
        self._tracker.add(optimizer)
        self._tracker.check_follows(optimizer, self._layers)

    def _check_follows(self, optimizer: Optimizer, layers: Iterable[SparseLayer]) -> None:
        self._tracker.check_follows(optimizer, layers)

    def _may_update(self) -> bool:
        """Whether any step from now on may end with an update."""
        return self.stop is None or self._step + 1 < self.stop

    def is_update_step(self, step: int) -> bool:
        """Whether optimizer step number `step` (the first is 1) ends with an update."""
        return (self.stop is None or step < self.stop) and self.update(step)

    @property
    def grad_accumulation(self) -> int:
        """Backward passes per optimizer step, as declared; 1 where no gradient is looked at."""
        return self.grow.grad_accumulation

    def expect_passes(self, passes: int) -> None:
        """Say how many backward passes the optimizer step under way sums over, and those after it."""
        self.grow.expect_passes(passes)

    def register_update_hook(self, hook: UpdateHook) -> RemovableHandle:
        """Call ``hook(algorithm)`` after every update, when `last_update` and `steps_done` tell of it.

        Returns
        -------
        torch.utils.hooks.RemovableHandle
            Its ``remove()`` ends the calls.
        """
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def advance(self) -> None:
        """Do what `step` does, whoever asks."""
        self._find_ranks()
        super().advance()
        if self.is_update_step(self._step):
            for hook in list(self._hooks.values()):
                hook(self)

    def reset(self) -> None:
        """`detach`, and begin anew at step 0: the same settings for another model, such as the next fold."""
        super().reset()
        self._tracker.forget()

    @property
    def _seed(self) -> int:
        """What draws depend on: the seed, and which member of a group this is."""
        if not self.stream:
            return self.seed
        return int(np.random.SeedSequence([self.seed, self.stream]).generate_state(1, np.uint64)[0])

    def _check_stepped(self) -> None:
        if any(layer.stored.requires_grad for layer in self._layers):
            self._tracker.check(type(self).__name__)

    def _before_step(self, step: int) -> None:
        self._tracker.finished()
        self._tracker.watch()
        self.grow.begin(step, self._seed)
        due = self.is_update_step(step)
        self.grow.prepare(self._layers, MostGrowth(self, step) if due else None)

    def _most_growth(self, step: int, index: int) -> int | Array:
        """The most that layer number `index`, or each of its rows, can grow at the end of `step`."""
        views = [LayerView(i, step, self._seed, layer) for i, layer in enumerate(self._layers)]
        return self.selection.most_growth(views, index, self.budget, self.redistribute)

    def _after_step(self, step: int) -> None:
        if self.is_update_step(step):
            self._update(step)

    def views(self, step: int) -> list[LayerView]:
        """Every attached layer as it is now, at the end of optimizer step number `step`."""
        return [
            LayerView(index, step, self._seed, layer, *self._tracker.find(layer))
            for index, layer in enumerate(self._layers)
        ]

    def _update(self, step: int) -> None:
        if (ranks := self._find_ranks()) is None:
            self._rewire_all(self.views(step))
            return
        layers = dict(zip(self.names, self._layers, strict=True))
        settings = settings_of(self._config(), self._layers, self.stream)
        common = CommonUpdate(ranks, step, type(self).__name__, settings, layers)
        views = self.views(step)
        trained = [view for view in views if view.layer.stored.requires_grad]
        for part in self.parts.values() if trained else ():
            part.meet(trained, ranks)
        self._rewire_all(views)
        common.finish()

    def _find_ranks(self) -> Ranks | None:
        """The processes that take each step alike; None if this one is alone."""
        return find_ranks(type(self).__name__, self._layers, self.replicas)

    def consolidate(self) -> None:
        """Bring together what each process keeps for itself of what is saved; all must call it.

        Before one of them saves `state_dict`, where that is to resume exactly. Only averages of the gradient
        (`SNFS`) are kept so; of all other algorithms the state is the same in all processes.
        """
        if (ranks := self._find_ranks()) is not None:
            for part in self.parts.values():
                part.consolidate(ranks)

    def _rewire_all(self, views: Sequence[LayerView]) -> None:
        self._check_apart(list(zip(self.names, self._layers, strict=True)), ())
        if self.redistribute is not None:
            self.redistribute.check([view for view in views if view.layer.stored.requires_grad])
        reasons = [self._reason_to_skip(view) for view in views]
        active = [view for view, reason in zip(views, reasons, strict=True) if not reason]
        moves = {view.index: self._tracker.plan_move(view.layer) for view in active}
        reports = [UpdateReport(skipped=why, nnz=v.nnz) for v, why in zip(views, reasons, strict=True)]
        for update in self.selection.select(self.context(active)) if active else ():
            index = update.view.index
            reports[index] = self._rewire(update, moves[index])
        warn_if_stuck(type(self).__name__, self.last_update or (), reports)
        self.last_update = tuple(reports)

    def context(self, views: Sequence[LayerView]) -> UpdateContext:
        """What the selection is shown of the layers that an update may change."""
        scores = [self.drop.checked(view) for view in views]
        rooms = [self.grow.room(view) for view in views]
        return UpdateContext(views, scores, rooms, self.budget, self.redistribute, self.names)

    def _reason_to_skip(self, view: LayerView) -> str:
        if not view.layer.stored.requires_grad:
            return "frozen"
        return next(filter(None, (part.reason_to_skip(view) for part in self.parts.values())), "")

    def _rewire(self, update: LayerUpdate, move: StateMove) -> UpdateReport:
        """Change the topology of a layer and all that follows it."""
        layer, drop, n_kept = update.view.layer, update.drop, update.n_kept
        grow = self.grow.checked_choice(update) if update.n_grow else np.empty(0, np.int64)
        if not drop.size and not grow.size:
            return UpdateReport(nnz=layer.nnz, skipped=NOTHING)
        source = layer.rewrite(torch.from_numpy(drop), torch.from_numpy(grow))
        move.apply(source, self.grown_state)
        for part in self.parts.values():
            part.follow(update.view, source)
        n_survivors = self._set_grown_values(update, source)
        return UpdateReport(drop.size, grow.size, n_survivors - n_kept, layer.nnz)

    def _replaced(self, index: int, source: torch.Tensor) -> None:
        view = self.views(self._step)[index]
        for part in self.parts.values():
            part.follow(view, source)

    def _set_grown_values(self, update: LayerUpdate, source: torch.Tensor) -> int:
        """Give new connections their weights; returns how many are not new."""
        new = np.flatnonzero(source.cpu().numpy() < 0)
        if new.size and self._start is not None:
            layer = update.view.layer
            slots = torch.from_numpy(new)
            weights = self._start(update, layer.positions()[slots].numpy())
            layer.put(layer.stored.detach(), slots, torch.as_tensor(weights, dtype=layer.stored.dtype))
        return source.numel() - new.size

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "selection": self.selection.describe()}
