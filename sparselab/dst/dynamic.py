"""The drop-grow loop: when to update, what each layer loses and gains, and what follows the connections."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from sparselab.dst._checks import require_count
from sparselab.dst.allocation import apportion
from sparselab.dst.base import SparsityAlgorithm
from sparselab.dst.drop import DropScore, Magnitude, lowest, lowest_of_network
from sparselab.dst.grow import Growth, RandomGrowth
from sparselab.dst.grown import GrownState, GrownValue, as_grown_value, check_grown_state
from sparselab.dst.optimizer_state import OptimizerTracker, StateMove
from sparselab.dst.redistribute import Redistribution
from sparselab.dst.schedule import Constant, Schedule, as_schedule
from sparselab.dst.update import LayerView, UpdateReport, Vacancy
from sparselab.dst.when import UpdateSchedule, as_update_schedule
from sparselab.kernels import n_connections
from sparselab.kernels.layout import Array
from sparselab.nn.topology import SparseTopology, move_slots

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
    scope : {"layer", "network"}
        Whether the lowest scores are those of each layer or of all layers together. In a network each layer
        keeps at least one connection.
    redistribute : Redistribution, optional
        How what is grown is shared among layers. By default each layer regrows what it dropped.
    grown_value : float or callable
        Weight of a new connection: a number, or a function of ``(Vacancy, positions)`` that returns one for
        each; see `sparselab.dst.grown`.
    grown_state : {"zero", "mean"}
        Optimizer state of a new connection: 0, or the mean over the layer's surviving connections.

    Attributes
    ----------
    last_update : tuple of UpdateReport, or None
        What the last update did to each layer.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range.

    Notes
    -----
    Connections are kept in the order ``(score descending, position ascending)``, so ties, which are common
    among grown weights that are still zero, never change a count. NaN counts as the lowest score. A
    connection that was just dropped may grow back, and then keeps its weight and its optimizer state. Frozen
    layers (whose weights do not require a gradient) are left alone.

    Optimizers are found by themselves, through a hook that torch calls after every ``optimizer.step()``; see
    `track` for those that are not. Every state tensor with one entry per connection is moved. State of
    another shape is an error, raised before anything is changed.
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
        scope: Literal["layer", "network"] = "layer",
        redistribute: Redistribution | None = None,
        grown_value: float | GrownValue = 0.0,
        grown_state: GrownState = "zero",
    ) -> None:
        super().__init__(sparsity)
        if scope not in self._SCOPES:
            raise ValueError(f"scope must be one of {self._SCOPES}, got {scope!r}")
        self.drop_fraction = as_schedule(drop_fraction)
        self.update = as_update_schedule(update)
        self.seed = require_count("seed", seed)
        self.drop = Magnitude() if drop is None else drop
        self.grow = RandomGrowth() if grow is None else grow
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

    _SCOPES: tuple[str, ...] = ("layer", "network")

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

    def _targets(self, step: int, nnz: int, size: int) -> tuple[int, int]:
        """Connections after the drop and after the growth, for one layer or for all of them together."""
        total = nnz
        if isinstance(self.sparsity, Schedule):
            total = n_connections((1, size), self.sparsity(step))
            if nnz:
                total = max(1, total)
        kept = min(nnz, total)
        return kept - int(self._fraction(step) * kept), total

    def _drop(self, views: Sequence[LayerView], step: int) -> list[Array]:
        """Slots that each layer loses, ascending."""
        scores = [self.drop(view) for view in views]
        if self.scope == "network":
            nnz = sum(view.nnz for view in views)
            return lowest_of_network(scores, nnz - self._targets(step, nnz, _total_size(views))[0])
        return [
            lowest(layer, view.nnz - self._targets(step, view.nnz, view.size)[0])
            for view, layer in zip(views, scores, strict=True)
        ]

    def _allot(self, vacancies: Sequence[Vacancy], step: int) -> list[int]:
        """How many connections each layer grows."""
        if self.scope == "layer":
            own = [self._targets(step, v.view.nnz, v.view.size)[1] - v.n_kept for v in vacancies]
            if self.redistribute is None:
                return own
            n_grow = sum(own)
        else:
            views = [vacancy.view for vacancy in vacancies]
            total = self._targets(step, sum(view.nnz for view in views), _total_size(views))[1]
            n_grow = total - sum(vacancy.n_kept for vacancy in vacancies)
        caps = [vacancy.n_free for vacancy in vacancies]
        if self.redistribute is None:
            return apportion(n_grow, [vacancy.drop.size for vacancy in vacancies], caps)
        return self.redistribute(vacancies, n_grow, caps)

    def _grow(self, vacancy: Vacancy) -> Array:
        """Distinct positions, as many as are asked for, none of them in ``vacancy.kept``."""
        return self.grow.choose(vacancy)

    def _most_growth(self, step: int, index: int) -> int:
        """The most connections that layer number `index` can grow at the end of `step`."""
        layer = self._layers[index]
        if self.scope == "layer" and self.redistribute is None:
            kept, total = self._targets(step, layer.nnz, layer.shape[0] * layer.shape[1])
            return total - kept
        sizes = [shape[0] * shape[1] for shape in (other.shape for other in self._layers)]
        kept, total = self._targets(step, sum(other.nnz for other in self._layers), sum(sizes))
        # Each layer rounds for itself, hence one more for each.
        return min(sizes[index], total - kept + len(sizes))

    def _reason_to_skip(self, view: LayerView) -> str:
        """Why this layer cannot be updated now; empty if it can."""
        if not view.layer.stored.requires_grad:
            return "frozen"
        return self.drop.reason_to_skip(view) or self.grow.reason_to_skip(view.index)

    def _attached(self, layer: SparseTopology) -> None:
        self._slots.append({})
        self._tracker.watch()
        self._prepare_step(self._step + 1)

    def _prepare_step(self, step: int) -> None:
        due = self.is_update_step(step)
        self.grow.prepare(self._layers, (lambda index: self._most_growth(step, index)) if due else None)

    def _finish_step(self, step: int) -> None:
        if self.is_update_step(step):
            self._update(step)

    def _update(self, step: int) -> None:
        self._fraction(step)
        self.grow.check()
        moves = [self._tracker.plan_move(layer) for layer in self._layers]
        views = [LayerView(index, step, self.seed, layer) for index, layer in enumerate(self._layers)]
        reasons = [self._reason_to_skip(view) for view in views]
        active = [view for view, reason in zip(views, reasons, strict=True) if not reason]
        reports = [UpdateReport(skipped=why, nnz=v.nnz) for v, why in zip(views, reasons, strict=True)]
        vacancies = [Vacancy(v, drop) for v, drop in zip(active, self._drop(active, step), strict=True)]
        for vacancy, n_grow in zip(vacancies, self._allot(vacancies, step), strict=True):
            index = vacancy.view.index
            reports[index] = self._rewire(Vacancy(vacancy.view, vacancy.drop, n_grow), moves[index])
        self.last_update = tuple(reports)

    def _rewire(self, vacancy: Vacancy, move: StateMove) -> UpdateReport:
        """Change the topology of a layer and all that follows it."""
        layer, drop, n_kept = vacancy.view.layer, vacancy.drop, vacancy.n_kept
        nothing = np.empty(0, np.int64)
        grow = self._grow(vacancy) if vacancy.n_grow else nothing
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
            "grown_state": self.grown_state,
        }

    def _memory(self) -> dict[str, Any]:
        return {
            "slots": [{name: entries.clone() for name, entries in slots.items()} for slots in self._slots]
        }

    def _remember(self, memory: dict[str, Any]) -> None:
        for ours, saved in zip(self._slots, memory["slots"], strict=True):
            ours.update({name: entries.clone() for name, entries in saved.items()})


def _total_size(views: Sequence[LayerView]) -> int:
    return sum(view.size for view in views)
