"""What all algorithms share: attaching to layers, counting steps, saving and resuming."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from sparselab.dst.budget.targets import check_count, check_sparsity
from sparselab.dst.checks import require_count
from sparselab.dst.engine.describe import arguments, as_text, differences, plain
from sparselab.dst.engine.driven import Driven, StepHandle
from sparselab.dst.part import Part
from sparselab.dst.replicas import ALL_REPLICAS, Replicas
from sparselab.dst.schedules.schedule import Schedule
from sparselab.dst.view import UpdateReport
from sparselab.nn.follow.replicas import declare_replicas, unwrapped
from sparselab.nn.layers.base import SparseLayer, find_sparse, is_sparse

# Which algorithm a layer belongs to. Neither is kept alive by it, and copies of a layer belong to nobody.
_owners: weakref.WeakKeyDictionary[Any, weakref.ref[SparsityAlgorithm]] = weakref.WeakKeyDictionary()


class SparsityAlgorithm(Driven):
    """Decides which connections the sparse layers of a model have while it trains.

    Attach it with ``model.apply(algorithm)`` or ``algorithm.attach(model)`` and call `step` after every
    ``optimizer.step()``; or let ``algorithm.attach(model, optimizer)`` do both.

    An algorithm of one's own usually is a `DynamicSparsityAlgorithm` of other parts, which overrides nothing.
    Whatever else changes layers may override the three methods that this class calls,

    - ``_check_layer(layer)``, which raises if a layer cannot be attached,
    - ``_before_step(step)``, called before optimizer step number `step` (the first is 1), and again when
      layers have been attached,
    - ``_after_step(step)``, called when that step is done, before it is counted,

    and puts what it keeps into `parts`. It holds every argument of its ``__init__`` in an attribute of the
    same name: these are what ``repr`` shows, and what a resumed run must have in common with the saved one.

    Parameters
    ----------
    sparsity : float, Schedule or None
        The sparsity that every attached layer must have; None leaves each layer its own. With a schedule,
        which only some algorithms take, layers need not have it when they are attached.

    Attributes
    ----------
    parts : dict of str to Part
        What the algorithm is made of: told of every layer, and saved with it.
    last_update : tuple of UpdateReport, or None
        What the last update did to each layer; None before the first.
    replicas : Replicas or None
        What was said of other processes when it was attached.

    Raises
    ------
    TypeError
        If `sparsity` is neither a number nor None.
    ValueError
        If `sparsity` is outside ``[0, 1]``.
    """

    #: Which member of a `Group` this is, so that no two of them draw alike.
    stream = 0

    def __init__(self, sparsity: float | Schedule | None = None) -> None:
        self.sparsity = check_sparsity(sparsity)
        self.parts: dict[str, Part] = {}
        self._layers: list[SparseLayer] = []
        self._names: list[str] = []
        self._step = 0
        self.last_update: tuple[UpdateReport, ...] | None = None
        self.replicas: Replicas | None = ALL_REPLICAS

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

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={as_text(value)}" for name, value in arguments(self).items())
        return f"{type(self).__name__}({given}) of {len(self._layers)} layers after {self._step} steps"

    def attach(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer | None = None,
        *,
        replicas: Replicas | None = ALL_REPLICAS,
    ) -> StepHandle | None:
        """Attach every sparse layer of a model, by name, and optionally step along with an optimizer.

        Either all of it happens or nothing. Attaching a layer again changes nothing.

        Parameters
        ----------
        model : torch.nn.Module
        optimizer : torch.optim.Optimizer, optional
            Steps the algorithm after each of its steps from now on; calling `step` is an error then.
        replicas : Replicas or None
            Where several processes train: who holds replicas of the model, by default whom its
            ``DistributedDataParallel`` says. None: nobody, each process trains a model of its own.

        Returns
        -------
        StepHandle or None
            Its ``remove()`` ends the automatic steps; None without an optimizer.

        Raises
        ------
        TypeError
            If the algorithm cannot rewire layers of this kind.
        ValueError
            If the model has no sparse layer, one of them belongs to another algorithm or does not have the
            declared sparsity, or the optimizer does not hold their weights.
        RuntimeError
            If the algorithm has layers outside the model, or has taken steps without these layers (see
            `reset`), or the optimizer keeps state that cannot follow the connections.

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
        found = list(find_sparse(model := unwrapped(model)))
        if not found:
            raise ValueError(
                f"model must have sparse layers for {type(self).__name__} to attach to, got a "
                f"{type(model).__name__} without any (see sparsify)"
            )
        self._check_whole(found, model)
        self._check_new(found)
        optimizer = self._check_optimizer(optimizer, found)
        if optimizer is not None:
            self._check_follows(optimizer, [layer for _, layer in found])
        self._attach(found, replicas)
        return self._drive(optimizer)

    def __call__(self, module: torch.nn.Module) -> None:
        """Attach `module` if it is a sparse layer, ignore it otherwise; meant for ``model.apply(algorithm)``.

        Attaching a layer again changes nothing.

        Raises
        ------
        TypeError
            If the algorithm cannot rewire layers of this kind.
        ValueError
            If the layer belongs to another algorithm, or does not have the declared sparsity.
        RuntimeError
            If the algorithm has taken steps without this layer; see `reset`.
        """
        if is_sparse(module):
            self._check_new([("", module)])
            self._attach([("", module)], self.replicas)

    def _check_follows(self, optimizer: Optimizer, layers: Iterable[SparseLayer]) -> None:
        """Raise RuntimeError if state that an optimizer keeps could not follow the connections."""

    def _check_whole(self, found: Sequence[tuple[str, SparseLayer]], model: torch.nn.Module) -> None:
        """Raise RuntimeError if layers of another model are attached."""
        inside = {id(layer) for _, layer in found}
        others = [n for n, layer in zip(self.names, self._layers, strict=True) if id(layer) not in inside]
        if others:
            raise RuntimeError(
                f"model must hold all layers that are attached, got a {type(model).__name__} without "
                f"{others}: this {type(self).__name__} belongs to another model. Call reset() to begin anew "
                f"with this one, or attach a module that holds both"
            )

    def _check_new(
        self, pairs: Sequence[tuple[str, SparseLayer]], others: Iterable[SparseLayer] = ()
    ) -> None:
        """Raise if one of these layers is new and cannot be attached; nothing has been changed yet."""
        self._check_apart(pairs, others)
        for _, layer in pairs:
            if any(layer is known for known in self._layers):
                continue
            if self._step:
                raise RuntimeError(
                    f"{_name(layer)} must be attached before the first step, got it after {self._step} steps "
                    f"of this {type(self).__name__}. Call reset() before training another model with it, or "
                    f"make a new one; to resume, attach first and then load_state_dict"
                )
            owner = _owners.get(layer)
            if owner is not None and (other := owner()) is not None:
                raise ValueError(
                    f"{_name(layer)} already belongs to a {type(other).__name__} algorithm; two of them "
                    f"would rewire it against each other. Attach each layer to one algorithm, or detach() "
                    f"the other"
                )
            self._check_layer(layer)

    def _check_apart(self, pairs: Sequence[tuple[str, SparseLayer]], others: Iterable[SparseLayer]) -> None:
        """Raise ValueError if one of these layers shares tensors of W with another one or with `others`."""
        ours = {id(layer) for _, layer in pairs}
        owned = [layer for layer, owner in _owners.items() if owner() is not None]
        layers = {id(layer): layer for layer in (*(layer for _, layer in pairs), *owned, *others)}
        used = sorted((*ends, at) for at, each in layers.items() for ends in each.storage.memory(each))
        for (_, last, a), (first, _, b) in pairwise(used):
            if a != b and first <= last and not ours.isdisjoint((a, b)):
                raise ValueError(
                    f"layers must not share their weights or connections, got two of shapes "
                    f"{tuple(layers[a].shape)} and {tuple(layers[b].shape)} that do: rewiring one would "
                    f"break the other. Use the same module in both places, or load copies (without "
                    f"assign=True)"
                )

    def _attach(self, pairs: Sequence[tuple[str, SparseLayer]], replicas: Replicas | None) -> None:
        """Attach layers that have been checked, or name those that are attached."""
        self.replicas = replicas
        declare_replicas([layer for _, layer in pairs], replicas and replicas.process_group)
        for name, layer in pairs:
            for index, known in enumerate(self._layers):
                if layer is known:
                    self._names[index] = name or self._names[index]
                    break
            else:
                _owners[layer] = weakref.ref(self)
                layer.storage.follower = _follower(self, len(self._layers))
                self._layers.append(layer)
                self._names.append(name)
                for part in self.parts.values():
                    part.attach(layer)
        self._before_step(self._step + 1)

    def detach(self) -> None:
        """Give all layers back as a model without an algorithm has them; again changes nothing.

        Ends the automatic steps, takes off whatever was put on the layers, and forgets them and what was
        learnt of them. Topologies stay as they are, and another algorithm may have the layers. `steps_done`
        stays, too: see `reset`.
        """
        if self.handle is not None:
            self.handle.remove()
        for part in self.parts.values():
            part.detach(self._layers)
        for layer in self._layers:
            layer.storage.follower = None
            _owners.pop(layer, None)
        declare_replicas(self._layers, None)
        self._layers.clear()
        self._names.clear()
        self.replicas = ALL_REPLICAS

    def reset(self) -> None:
        """`detach`, and begin anew at step 0: the same settings for another model, such as the next fold."""
        self.detach()
        self._step = 0
        self.last_update = None

    def _check_layer(self, layer: SparseLayer) -> None:
        """Raise TypeError or ValueError if the layer cannot be attached; change nothing."""
        check_count(layer, self.sparsity)

    def _before_step(self, step: int) -> None:
        """Called before optimizer step number `step`, and again when layers have been attached."""

    def _after_step(self, step: int) -> None:
        """Called when optimizer step number `step` (the first is 1) is done, before it is counted."""

    def _replaced(self, index: int, source: torch.Tensor) -> None:
        """Connections of layer number `index` were replaced by loading or drawing them anew.

        `source`, int64, is the old slot of each new slot, or -1. The optimizers' state has followed.
        """

    def track(self, optimizer: Optimizer) -> None:
        """Name an optimizer whose state must follow the connections; nothing to do where they stay."""

    def expect_passes(self, passes: int) -> None:
        """Say how many backward passes make a step; nothing to do where no gradient is looked at."""

    def consolidate(self) -> None:
        """Bring together what each of several processes keeps for itself; see `DynamicSparsityAlgorithm`."""

    def advance(self) -> None:
        """Do what `step` does, whoever asks."""
        if not self._layers:
            raise RuntimeError(
                f"{type(self).__name__}.step() was called but no sparse layer is attached. Call "
                f"model.apply(algorithm) before training, on a model that has sparse layers (see sparsify)"
            )
        self._after_step(self._step + 1)
        self._step += 1
        self._before_step(self._step + 1)

    def _config(self) -> dict[str, Any]:
        """Settings that decide what the next steps do, as plain values."""
        return {name: plain(value) for name, value in arguments(self).items() if name != "grad_accumulation"}

    def _identity(self) -> dict[str, Any]:
        """What a saved state must have in common with the algorithm that takes it."""
        return {
            "algorithm": type(self).__name__,
            "config": self._config(),
            "layers": [{"shape": list(layer.shape), "nnz": layer.nnz} for layer in self._layers],
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume, in plain values and tensors.

        The topology itself is in the ``state_dict`` of the model, the moments in that of the optimizer. There
        is no random state: draws depend on the seed, the layer and the step only.
        """
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return {**self._identity(), "step": self._step, "parts": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned, with the same layers attached in the same order.

        Load the model's state first: it holds the topology that this state belongs to.

        Parameters
        ----------
        state : mapping
            Read only.

        Raises
        ------
        TypeError, ValueError
            If `state` lacks something, or was saved by another algorithm, with other settings, or for
            other layers. Nothing has been changed then.
        """
        self._check_state(state)
        self._load_state(state)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raise if `state` does not fit; change nothing."""
        ours, parts = self._identity(), list(self.parts)
        if missing := sorted({*ours, "step", "parts"} - state.keys()):
            raise ValueError(f"state must be what state_dict() returned, got one that lacks {missing}")
        if state["algorithm"] != ours["algorithm"]:
            raise ValueError(
                f"state must be of the same algorithm, got it saved by {state['algorithm']}, but this is "
                f"{ours['algorithm']}"
            )
        if changed := differences(state["config"], ours["config"]):
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
        require_count("state['step']", state["step"])
        if sorted(state["parts"]) != sorted(parts):
            raise ValueError(f"state['parts'] must be those of {parts}, got {list(state['parts'])}")
        for name, part in self.parts.items():
            part.check_state(state["parts"][name])

    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Take back a state that has been checked."""
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self._step = int(state["step"])
        self._before_step(self._step + 1)


def _name(layer: SparseLayer) -> str:
    return f"a layer of shape {tuple(layer.shape)}"


def _follower(algorithm: SparsityAlgorithm, index: int) -> Callable[[torch.Tensor], None]:
    """What tells an algorithm, which it does not keep alive, of connections that were replaced."""
    reference = weakref.ref(algorithm)

    def follow(source: torch.Tensor) -> None:
        if (alive := reference()) is not None:
            alive._replaced(index, source)

    return follow
