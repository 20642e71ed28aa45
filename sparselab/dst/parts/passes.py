"""Which backward passes make up the gradient of one optimizer step, and what they are made of."""

from __future__ import annotations

import abc
import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sparselab.dst.parts.agreed import Meeting, Operands
from sparselab.dst.parts.dense_gradient import GradientSummary, summarise
from sparselab.kernels.arrays import Array
from sparselab.nn.follow.replicas import is_replicated
from sparselab.nn.layers.base import SparseLayer, as_matrix
from sparselab.nn.ops.operands import GradientOperands
from sparselab.nn.ops.tracing import uncompiled


class PassCount:
    """How many backward passes make up the gradient of one optimizer step, as far as that is known.

    Attributes
    ----------
    told : int
        What somebody said; 0 if nobody did.
    learnt : int
        The most passes that a finished step had; 0 before the first.
    """

    def __init__(self, told: int = 0) -> None:
        self.told = told
        self.learnt = 0

    @property
    def expected(self) -> int | None:
        """Passes after which no other is expected; None while that is not known."""
        return max(self.told, self.learnt) or None

    def learn(self, passes: int) -> None:
        """Take note of a finished step."""
        self.learnt = max(self.learnt, passes)


class PassWatcher(abc.ABC):
    """Sees the operands of the backward passes that reach a layer's gradient, one pass at a time.

    Operands come through the layer's gradient hook and wait until the pass adds to ``.grad``: those of a pass
    that never does (`torch.autograd.grad`, a gradient by the input alone) are let go at its end. Passes are
    told apart by the number that torch gives each; passes within a pass, as activation checkpointing makes
    them, have numbers of their own.

    Parameters
    ----------
    layer : SparseLayer
        Held weakly, because the layer holds the watcher.
    """

    def __init__(self, layer: SparseLayer) -> None:
        self._layer = weakref.ref(layer)
        self._settled = False
        self._waiting: dict[int, list[GradientOperands]] = {}
        #: ``.grad`` after the last pass, and its version; None if there has been none in this step.
        self._grad: tuple[weakref.ref[Tensor], int] | None = None
        self._parameter: weakref.ref[torch.nn.Parameter] | None = None
        self._handle: RemovableHandle | None = None
        self._follow(layer)
        layer.gradient_hook = self.see

    def __deepcopy__(self, memo: dict[int, Any]) -> PassWatcher:
        """One that watches the copy of the layer, which is copied with it."""
        new: PassWatcher = object.__new__(type(self))
        memo[id(self)] = new
        layer = self._layer()
        bound = dict.fromkeys(("_handle", "_parameter", "_grad"))
        state = {
            name: value for name, value in vars(self).items() if name not in (*bound, "_layer", "_waiting")
        }
        new.__dict__.update(copy.deepcopy(state, memo), **bound, _layer=self._layer, _waiting={})
        if layer is not None:
            twin = copy.deepcopy(layer, memo)
            new._layer = weakref.ref(twin)
            new._follow(twin)
            twin.gradient_hook = new.see
            if self._grad is not None and twin.stored.grad is not None:
                new._note(twin.stored.grad)
        return new

    def _follow(self, layer: SparseLayer) -> None:
        """Watch the Parameter that the layer has now, if it is trained."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        parameter: Any = layer.stored
        if parameter.requires_grad:
            self._parameter = weakref.ref(parameter)
            # Weak, because the garbage collector does not see the hooks that a Parameter holds.
            arrived = weakref.WeakMethod(self._arrived)
            register: Any = parameter.register_post_accumulate_grad_hook
            self._handle = register(partial(_call, arrived))

    def release(self) -> None:
        """Stop watching."""
        layer = self._layer()
        if layer is not None and layer.gradient_hook == self.see:
            layer.gradient_hook = None
        if self._handle is not None:
            self._handle.remove()
        self._waiting = {}

    def settle(self, parameters: set[int]) -> None:
        """Take note that an optimizer has made its step: of its layers, look at no more passes.

        Parameters
        ----------
        parameters : set of int
            The `id` of every Parameter that it has.
        """
        layer = self._layer()
        if layer is not None and id(layer.stored) in parameters:
            self.arrive()
            self._settled = self._stepped(layer.stored)

    def arrive(self) -> None:
        """Take in the pass under way, if it has added to ``.grad``: a hook may step before ours is called."""
        layer, task = self._layer(), torch._C._current_graph_task_id()
        if layer is not None and task in self._waiting and layer.stored.grad is not None:
            self._ends(layer.stored, self._waiting.pop(task))

    def see(self, operands: GradientOperands) -> None:
        """The layer's gradient hook."""
        if self._settled:
            return
        layer, task = self._layer(), torch._C._current_graph_task_id()
        if task < 0 or layer is None:  # not in a backward pass: somebody calls the operator
            return
        stored: Tensor = layer.stored
        if not isinstance(stored, torch.nn.Parameter):  # what `functional_call` has put in its place
            return
        if self._parameter is None or self._parameter() is not stored:
            self._follow(layer)
        if task not in self._waiting:
            self._waiting[task] = []
            self._begins(stored)
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(self._forget, task))
        self._waiting[task].append(operands)

    def _forget(self, task: int) -> None:
        """At the end of a pass."""
        self._waiting.pop(task, None)
        if self._grad is not None and self._is_replicated():
            # After torch's own callback, which puts the mean over processes there, maybe as another tensor.
            torch.autograd.Variable._execution_engine.queue_callback(self._look_again)

    def _look_again(self) -> None:
        layer = self._layer()
        if layer is not None and self._grad is not None and layer.stored.grad is not None:
            self._note(layer.stored.grad)

    def _is_replicated(self) -> bool:
        """Whether other processes have a part of the gradient."""
        layer = self._layer()
        return layer is not None and is_replicated(layer)

    def _arrived(self, parameter: Tensor) -> None:
        operands = self._waiting.pop(torch._C._current_graph_task_id(), [])
        if self._settled:
            return
        if parameter.grad is None:
            self._taken()
        else:
            self._ends(parameter, operands)

    def _taken(self) -> None:  # noqa: B027
        """A pass has added to ``.grad``, and another hook has emptied it since."""

    def _note(self, grad: Tensor) -> None:
        """Take note of ``.grad`` as a pass has left it."""
        self._grad = weakref.ref(grad), grad._version

    def _is_emptied(self, grad: Tensor | None) -> bool:
        """Whether nothing is in ``.grad`` of the passes before: it is None, or was zeroed since the last."""
        if grad is None or self._grad is None:
            return grad is None
        known, version = self._grad
        return (grad is not known() or grad._version != version) and not bool(grad.any())

    @abc.abstractmethod
    def _begins(self, parameter: Tensor) -> None:
        """A pass brings its first operands, and has not yet added to ``parameter.grad``."""

    @abc.abstractmethod
    def _stepped(self, parameter: Tensor) -> bool:
        """An optimizer has made its step; whether with passes seen here.

        If not, it was the step of a gradient before, which was counted before it was made.
        """

    @abc.abstractmethod
    def _ends(self, parameter: Tensor, operands: list[GradientOperands]) -> None:
        """A pass has added to ``parameter.grad``; without operands, another way, as from a penalty."""


