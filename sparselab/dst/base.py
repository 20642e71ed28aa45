"""What all algorithms share: attaching to layers, counting steps, the drop-grow loop, saving and resuming."""

from __future__ import annotations

import abc
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparselab.dst._checks import require_count, require_finite
from sparselab.dst.optimizer_state import OptimizerTracker, StateMove
from sparselab.dst.schedule import Constant, Schedule, as_schedule
from sparselab.dst.score import lowest, magnitude
from sparselab.kernels import PaddedCSR, n_connections
from sparselab.kernels._growth import kept_positions
from sparselab.kernels.layout import Array
from sparselab.nn.topology import SparseTopology, as_matrix, find_sparse

# Which algorithm a layer belongs to. Neither is kept alive by it, and copies of a layer belong to nobody.
_owners: weakref.WeakKeyDictionary[Any, weakref.ref[SparsityAlgorithm]] = weakref.WeakKeyDictionary()


class SparsityAlgorithm:
    """Decides which connections the sparse layers of a model have while it trains.

    Attach it with ``model.apply(algorithm)`` and call `step` after every ``optimizer.step()``.

    Parameters
    ----------
    sparsity : float or None
        The sparsity that every attached layer must have; None leaves each layer its own.

    Raises
    ------
    TypeError
        If `sparsity` is neither a number nor None.
    ValueError
        If `sparsity` is outside ``[0, 1]``.
    """

    def __init__(self, sparsity: float | None = None) -> None:
        if sparsity is not None:
            require_finite("sparsity", sparsity, "a number in [0, 1], or None")
            if not 0 <= sparsity <= 1:
                raise ValueError(
                    f"sparsity must lie in [0, 1], the fraction without a weight; got {sparsity!r}"
                )
        self.sparsity = sparsity
        self._layers: list[SparseTopology] = []
        self._step = 0

    @property
    def layers(self) -> tuple[SparseTopology, ...]:
        """The attached layers, in the order in which they were attached."""
        return tuple(self._layers)

    @property
    def steps_done(self) -> int:
        """Finished optimizer steps."""
        return self._step

    def __call__(self, module: torch.nn.Module) -> None:
        """Attach `module` if it is a sparse layer, ignore it otherwise; meant for ``model.apply(algorithm)``.

        Attaching a layer again changes nothing.

        Raises
        ------
        ValueError
            If the layer belongs to another algorithm, or does not have the declared sparsity.
        """
        name_and_layer = next(iter(find_sparse(module)), None)
        if name_and_layer is None or name_and_layer[0]:
            return
        layer = name_and_layer[1]
        if any(layer is known for known in self._layers):
            return
        owner = _owners.get(layer)
        if owner is not None and (other := owner()) is not None:
            raise ValueError(
                f"{_name(layer)} already belongs to a {type(other).__name__} algorithm; two of them would "
                f"rewire it against each other. Attach each layer to one algorithm"
            )
        self._check_sparsity(layer)
        _owners[layer] = weakref.ref(self)
        self._layers.append(layer)
        self._attached(layer)

    def _check_sparsity(self, layer: SparseTopology) -> None:
        if self.sparsity is None:
            return
        expected = n_connections(layer.shape, self.sparsity)
        if layer.nnz != expected:
            raise ValueError(
                f"sparsity={self.sparsity} means {expected} connections for {_name(layer)}, but it has "
                f"{layer.nnz} (sparsity {layer.sparsity:.6g}). An algorithm keeps the number of connections: "
                f"build the layer with that sparsity, or pass sparsity=None to keep each layer's own"
            )

    def step(self) -> None:
        """Count one finished optimizer step, and rewire the layers if it is time.

        Raises
        ------
        RuntimeError
            If no layer is attached.
        """
        if not self._layers:
            raise RuntimeError(
                f"{type(self).__name__}.step() was called but no sparse layer is attached. Call "
                f"model.apply(algorithm) before training, on a model that has sparse layers (see sparsify)"
            )
        self._finish_step(self._step + 1)
        self._step += 1
        self._prepare_step(self._step + 1)

    def _attached(self, layer: SparseTopology) -> None:
        """Called once for every new layer."""

    def _finish_step(self, step: int) -> None:
        """Called when optimizer step number `step` (the first is 1) is done, before it is counted."""

    def _prepare_step(self, step: int) -> None:
        """Called before optimizer step number `step`."""

    def _config(self) -> dict[str, Any]:
        """Settings that decide what the next steps do: plain values only."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume, in plain values.

        The topology itself is in the ``state_dict`` of the model, the moments in that of the optimizer. There
        is no random state: draws depend on the seed, the layer and the step only.
        """
        return {
            "algorithm": type(self).__name__,
            "step": self._step,
            "config": self._config(),
            "layers": [{"shape": list(layer.shape), "nnz": layer.nnz} for layer in self._layers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned, with the same layers attached in the same order.

        Parameters
        ----------
        state : mapping
            Read only.

        Raises
        ------
        ValueError
            If `state` lacks something, or was saved by another algorithm, with other settings, or for
            other layers. Nothing has been changed then.
        """
        ours = self.state_dict()
        if missing := sorted(ours.keys() - state.keys()):
            raise ValueError(f"state must be what state_dict() returned; it lacks {missing}")
        if state["algorithm"] != ours["algorithm"]:
            raise ValueError(f"the state was saved by {state['algorithm']}, but this is {ours['algorithm']}")
        if changed := _differences(state["config"], ours["config"]):
            raise ValueError(
                f"the state was saved with other settings: {changed}. Build the algorithm with the saved "
                f"ones; to continue with new ones on purpose, change state['config'] first"
            )
        if state["layers"] != ours["layers"]:
            raise ValueError(
                f"the state was saved for layers {state['layers']}, but those attached are {ours['layers']}. "
                f"Attach the algorithm to the same layers, in the same order, before loading"
            )
        self._step = require_count("state['step']", state["step"])
        self._prepare_step(self._step + 1)


@dataclass(frozen=True)
class UpdateReport:
    """What one update did to one layer.

    Attributes
    ----------
    dropped, grown : int
        Connections dropped and positions grown; always equal.
    regrown : int
        Positions that were both, so that connection and state survived.
    skipped : str
        Why the layer was left alone; empty if it was not.
    """

    dropped: int = 0
    grown: int = 0
    regrown: int = 0
    skipped: str = ""


@dataclass(frozen=True)
class Vacancy:
    """The connections a layer is losing, which tells an algorithm where it may grow and how much.

    Attributes
    ----------
    layer_index : int
        Which of the attached layers.
    step : int
        Finished optimizer steps.
    shape : (int, int)
        ``(out_features, in_features)``.
    matrix : PaddedCSR
        The connections before the drop, without spare slots. Its values are not to be read.
    drop : int array, (k,)
        Slots that lose their connection, ascending; as many are to be grown.
    """

    layer_index: int
    step: int
    shape: tuple[int, int]
    matrix: PaddedCSR
    drop: Array

    @property
    def kept(self) -> Array:
        """Positions ``row * in_features + column`` that keep their connection, ascending."""
        return kept_positions(self.matrix, self.drop)


class DynamicSparsityAlgorithm(SparsityAlgorithm, abc.ABC):
    """Every so often, drop the weakest connections of each layer and grow as many elsewhere.

    The update of step t drops the ``k = int(drop_fraction(t) * nnz)`` connections of smallest ``|w|`` of a
    layer with nnz of them, and grows k others, so nnz never changes. Subclasses say where, in `_grow`.

    Parameters
    ----------
    sparsity : float or None
        The sparsity that every attached layer must have; None leaves each layer its own.
    drop_fraction : float, Schedule or callable
        Fraction of the connections to replace, in ``[0, 1]``; a schedule or function is called with the step.
    update_freq : int
        Steps between updates. Step t (the first is 1) ends with an update if ``t % update_freq == 0`` and
        ``start <= t`` and t is below `stop`.
    start : int
        First step that may update.
    stop : int or None
        Step from which the topology stays as it is; None means never.
    seed : int
        All random draws depend on ``(seed, layer, step)`` and nothing else.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range.

    Notes
    -----
    Connections are kept in the order ``(|w| descending, position ascending)``, so ties, which are common
    among grown weights that are still zero, never change a count. NaN counts as the smallest magnitude. A
    connection that was just dropped may grow back, and then keeps its weight and its optimizer state; any
    other grown connection starts with zeros. Frozen layers (``stored.requires_grad`` is False) are left
    alone.

    Optimizers are found by themselves, through a hook that torch calls after every ``optimizer.step()``; see
    `track` for those that are not. Every state tensor with one entry per connection is moved in place. State
    of another shape is an error, raised before anything is changed.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        drop_fraction: float | Schedule | Callable[[int], float] = 0.3,
        update_freq: int = 100,
        start: int = 0,
        stop: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(sparsity)
        self.drop_fraction = as_schedule(drop_fraction)
        self.update_freq = require_count("update_freq", update_freq, minimum=1)
        self.start = require_count("start", start)
        self.stop = None if stop is None else require_count("stop", stop)
        self.seed = require_count("seed", seed)
        self._tracker = OptimizerTracker(self._layers)
        self.last_update: tuple[UpdateReport, ...] | None = None
        if isinstance(self.drop_fraction, Constant):
            self._fraction(0)

    def track(self, optimizer: torch.optim.Optimizer) -> None:
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
        return (
            step > 0
            and step % self.update_freq == 0
            and self.start <= step
            and (self.stop is None or step < self.stop)
        )

    @abc.abstractmethod
    def _grow(self, vacancy: Vacancy) -> Array:
        """As many distinct positions as are dropped, none of them in ``vacancy.kept``."""

    def _check(self) -> None:
        """Raise if the update that is due cannot be done; nothing has been changed yet."""

    def _reason_to_skip(self, layer_index: int) -> str:
        """Why this layer cannot be updated now; empty if it can."""
        return "" if self._layers[layer_index].stored.requires_grad else "frozen"

    def _attached(self, layer: SparseTopology) -> None:
        self._tracker.watch()
        self._prepare_step(self._step + 1)

    def _finish_step(self, step: int) -> None:
        if not self.is_update_step(step):
            return
        fraction = self._fraction(step)
        self._check()
        moves = [self._tracker.plan_move(layer) for layer in self._layers]
        reports = []
        for index, (layer, move) in enumerate(zip(self._layers, moves, strict=True)):
            if reason := self._reason_to_skip(index):
                reports.append(UpdateReport(skipped=reason))
                continue
            drop = lowest(magnitude(layer.per_connection(layer.stored)), int(fraction * layer.nnz))
            if not drop.size:
                reports.append(UpdateReport())
                continue
            grow = self._grow(Vacancy(index, step, layer.shape, as_matrix(layer), drop))
            if grow.size != drop.size:
                raise RuntimeError(f"{type(self).__name__} grew {grow.size} for {drop.size} dropped")
            n_survivors = self._rewire(layer, move, drop, grow)
            reports.append(UpdateReport(drop.size, grow.size, n_survivors - (layer.nnz - drop.size)))
        self.last_update = tuple(reports)

    def _rewire(self, layer: SparseTopology, move: StateMove, drop: Array, grow: Array) -> int:
        """Change the topology and all that follows it; returns how many connections survived."""
        source = layer.rewrite(torch.from_numpy(drop), torch.from_numpy(grow))
        move.apply(source)
        return int(np.count_nonzero(source.cpu().numpy() >= 0))

    def _fraction(self, step: int) -> float:
        fraction = self.drop_fraction(step)
        if not 0 <= fraction <= 1:
            raise ValueError(f"drop_fraction must lie in [0, 1]; got {fraction!r} at step {step}")
        return fraction

    def _config(self) -> dict[str, Any]:
        return {
            "drop_fraction": self.drop_fraction.describe(),
            "update_freq": self.update_freq,
            "start": self.start,
            "stop": self.stop,
            "seed": self.seed,
        }


def _name(layer: SparseTopology) -> str:
    return f"a layer of shape {tuple(layer.shape)}"


def _differences(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} was {saved.get(key)!r} and is {ours.get(key)!r}"
        for key in sorted(saved.keys() | ours.keys())
        if saved.get(key) != ours.get(key)
    )
