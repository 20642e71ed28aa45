"""The drop-grow loop: when to update, what each layer loses and gains, and what follows the connections."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from sparselab.dst.budget.allocate import apportion
from sparselab.dst.budget.rows import apportion_rows
from sparselab.dst.checks import require_count, require_of_blocks
from sparselab.dst.engine.base import SparsityAlgorithm
from sparselab.dst.engine.optimizer_state import OptimizerTracker, StateMove
from sparselab.dst.parts.drop import DropScore, Magnitude, lowest, lowest_of_network, lowest_of_rows
from sparselab.dst.parts.grow import Growth, RandomGrowth
from sparselab.dst.parts.grown import (
    GrownState,
    GrownValue,
    as_grown_value,
    check_grown_state,
    describe_grown_value,
)
from sparselab.dst.parts.redistribute import Redistribution
from sparselab.dst.parts.view import LayerView, UpdateReport, Vacancy, total_size
from sparselab.dst.schedules.schedule import Constant, Schedule, as_schedule
from sparselab.dst.schedules.when import UpdateSchedule, as_update_schedule
from sparselab.kernels.arrays import Array, n_connections
from sparselab.nn.layers.base import SparseLayer
from sparselab.nn.storage.entries import move_slots

UpdateHook = Callable[["DynamicSparsityAlgorithm"], None]


class DynamicSparsityAlgorithm(SparsityAlgorithm):
    """Every so often, drop the weakest connections and grow others elsewhere.

    An update at step t drops the fraction ``f = drop_fraction(t)`` of the connections, those of lowest
    score, and grows as many, so that their number stays, or becomes what a sparsity schedule says. Named
    algorithms are choices of these parts, which also combine freely.

    Parameters
    ----------
    sparsity : float, Schedule or None
        The sparsity that every attached layer must have; None leaves each layer its own. A schedule is where
        every update takes the layers to (the network, if that is the scope), whatever they had before.
    drop_fraction : float, Schedule or callable
        Fraction of the connections to replace, in ``[0, 1]``; a schedule or function is called with the step.
    update : int, mapping, list of int, or UpdateSchedule
        The optimizer steps (the first is 1) that end with an update: every so many, ``{"freq", "start",
        "stop"}`` with `stop` exclusive, or a list of steps.
    seed : int
        All random draws depend on ``(seed, layer, step)`` and nothing else.
    drop : DropScore, optional
        The score; by default `Magnitude`.
    grow : Growth, optional
        Where to grow; by default `RandomGrowth`.
    scope : {"layer", "network", "row"}
        Whether the lowest scores are those of each layer, of all layers together, or of each row, that is, of
        the connections of one output. In a network each layer keeps at least one connection. By rows, each
        row loses a share of what the layer drops in proportion to its connections (the largest remainders
        round up) and grows as many, so all rows keep their number; where a schedule changes the layer's, the
        rows share the new one in proportion.
    redistribute : Redistribution, optional
        How growth is shared among layers. By default each layer, and always each row, regrows what it lost.
    grown_value : float or callable
        Weight of a new connection: a number, or a function of ``(Vacancy, positions)`` that returns one for
        each; see `sparselab.dst.parts.grown`.
    grown_state : {"zero", "mean"}
        Optimizer state of a new connection: 0, or the mean over the layer's surviving connections.

    Attributes
    ----------
    last_update : tuple of UpdateReport, or None
        What the last update did to each layer.

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
    Every state tensor with one entry per connection is moved; another shape is an error, before any change.
    """

    def __init__(
        self,
        sparsity: float | Schedule | None = None,
        drop_fraction: float | Schedule | Callable[[int], float] = 0.3,
        update: int | Mapping[str, Any] | list[int] | tuple[int, ...] | UpdateSchedule = 100,
        seed: int = 0,
        *,
        drop: DropScore | None = None,
        grow: Growth | None = None,
        scope: Literal["layer", "network", "row"] = "layer",
        redistribute: Redistribution | None = None,
        grown_value: float | GrownValue = 0.0,
        grown_state: GrownState = "zero",
    ) -> None:
        super().__init__(sparsity)
        if isinstance(sparsity, Schedule) and not self._FOLLOWS_SCHEDULE:
            raise TypeError(
                f"sparsity must be a number or None, because {type(self).__name__} keeps the number of "
                f"connections; got a {type(sparsity).__name__} schedule"
            )
        if scope not in self._SCOPES:
            raise ValueError(f"scope must be one of {self._SCOPES}, got {scope!r}")
        self.drop_fraction = as_schedule(drop_fraction)
        self.update = as_update_schedule(update)
        self.seed = require_count("seed", seed)
        self.drop = Magnitude() if drop is None else drop
        self.grow = RandomGrowth() if grow is None else grow
        if scope == "row" and not (self.grow.by_row and redistribute is None):
            raise ValueError(
                f'scope="row" needs a growth that chooses by row and no redistribution; got '
                f"{self.grow.describe()} and {redistribute and redistribute.describe()}"
            )
        self.scope = scope
        self.redistribute = redistribute
        self.grown_value = as_grown_value(grown_value)
        self.grown_state = check_grown_state(grown_state)
        self._tracker = OptimizerTracker(self._layers)
        self._slots: list[dict[str, torch.Tensor]] = []
        self._hooks: OrderedDict[int, UpdateHook] = OrderedDict()
        self.last_update: tuple[UpdateReport, ...] | None = None
        if isinstance(self.drop_fraction, Constant):
            self._fraction(0)

    _SCOPES: tuple[str, ...] = ("layer", "network", "row")
    _FOLLOWS_SCHEDULE = True
    _OF_BLOCKS = True  # the algorithm itself; its parts say it for themselves

    def _check_kind(self, layer: SparseLayer) -> None:
        if layer.block_shape != (1, 1):
            parts = (self.drop, self.grow, self.redistribute)
            require_of_blocks(type(self).__name__, layer.block_shape, self._OF_BLOCKS, parts)

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
        """
        self._tracker.add(optimizer)

    def is_update_step(self, step: int) -> bool:
        """Whether optimizer step number `step` (the first is 1) ends with an update."""
        return self.update(step)

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

    def step(self) -> None:
        """Count one finished optimizer step, and rewire the layers if it is time.

        Raises
        ------
        RuntimeError
            If no layer is attached.
        """
        super().step()
        if self.is_update_step(self._step):
            for hook in list(self._hooks.values()):
                hook(self)

    def _total(self, step: int, nnz: int, size: int) -> int:
        """Connections after the update, of one layer or of all of them together."""
        if not isinstance(self.sparsity, Schedule):
            return nnz
        return max(min(nnz, 1), n_connections((1, size), self.sparsity(step)))

    def _targets(self, step: int, nnz: int, size: int) -> tuple[int, int]:
        """Connections after the drop and after the growth, of one layer or of all of them together."""
        total = self._total(step, nnz, size)
        kept = min(nnz, total)
        return kept - self._exchanged(step, kept), total

    def _exchanged(self, step: int, n: int) -> int:
        return int(self._fraction(step) * n)

    def _n_drop(self, step: int, nnz: int, size: int, room: int) -> int:
        """Connections that one layer, or all of them together, lose; those that cannot be replaced stay."""
        kept, total = self._targets(step, nnz, size)
        return max(0, nnz - kept - max(0, total - kept - room))

    def _row_goal(self, view: LayerView, step: int) -> Array:
        """Connections of each row after the growth; with ``scope="row"``."""
        total = self._targets(step, view.nnz, view.size)[1]
        rows, columns = view.grid
        return apportion_rows(total, view.matrix.row_nnz, np.full(rows, columns))

    def _row_kept(self, view: LayerView, step: int, goal: Array) -> Array:
        """Connections of each row after the drop, at most its goal; with ``scope="row"``."""
        most = np.minimum(view.matrix.row_nnz, goal)
        n_drop = int(most.sum()) - self._targets(step, view.nnz, view.size)[0]
        return most - apportion_rows(n_drop, most, most)

    def _plan(self, views: Sequence[LayerView], step: int) -> list[Vacancy]:
        """What each layer loses, and how much it grows."""
        vacancies = [Vacancy(v, drop) for v, drop in zip(views, self._drop(views, step), strict=True)]
        if self.scope == "row":
            rows = [self._row_goal(v.view, step) - v.row_kept for v in vacancies]
            return [Vacancy(v.view, v.drop, int(n.sum()), n) for v, n in zip(vacancies, rows, strict=True)]
        shares = self._allot(vacancies, step)
        return [Vacancy(v.view, v.drop, n_grow) for v, n_grow in zip(vacancies, shares, strict=True)]

    def _drop(self, views: Sequence[LayerView], step: int) -> list[Array]:
        """Slots that each layer loses, ascending."""
        scores = [self.drop(view) for view in views]
        if self.scope == "row":
            kept = [self._row_kept(view, step, self._row_goal(view, step)) for view in views]
            return [
                lowest_of_rows(layer, view.matrix.indptr, view.matrix.row_nnz - n)
                for view, layer, n in zip(views, scores, kept, strict=True)
            ]
        rooms = [self.grow.room(view) for view in views]
        if self.scope == "network":
            nnz = sum(view.nnz for view in views)
            return lowest_of_network(scores, self._n_drop(step, nnz, total_size(views), sum(rooms)))
        return [
            lowest(layer, self._n_drop(step, view.nnz, view.size, room))
            for view, layer, room in zip(views, scores, rooms, strict=True)
        ]

    def _allot(self, vacancies: Sequence[Vacancy], step: int) -> list[int]:
        """How many connections each layer grows; not asked with ``scope="row"``, where rows say it."""
        caps = [min(vacancy.n_free, self.grow.room(vacancy.view)) for vacancy in vacancies]
        if self.scope == "layer":
            own = [
                min(self._targets(step, vacancy.view.nnz, vacancy.view.size)[1] - vacancy.n_kept, cap)
                for vacancy, cap in zip(vacancies, caps, strict=True)
            ]
            if self.redistribute is None:
                return own
            n_grow = sum(own)
        else:
            views = [vacancy.view for vacancy in vacancies]
            total = self._total(step, sum(view.nnz for view in views), total_size(views))
            # Each layer keeps a connection, which may be more than the total.
            n_grow = min(max(0, total - sum(vacancy.n_kept for vacancy in vacancies)), sum(caps))
        if self.redistribute is None:
            return apportion(n_grow, [vacancy.drop.size for vacancy in vacancies], caps)
        return self.redistribute(vacancies, n_grow, caps)

    def _grow(self, vacancy: Vacancy) -> Array:
        """Distinct positions, as many as are asked for, none of them in ``vacancy.kept``."""
        return self.grow.choose(vacancy)

    def _most_growth(self, step: int, index: int) -> int | Array:
        """The most that layer number `index`, or each of its rows, can grow at the end of `step`."""
        layer = self._layers[index]
        if self.scope == "row":
            view = LayerView(index, step, self.seed, layer)
            goal = self._row_goal(view, step)
            return goal - self._row_kept(view, step, goal)
        if self.scope == "layer" and self.redistribute is None:
            kept, total = self._targets(step, layer.nnz, math.prod(layer.grid))
            return total - kept
        sizes = [math.prod(other.grid) for other in self._layers]
        kept, total = self._targets(step, sum(other.nnz for other in self._layers), sum(sizes))
        # Each layer rounds for itself, hence one more for each.
        return min(sizes[index], total - kept + len(sizes))

    def _reason_to_skip(self, view: LayerView) -> str:
        """Why this layer cannot be updated now; empty if it can."""
        if not view.layer.stored.requires_grad:
            return "frozen"
        why = self.drop.reason_to_skip(view) or self.grow.reason_to_skip(view.index)
        return why if why or self.redistribute is None else self.redistribute.reason_to_skip(view)

    def _attached(self, layer: SparseLayer) -> None:
        self._slots.append({})
        self._tracker.watch()
        self._prepare_step(self._step + 1)

    def _prepare_step(self, step: int) -> None:
        due = self.is_update_step(step)
        self.grow.begin(step, self.seed)
        self.grow.prepare(self._layers, (lambda index: self._most_growth(step, index)) if due else None)

    def _finish_step(self, step: int) -> None:
        if self.is_update_step(step):
            self._update(step)

    def _views(self, step: int) -> list[LayerView]:
        """Every layer as it is now."""
        return [
            LayerView(index, step, self.seed, layer, *self._tracker.find(layer))
            for index, layer in enumerate(self._layers)
        ]

    def _update(self, step: int) -> None:
        self._fraction(step)
        moves = [self._tracker.plan_move(layer) for layer in self._layers]
        views = self._views(step)
        if self.redistribute is not None:
            self.redistribute.check([view for view in views if view.layer.stored.requires_grad])
        reasons = [self._reason_to_skip(view) for view in views]
        active = [view for view, reason in zip(views, reasons, strict=True) if not reason]
        reports = [UpdateReport(skipped=why, nnz=v.nnz) for v, why in zip(views, reasons, strict=True)]
        for vacancy in self._plan(active, step):
            index = vacancy.view.index
            reports[index] = self._rewire(vacancy, moves[index])
        self.last_update = tuple(reports)

    def _rewire(self, vacancy: Vacancy, move: StateMove) -> UpdateReport:
        """Change the topology of a layer and all that follows it."""
        layer, drop, n_kept = vacancy.view.layer, vacancy.drop, vacancy.n_kept
        grow = self._grow(vacancy) if vacancy.n_grow else np.empty(0, np.int64)
        if grow.size != vacancy.n_grow:
            raise RuntimeError(f"{type(self).__name__} grew {grow.size} connections, not {vacancy.n_grow}")
        if not drop.size and not grow.size:
            return UpdateReport(nnz=layer.nnz)
        source = layer.rewrite(torch.from_numpy(drop), torch.from_numpy(grow))
        move.apply(source, self.grown_state)
        slots = self._slots[vacancy.view.index]
        for name, entries in slots.items():
            slots[name] = move_slots(entries, source)
        n_survivors = self._set_grown_values(vacancy, source)
        return UpdateReport(drop.size, grow.size, n_survivors - n_kept, layer.nnz)

    def _set_grown_values(self, vacancy: Vacancy, source: torch.Tensor) -> int:
        """Give new connections their weights; returns how many are not new."""
        new = np.flatnonzero(source.cpu().numpy() < 0)
        if new.size and self.grown_value is not None:
            layer = vacancy.view.layer
            slots = torch.from_numpy(new)
            weights = self.grown_value(vacancy, layer.positions()[slots].numpy())
            layer.put(layer.stored.detach(), slots, torch.as_tensor(weights, dtype=layer.stored.dtype))
        return source.numel() - new.size

    def _fraction(self, step: int) -> float:
        fraction = self.drop_fraction(step)
        if not 0 <= fraction <= 1:
            raise ValueError(f"drop_fraction must lie in [0, 1]; got {fraction!r} at step {step}")
        return fraction

    def _config(self) -> dict[str, Any]:
        return {
            "sparsity": self.sparsity.describe() if isinstance(self.sparsity, Schedule) else self.sparsity,
            "drop_fraction": self.drop_fraction.describe(),
            "update": self.update.describe(),
            "seed": self.seed,
            "drop": self.drop.describe(),
            "grow": self.grow.describe(),
            "scope": self.scope,
            "redistribute": None if self.redistribute is None else self.redistribute.describe(),
            "grown_value": describe_grown_value(self.grown_value),
            "grown_state": self.grown_state,
        }

    def _memory(self) -> dict[str, Any]:
        slots = [{name: entries.clone() for name, entries in slots.items()} for slots in self._slots]
        return {"slots": slots, "grow": self.grow.memory()}

    def _remember(self, memory: dict[str, Any]) -> None:
        self.grow.remember(memory["grow"])
        for ours, saved in zip(self._slots, memory["slots"], strict=True):
            ours.update({name: entries.clone() for name, entries in saved.items()})