class GradientCollector(PassWatcher):
    """Gathers what makes up a layer's ``.grad`` in one step, and summarises its dense gradient.

    Parameters
    ----------
    layer : SparseLayer
    most : callable
        Says, once the gradient is there, how many candidates to keep, of the layer or of each row.
    passes : PassCount
        Shared by all layers of a growth.

    Attributes
    ----------
    passes_seen : int
        Backward passes in ``.grad`` now.

    Notes
    -----
    The gradient is the sum over exactly the passes that are in ``.grad``: when that is cleared (None, or
    zeroed), what came before is forgotten. A pass that adds to another tensor than the one before leaves the
    gradient unknown. As soon as as many passes have come as are expected the
    summary is formed, inside the last one, and the operands are let go. Until that is known, operands are
    held: references to tensors of the graph, and copies of inputs that somebody may overwrite.

    If a further pass adds to the same ``.grad`` after that, the gradient cannot be known any more: there is
    no summary, and `reason` says why.

    Where other processes hold replicas of the layer, operands are held until all of them meet at the update:
    what is exchanged within backward passes is torch's, and passes need not be the same in all processes.
    """

    #: Whether each process must have seen a part of the gradient; if not, those that have not add nothing.
    needs_all = False

    def __init__(self, layer: SparseLayer, most: Callable[[], int | Array], passes: PassCount) -> None:
        self._most = most
        self._passes = passes
        super().__init__(layer)
        self._reset()

    def _reset(self) -> None:
        self.passes_seen = 0
        #: Why the gradient cannot be known; empty if it can.
        self.reason = ""
        self._held: list[tuple[GradientOperands, tuple[tuple[int, int], ...]]] = []
        self._summary: GradientSummary | None = None
        #: Of the topology that the first pass met.
        self._stamp: Any = None
        self._grad = None

    def _begins(self, parameter: Tensor) -> None:
        grad = parameter.grad
        if self._grad is None:
            older = grad is not None and bool(grad.any())
            self.reason = "part of the gradient is older than the step" if older else ""
            return
        if self._is_emptied(grad):
            self._reset()
        elif grad is not self._grad[0]():
            self._reset()
            self.reason = "part of the gradient was put there by hand"

    def _ends(self, parameter: Tensor, operands: list[GradientOperands]) -> None:
        grad, before = parameter.grad, self._grad
        assert grad is not None
        if not operands:
            if before is not None and (grad is not before[0]() or grad._version > before[1] + 1):
                self._reset()  # it was cleared before this pass
            elif before is not None:
                self._note(grad)
            return
        self._note(grad)
        self.passes_seen += 1
        self._note_topology()
        if self._summary is not None:
            self._summary = None
            self.reason = (
                f"{self.passes_seen} backward passes, after the gradient was formed from "
                f"{self.passes_seen - 1}"
            )
            self._warn()
        elif not self.reason and self.passes_seen == self._passes.expected and not self._is_replicated():
            self._finish([*self._operands(), *operands])
        elif not self.reason:
            self._hold(operands)

    def _taken(self) -> None:
        self._reset()
        self.reason = "a hook has emptied .grad within the backward pass"

    def _hold(self, operands: list[GradientOperands]) -> None:
        for each in operands:
            kept = each if each.of_graph else each.with_input(each.tensors[0].clone())
            self._held.append((kept, _versions(kept)))

    def _operands(self) -> list[GradientOperands]:
        """Those held; none if one was overwritten."""
        if any(_versions(each) != versions for each, versions in self._held):
            self.reason = "what the gradient is made of was overwritten"
            return []
        return [each for each, _ in self._held]

    def _warn(self) -> None:
        warnings.warn(
            f"the update of a layer is skipped: an optimizer step had {self.passes_seen} backward passes "
            f"where {self.passes_seen - 1} were expected. Pass grad_accumulation=<most backward passes in an "
            "optimizer step> to the algorithm",
            stacklevel=2,
        )

    def _stepped(self, parameter: Tensor) -> bool:
        """Form the summary of what is in ``.grad`` now, if nothing was seen to end it before."""
        if self._is_emptied(parameter.grad):
            self._reset()
        self.summary()
        return self.passes_seen > 0

    def summary(self) -> GradientSummary | None:
        """What is known of the gradient, or None if nothing is."""
        self.arrive()
        if self.passes_seen:
            self._note_topology()
        if self._summary is None and self._held and not self.reason and not self._is_replicated():
            self._finish(self._operands())
        return self._summary

    def offer(self) -> list[GradientOperands] | None:
        """What was seen of the gradient by this process, to meet with; None if that does not tell it."""
        if self.summary() is not None and not self.reason:
            self.let_go()
            self.reason = "the gradient was formed before anybody said that other processes have a part of it"
        operands = [] if self.reason else self._operands()
        return None if self.reason else operands

    def give_up(self, reason: str) -> None:
        """Know no gradient, because another process does not."""
        self.let_go()
        self.reason = self.reason or reason

    def meet(self, together: Meeting, operands: Sequence[GradientOperands]) -> None:
        """Form the summary of the gradient of all processes."""
        layer = self._layer()
        self._held = []
        if layer is not None:
            self._summary = self._form(layer, operands, together)

    def _note_topology(self) -> None:
        """Let go of what was seen if the connections have been replaced since the first pass."""
        layer = self._layer()
        stamp = None if layer is None else layer.storage.stamp(layer)
        if self._stamp is None:
            self._stamp = stamp
        elif self._stamp != stamp:
            self.let_go()
            self.reason = "the connections were replaced after a backward pass"

    def let_go(self) -> None:
        """Let go of what was seen, which takes as much room as the weights."""
        self._summary = None
        self._held = []

    def _finish(self, operands: Sequence[GradientOperands]) -> None:
        layer = self._layer()
        self._held = []
        if layer is not None and not self.reason:
            self._summary = self._form(layer, operands)

    def _form(self, layer: SparseLayer, operands: Operands, others: Meeting | None = None) -> GradientSummary:
        form = summarise if others is None else others.summarise
        return form(
            operands, as_matrix(layer), layer.shape, self._most(), layer.stored.dtype, layer.block_shape
        )


@uncompiled
def _call(method: weakref.WeakMethod[Any], parameter: Tensor) -> None:
    if (alive := method()) is not None:
        alive(parameter)


def _versions(operands: GradientOperands) -> tuple[tuple[int, int], ...]:
    """What changes if a tensor is written to, or its memory taken away."""
    return tuple((tensor._version, tensor.untyped_storage().nbytes()) for tensor in operands.tensors)
