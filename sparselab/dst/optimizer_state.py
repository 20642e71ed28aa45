"""Optimizer state follows the connections.

An optimizer keeps momentum and the like in one tensor per parameter, entry for entry. When a layer drops and
grows connections the entries of ``values`` move, and whatever is kept per entry has to move with them; else
a moment silently ends up at a connection it was never measured on. (The layer itself moves the weights and
their gradient.)
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from sparselab.kernels._rewrite import move_entries

#: Moving a number needs its width only.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Hooks whose tracker is gone. The garbage collector may take a tracker while torch walks over its hooks, and
# removing one there would be an error in the middle of an optimizer step; so it waits.
_retired_hooks: list[RemovableHandle] = []


class HasValues(Protocol):
    """Anything with a parameter of live weights."""

    @property
    def values(self) -> torch.nn.Parameter:
        """The live weights."""


class OptimizerTracker:
    """Remembers which optimizers step the layers of one algorithm.

    While it is watching, a hook that torch calls after every optimizer step of the process looks at the
    parameters of each optimizer it has not seen before. Optimizers are held weakly, and so is the tracker by
    its hook, which does nothing once the tracker is gone and is removed when the next one starts to watch.

    Parameters
    ----------
    layers : sequence of layers
        Read at each step, so that layers may be added later, and ``values`` replaced by loading.
    """

    def __init__(self, layers: Sequence[HasValues]) -> None:
        self._layers = layers
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._watching = False

    def watch(self) -> None:
        """Start noticing optimizers as they step; calling it again changes nothing."""
        if self._watching:
            return
        self._watching = True
        while _retired_hooks:
            _retired_hooks.pop().remove()
        tracker = weakref.ref(self)

        def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if (alive := tracker()) is not None:
                alive._note(optimizer)

        weakref.finalize(self, _retired_hooks.append, register_optimizer_step_post_hook(after_step))

    def add(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember `optimizer` whether or not it has stepped.

        Raises
        ------
        TypeError
            If it keeps no ``param_groups`` and ``state`` as torch optimizers do.
        """
        if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "state")):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, or offer its param_groups and state; "
                f"got {type(optimizer).__name__}"
            )
        self._optimizers.add(optimizer)

    def _note(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer in self._optimizers:
            return
        ours = {id(layer.values) for layer in self._layers}
        if any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            self._optimizers.add(optimizer)

    def plan_move(self, values: torch.nn.Parameter) -> StateMove:
        """Find everything that must move with `values`, before anything is changed.

        Raises
        ------
        RuntimeError
            If some optimizer keeps state for `values` that is not one entry per connection.
        """
        return StateMove(values, self._optimizers)


class StateMove:
    """What has to follow the entries of one parameter; made before the rewrite, applied after it.

    Parameters
    ----------
    values : Parameter, (nnz,)
        The live weights of a layer.
    optimizers : iterable of optimizers
        Those that may keep state for it.

    Raises
    ------
    RuntimeError
        If the state of `values` has a tensor of another shape, or tensors inside a container. Nothing has
        been changed then.
    """

    def __init__(self, values: torch.nn.Parameter, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self._values = values
        self._places: list[tuple[dict[str, Any], str]] = []
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                if any(p is values for group in optimizer.param_groups for p in group["params"]):
                    raise RuntimeError(_unmovable(optimizer, "its state is one vector over all parameters"))
            elif values in optimizer.state:
                self._collect(optimizer, optimizer.state[values])

    def _collect(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        for name, entry in state.items():
            if isinstance(entry, torch.Tensor):
                if entry.shape == self._values.shape:
                    self._places.append((state, name))
                elif entry.numel() > 1:
                    shapes = f"{tuple(entry.shape)}, not {tuple(self._values.shape)}"
                    raise RuntimeError(_unmovable(optimizer, f"state {name!r} has shape {shapes}"))
            elif _holds_tensor(entry):
                raise RuntimeError(_unmovable(optimizer, f"state {name!r} is a {type(entry).__name__}"))

    @torch.no_grad()
    def apply(self, source: torch.Tensor) -> None:
        """Move every entry: ``new[i] = old[source[i]]``, and 0 where ``source[i] == -1``.

        Parameters
        ----------
        source : int64 tensor, (new nnz,)
            Old slot of each new slot, or -1.
        """
        for state, name in self._places:
            state[name] = follow(state[name], source)


@torch.no_grad()
def follow(entries: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """``new[i] = old[source[i]]``, and 0 where ``source[i] == -1``: in place if the length stays the same.

    In place, so that other references to the tensor see it.
    """
    integers = _INTEGERS.get(entries.itemsize)
    if integers is not None and entries.is_contiguous() and not entries.is_complex():
        old = entries.detach().cpu().view(integers).numpy()
        moved = torch.from_numpy(move_entries(old, source.cpu().numpy())).view(entries.dtype)
    else:
        # One more entry, so that -1 reads a zero.
        moved = torch.cat((entries, entries.new_zeros(1)))[source.to(entries.device)]
    if entries.shape == moved.shape:
        return entries.copy_(moved)
    return moved.to(entries.device)


def _holds_tensor(entry: object) -> bool:
    if isinstance(entry, torch.Tensor):
        return True
    if isinstance(entry, dict):
        return any(_holds_tensor(item) for item in entry.values())
    if isinstance(entry, (list, tuple, set)):
        return any(_holds_tensor(item) for item in entry)
    return False


def _unmovable(optimizer: torch.optim.Optimizer, what: str) -> str:
    return (
        f"the state that {type(optimizer).__name__} keeps for a sparse layer cannot follow its connections: "
        f"{what}. Only state with one entry per connection can be moved; use an optimizer that keeps such "
        f"state (SGD, Adam, AdamW, RMSprop, ...) for sparse layers, or the Static algorithm"
    )
