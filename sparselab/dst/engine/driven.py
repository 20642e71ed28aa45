"""What steps along with an optimizer: one algorithm, or a group of them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from typing import Any, TypeVar

from torch.optim.optimizer import Optimizer

from sparselab.dst.optimizers import held_ids
from sparselab.nn.layers.base import SparseLayer

Self = TypeVar("Self", bound="Driven")


class StepHandle:
    """What ``attach(model, optimizer)`` returns: the automatic steps, and how to end them.

    Parameters
    ----------
    driven : Driven
    optimizer : torch.optim.Optimizer
    """

    def __init__(self, driven: Driven, optimizer: Optimizer) -> None:
        self._driven, self._reference = driven, weakref.ref(optimizer)
        self._hook = optimizer.register_step_post_hook(lambda *_: driven.advance())

    def __deepcopy__(self, memo: dict[int, Any]) -> StepHandle | None:
        """The steps of the copy, along with the copy of the optimizer, which has no hooks of its own."""
        if self.optimizer is None:
            return None
        return StepHandle(copy.deepcopy(self._driven, memo), copy.deepcopy(self.optimizer, memo))

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, while it lives."""
        return self._reference()

    def remove(self) -> None:
        """End the automatic steps; again changes nothing.

        Layers stay attached, and ``step()`` may be called by hand from now on. ``detach()`` gives the layers
        back, and ends the automatic steps, too.
        """
        self._hook.remove()
        if self._driven.handle is self:
            self._driven.handle = None


class Driven:
    """Finishes optimizer steps, called by hand or by an optimizer, but never by both.

    Attributes
    ----------
    handle : StepHandle or None
        What steps it; None where that is left to whoever calls `step`.
    """

    handle: StepHandle | None = None

    @property
    def layers(self) -> tuple[SparseLayer, ...]:
        """The attached layers."""
        raise NotImplementedError

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        """A copy that drives the copies of the layers."""
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.layers:
            raise TypeError(
                f"a {type(self).__name__} must not be attached when it is pickled or copied by itself: what "
                "it drives would not come along. Save its state_dict(), beside those of the model and the "
                "optimizer, and load it into a new one; copy all three by copy.deepcopy((model, optimizer, "
                "algorithm))"
            )
        return super().__reduce_ex__(protocol)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.handle is not None and self.handle.optimizer is not None:  # of a copy, its own
            self.track(self.handle.optimizer)

    def step(self) -> None:
        """Count one finished optimizer step, and rewire the layers if it is time.

        Raises
        ------
        RuntimeError
            If no layer is attached, it was attached with an optimizer and so steps by itself, or what has
            stepped since the last time is an optimizer of other weights.
        """
        if self._is_driven():
            raise RuntimeError(
                f"step() must not be called on a {type(self).__name__} that was attached with an optimizer: "
                f"it steps by itself after every optimizer.step(), and each would count twice. Leave the "
                f"call out, or call remove() on what attach(model, optimizer) returned"
            )
        self._check_stepped()
        self.advance()

    def _is_driven(self) -> bool:
        """Whether an optimizer that is alive takes the steps."""
        return self.handle is not None and self.handle.optimizer is not None

    def advance(self) -> None:
        """Do what `step` does, whoever asks."""
        raise NotImplementedError

    def track(self, optimizer: Optimizer) -> None:
        """Name an optimizer whose state must follow the connections."""
        raise NotImplementedError

    def _check_stepped(self) -> None:
        """Raise RuntimeError if it can be told that another model has been trained."""

    def _check_optimizer(
        self, optimizer: Optimizer | None, layers: Iterable[tuple[str, SparseLayer]]
    ) -> Optimizer | None:
        """The optimizer itself, unwrapped; raise if it could not drive the training of these layers."""
        if optimizer is None:
            return None
        # Accelerate wraps optimizers in one whose hooks torch does not call.
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if self._is_driven():
            raise RuntimeError(
                f"a {type(self).__name__} must step along with one optimizer, got another; call remove() on "
                f"what the first attach(model, optimizer) returned"
            )
        held = held_ids(optimizer)
        trained = [(name, layer) for name, layer in layers if layer.stored.requires_grad]
        if missing := [name for name, layer in trained if id(layer.stored) not in held]:
            raise ValueError(
                f"optimizer must hold the weights of the sparse layers, got one without those of {missing}. "
                f"Make it from model.parameters() after sparsify(model, ...), which replaces the weights "
                f"(and of this model, not of a copy)"
            )
        return optimizer

    def _drive(self, optimizer: Optimizer | None) -> StepHandle | None:
        """Step along from now on."""
        if optimizer is None:
            return None
        self.track(optimizer)
        self.handle = StepHandle(self, optimizer)
        return self.handle
