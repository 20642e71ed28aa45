"""Which optimizers step the layers of an algorithm, so that their state follows the connections."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sparselab.dst.optimizers import call_while_alive, held_ids, require_shards_apart, shard_of
from sparselab.nn.follow.optimizers import is_reported, note_step
from sparselab.nn.follow.state_move import StateMove, group_of
from sparselab.nn.layers.base import SparseLayer


class OptimizerTracker:
    """Remembers which optimizers step the layers of one algorithm.

    While it is watching, a hook that torch calls after every optimizer step of the process looks at the
    parameters of each optimizer it has not seen before. Optimizers are held weakly, and so is the tracker by
    its hook, which does nothing once the tracker is gone and is removed when the next one starts to watch.

    Parameters
    ----------
    layers : sequence of layers
        Read at each step, so that layers may be added later, and ``stored`` replaced by loading.
    stepped : callable, optional
        Called after each step of an optimizer that has a layer, unless it has been `finished` by then, with
        the `id` of every Parameter that the optimizer has.
    moving : callable, optional
        Whether connections will move at all: where not, any optimizer will do.
    """

    def __init__(
        self,
        layers: Sequence[SparseLayer],
        stepped: Callable[[set[int]], None] | None = None,
        moving: Callable[[], bool] = lambda: True,
    ) -> None:
        self._layers = layers
        self._moving = moving
        self._when_stepped = stepped
        #: With the number of the note that was taken of each last.
        self._optimizers: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
        self._n_notes = 0
        #: Steps that were seen of these optimizers.
        self._n_steps = 0
        #: Those whose state has been checked, after a step of all their layers.
        self._looked_at: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._watching = False
        #: Whether an optimizer is within a step, and whether `finished` was called since that began.
        self._within = self._finished = False
        self._stepped = _Stepped()
        #: How many steps there were, and what the gradients were, at the last `check`.
        self._checked: tuple[int, list[tuple[weakref.ref[torch.Tensor], int]]] = (-1, [])

    def __getstate__(self) -> dict[str, Any]:
        # No pickle takes weak references, so they are left out where there are none.
        kept = {name: value for name, value in self.__dict__.items() if name not in _WEAK or value}
        return {**kept, "_checked": (-1, [])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Hooks call the tracker that they were made for; a copy asks for its own.
        self.__dict__.update({name: make() for name, make in _WEAK.items()})
        self.__dict__.update(state, _watching=False, _within=False, _finished=False)
        if state["_watching"]:
            self.watch()

    def watch(self) -> None:
        """Start noticing optimizers as they step; calling it again changes nothing."""
        if not self._watching:
            self._watching = True
            call_while_alive(self, "_begin", register_optimizer_step_pre_hook)
            call_while_alive(self, "_note", register_optimizer_step_post_hook)

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
        if not is_reported(optimizer):
            note_step(optimizer)
        if (shard := shard_of(optimizer)) is not None:
            self.add(shard)
        self._n_notes += 1
        self._optimizers[optimizer] = self._n_notes

    def forget(self) -> None:
        """Forget all optimizers."""
        self._optimizers.clear()
        self._looked_at.clear()
        self._stepped = _Stepped()

    def finished(self) -> None:
        """Take note that the algorithm has counted the optimizer's step.

        Torch calls an optimizer's own hooks, which may do that, before the one that sees the step here.
        """
        self._finished = self._within

    def check_follows(self, optimizer: Any, layers: Iterable[SparseLayer]) -> None:
        """See to it, as early as it can be known, that state will be able to follow the connections.

        Raises
        ------
        RuntimeError
            If the optimizer keeps, or is known to keep, other state for one of these layers that is trained.
        """
        if self._moving():
            require_shards_apart(optimizer)
        for layer in layers if self._moving() else ():
            if layer.stored.requires_grad:
                StateMove(layer, [optimizer])

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer not in self._optimizers and (ours := self._layers_in(held_ids(optimizer))):
            self.check_follows(optimizer, ours)
        self._within, self._finished = True, False

    def _note(self, optimizer: torch.optim.Optimizer) -> None:
        self._within, finished = False, self._finished
        held = held_ids(optimizer)
        if optimizer in self._optimizers or self._layers_in(held):
            self._look_at(optimizer, held)
            self.add(optimizer)
            self._stepped.ours = True
            self._n_steps += 1
            if self._when_stepped is not None and not finished:
                self._when_stepped(held)
        else:
            self._stepped.other = type(optimizer).__name__

    def _look_at(self, optimizer: torch.optim.Optimizer, held: set[int]) -> None:
        """Check the state after a step, until all layers that the optimizer has took part in one."""
        if optimizer not in self._looked_at:
            ours = self._layers_in(held)
            self.check_follows(optimizer, ours)
            if all(layer.stored.grad is not None for layer in ours):
                self._looked_at.add(optimizer)

    def _layers_in(self, held: set[int]) -> list[SparseLayer]:
        return [layer for layer in self._layers if id(layer.stored) in held]

    def check(self, name: str) -> None:
        """Look at who has stepped since the last call: somebody must train the layers of algorithm `name`.

        Nothing is said where an optimizer was named that torch does not report, or none is known.

        Raises
        ------
        RuntimeError
            If it was only optimizers of other weights, and no other is known.

        Warns
        -----
        UserWarning
            If it was only those, but one of these weights is known; or if nobody has stepped, and no backward
            pass has come.
        """
        stepped, self._stepped = self._stepped, _Stepped()
        unseen = not all(isinstance(each, torch.optim.Optimizer) for each in self._optimizers)
        nothing = self._nothing_since()
        if unseen or stepped.ours:
            return
        if not stepped.other:
            if self._n_steps and nothing:
                warnings.warn(
                    f"{name}.step() was called again without a step of the optimizer or a backward pass "
                    f"since: it counts one step for each call",
                    stacklevel=4,
                )
            return
        what = (
            f"{name}.step() must follow a step of the optimizer that trains the layers it is attached to, "
            f"got only {stepped.other} with other weights since the last. If those are the weights of a copy "
            f"of the model, attach an algorithm to the copy; if torch does not see the right optimizer step, "
            f"call track(optimizer)"
        )
        if not self._optimizers:
            raise RuntimeError(what)
        warnings.warn(what, stacklevel=4)

    def _nothing_since(self) -> bool:
        """Whether no optimizer has stepped and no gradient has changed since this was asked last.

        Without a gradient that cannot be told.
        """
        held = [each for layer in self._layers if (each := layer.stored.grad) is not None]
        steps, gradients = self._checked
        self._checked = self._n_steps, [(weakref.ref(each), each._version) for each in held]
        return (
            steps == self._n_steps
            and len(gradients) == len(held) > 0
            and all(
                known() is each and version == each._version
                for (known, version), each in zip(gradients, held, strict=True)
            )
        )

    def find(self, layer: SparseLayer) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Settings and state of the optimizer that stepped a layer last; both empty if none is known."""
        weights = layer.stored
        for optimizer in sorted(self._optimizers, key=self._optimizers.__getitem__, reverse=True):
            if (group := group_of(optimizer, weights)) is not None:
                return group, (shard_of(optimizer) or optimizer).state.get(weights, {})
        return {}, {}

    def plan_move(self, layer: SparseLayer) -> StateMove:
        """Find everything that must move with the connections of `layer`, before anything is changed.

        Raises
        ------
        RuntimeError
            If some optimizer keeps state for ``layer.stored`` that is not one entry per entry.
        """
        return StateMove(layer, self._optimizers)


#: Attributes of a tracker that refer weakly.
_WEAK: dict[str, Any] = {"_optimizers": weakref.WeakKeyDictionary, "_looked_at": weakref.WeakSet}


class _Stepped(threading.local):
    """Whose optimizers have stepped in this thread: of these layers, or of other weights."""

    ours = False
    other = ""

    def __reduce__(self) -> tuple[type[_Stepped], tuple[()]]:
        # A copy has seen nothing.
        return _Stepped, ()
