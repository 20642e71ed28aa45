"""What all algorithms share: attaching to layers, counting steps, saving and resuming."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from sparselab.dst.checks import require_count, require_finite
from sparselab.dst.schedules.schedule import Schedule
from sparselab.kernels.arrays import n_connections
from sparselab.nn.layers.base import SparseLayer, find_sparse, is_sparse

# Which algorithm a layer belongs to. Neither is kept alive by it, and copies of a layer belong to nobody.
_owners: weakref.WeakKeyDictionary[Any, weakref.ref[SparsityAlgorithm]] = weakref.WeakKeyDictionary()


class SparsityAlgorithm:
    """Decides which connections the sparse layers of a model have while it trains.

    Attach it with ``model.apply(algorithm)`` and call `step` after every ``optimizer.step()``; or let
    `attach` do both.

    Parameters
    ----------
    sparsity : float, Schedule or None
        The sparsity that every attached layer must have; None leaves each layer its own. With a schedule,
        which only some algorithms take, layers need not have it when they are attached.

    Raises
    ------
    TypeError
        If `sparsity` is neither a number nor None.
    ValueError
        If `sparsity` is outside ``[0, 1]``.
    """

    def __init__(self, sparsity: float | Schedule | None = None) -> None:
        if sparsity is not None and not isinstance(sparsity, Schedule):
            require_finite("sparsity", sparsity, "a number in [0, 1], or None")
            if not 0 <= sparsity <= 1:
                raise ValueError(
                    f"sparsity must lie in [0, 1], the fraction without a weight; got {sparsity!r}"
                )
        self.sparsity = sparsity
        self._layers: list[SparseLayer] = []
        self._names: list[str] = []
        self._step = 0

    @property
    def layers(self) -> tuple[SparseLayer, ...]:
        """The attached layers, in the order in which they were attached."""
        return tuple(self._layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Their qualified names in the model given to `attach`, or ``layer 0``, ``layer 1``, ..."""
        return tuple(name or f"layer {index}" for index, name in enumerate(self._names))

    @property
    def steps_done(self) -> int:
        """Finished optimizer steps."""
        return self._step

    def attach(self, model: torch.nn.Module, optimizer: Optimizer | None = None) -> RemovableHandle | None:
        """Attach every sparse layer of a model, by name, and optionally step along with an optimizer.

        Parameters
        ----------
        model : torch.nn.Module
        optimizer : torch.optim.Optimizer, optional
            Calls `step` after each of its steps from now on; do not call it yourself then.

        Returns
        -------
        torch.utils.hooks.RemovableHandle or None
            Its ``remove()`` ends the automatic steps; None without an optimizer.

        Raises
        ------
        TypeError
            If the algorithm cannot rewire layers of this kind.
        ValueError
            If the model has no sparse layer, or one of them belongs to another algorithm.

        Examples
        --------
        >>> import torch
        >>> from sparselab.dst import SET
        >>> from sparselab.nn import SparseLinear
        >>> model = torch.nn.Sequential(SparseLinear(64, 32), torch.nn.Linear(32, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> algorithm = SET()
        >>> handle = algorithm.attach(model, optimizer)
        >>> optimizer.step()
        >>> algorithm.names, algorithm.steps_done
        (('0',), 1)
        """
        found = list(find_sparse(model))
        if not found:
            raise ValueError(
                f"model must have sparse layers for {type(self).__name__} to attach to, got a "
                f"{type(model).__name__} without any (see sparsify)"
            )
        for name, layer in found:
            self._attach(layer, name)
        return None if optimizer is None else step_along(self, optimizer)

    def __call__(self, module: torch.nn.Module) -> None:
        """Attach `module` if it is a sparse layer, ignore it otherwise; meant for ``model.apply(algorithm)``.

        Attaching a layer again changes nothing.

        Raises
        ------
        TypeError
            If the algorithm cannot rewire layers of this kind.
        ValueError
            If the layer belongs to another algorithm, or does not have the declared sparsity.
        """
        if is_sparse(module):
            self._attach(module, "")

    def _attach(self, layer: SparseLayer, name: str) -> None:
        for index, known in enumerate(self._layers):
            if layer is known:
                self._names[index] = name or self._names[index]
                return
        owner = _owners.get(layer)
        if owner is not None and (other := owner()) is not None:
            raise ValueError(
                f"{_name(layer)} already belongs to a {type(other).__name__} algorithm; two of them would "
                f"rewire it against each other. Attach each layer to one algorithm"
            )
        self._check_kind(layer)
        self._check_sparsity(layer)
        _owners[layer] = weakref.ref(self)
        self._layers.append(layer)
        self._names.append(name)
        self._attached(layer)

    def _check_kind(self, layer: SparseLayer) -> None:
        """Raise TypeError if the algorithm cannot rewire layers of this kind."""

    def _check_sparsity(self, layer: SparseLayer) -> None:
        if self.sparsity is None or isinstance(self.sparsity, Schedule):
            return
        expected = n_connections(layer.grid, self.sparsity)
        if layer.nnz != expected:
            raise ValueError(
                f"sparsity={self.sparsity} means {expected} connections for {_name(layer)}, but it has "
                f"{layer.nnz} (sparsity {layer.sparsity:.6g}). An algorithm keeps the number of connections: "
                f"build the layer with that sparsity, or pass sparsity=None to keep each layer's own"
            )

    def track(self, optimizer: Optimizer) -> None:
        """Name an optimizer whose state must follow the connections; nothing to do where they stay."""

    def expect_passes(self, passes: int) -> None:
        """Say how many backward passes make a step; nothing to do where no gradient is looked at."""

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

    def _attached(self, layer: SparseLayer) -> None:
        """Called once for every new layer."""

    def _finish_step(self, step: int) -> None:
        """Called when optimizer step number `step` (the first is 1) is done, before it is counted."""

    def _prepare_step(self, step: int) -> None:
        """Called before optimizer step number `step`."""

    def _config(self) -> dict[str, Any]:
        """Settings that decide what the next steps do: plain values only."""
        return {}

    def _memory(self) -> dict[str, Any]:
        """What the algorithm has learnt so far and needs to go on: plain values and tensors."""
        return {}

    def _remember(self, memory: dict[str, Any]) -> None:
        """Take back what `_memory` returned; raise ValueError before any change if it does not fit."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume, in plain values and tensors.

        The topology itself is in the ``state_dict`` of the model, the moments in that of the optimizer. There
        is no random state: draws depend on the seed, the layer and the step only.
        """
        return {
            "algorithm": type(self).__name__,
            "step": self._step,
            "config": self._config(),
            "layers": [{"shape": list(layer.shape), "nnz": layer.nnz} for layer in self._layers],
            "memory": self._memory(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned, with the same layers attached in the same order.

        Load the model's state first: it holds the topology that this state belongs to.

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
                f"Attach the algorithm to the same layers, in the same order, and load the model's state "
                f"first"
            )
        step = require_count("state['step']", state["step"])
        self._remember(state["memory"])
        self._step = step
        self._prepare_step(self._step + 1)


def step_along(algorithm: Any, optimizer: Optimizer) -> RemovableHandle:
    """Call ``algorithm.step()`` after every step of `optimizer`; the handle's ``remove()`` ends it.

    Raises
    ------
    TypeError
        If it is not a torch optimizer.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    algorithm.track(optimizer)
    return optimizer.register_step_post_hook(lambda *_: algorithm.step())


def _name(layer: SparseLayer) -> str:
    return f"a layer of shape {tuple(layer.shape)}"


def _differences(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} was {saved.get(key)!r} and is {ours.get(key)!r}"
        for key in sorted(saved.keys() | ours.keys())
        if saved.get(key) != ours.get(key)
    )
