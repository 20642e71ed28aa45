"""What a loop is shown of a model: sparse, masked, or dense with RigL as the textbook has it.

The textbook is dense: W lies in one leaf, whose gradient is cut to the connections around every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparselab import MaskedLinear, SparseLinear
from sparselab.nn.layers.base import find_sparse
from tests.hazards.textbook import rigl_update

EVERY, FRACTION, IN, HIDDEN, OUT = 10, 0.3, 8, 10, 6
F64 = torch.float64


class Cut(nn.Linear):
    """A dense layer; who steps it leaves only the gradient of its connections."""

    def __init__(self, layer: SparseLinear) -> None:
        super().__init__(layer.in_features, layer.out_features, dtype=F64)
        self.load_state_dict(layer.to_dense().state_dict())
        self.register_buffer("mask", torch.zeros_like(self.weight, dtype=torch.bool))
        self.mask.view(-1)[layer.positions()] = True
        self.seen: Tensor | None = None

    def positions(self) -> Tensor:
        return self.mask.view(-1).nonzero().flatten()


class Net(nn.Module):
    """Two layers and a third one in the middle, which some passes leave out."""

    def __init__(self, make: Callable[[SparseLinear], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = (IN, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, OUT)
        first, middle, last = (SparseLinear(*each, sparsity=0.6, dtype=F64) for each in sizes)
        self.first, self.middle, self.last = make(first), make(middle), make(last)

    def forward(self, x: Tensor, use: bool = True) -> Tensor:
        x = self.first(x).tanh()
        if use:
            x = x + self.middle(x).tanh()
        return self.last(x)


MAKE: dict[str, Callable[[SparseLinear], nn.Module]] = {
    "sparse": lambda layer: layer,
    "masked": MaskedLinear.from_sparse,
    "textbook": Cut,
}


class Run:
    """A model of one kind, what trains it, and what a loop may ask of it."""

    def __init__(self, kind: str, algorithm: Any) -> None:
        self.model, self.algorithm = Net(MAKE[kind]), algorithm
        self.cut = [layer for layer in self.model.modules() if isinstance(layer, Cut)]
        self.steps = 0
        self.kept: Any = None
        self.optimizers: list[Any] = []
        self.driven = False
        if algorithm is not None:
            algorithm.attach(self.model)
        self.parameters = list(self.model.parameters())
        self.optimizer = self.sgd()

    def sgd(self, parameters: Any = None, lr: float = 0.05, momentum: float = 0.0) -> torch.optim.SGD:
        return self.watched(
            torch.optim.SGD(self.parameters if parameters is None else parameters, lr, momentum)
        )

    def watched(self, optimizer: Any) -> Any:
        self.optimizers.append(optimizer)
        if self.cut:
            optimizer.register_step_pre_hook(self._cut)
            optimizer.register_step_post_hook(self._restore)
        return optimizer

    def _held(self, optimizer: Any) -> list[Cut]:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [layer for layer in self.cut if id(layer.weight) in held]

    def _cut(self, optimizer: Any, *_: Any) -> None:
        for layer in self._held(optimizer):
            grad = layer.weight.grad
            layer.seen = None if grad is None else grad.clone()
            if grad is not None:
                grad[~layer.mask] = 0

    def _restore(self, optimizer: Any, *_: Any) -> None:
        for layer in self._held(optimizer):
            if layer.seen is not None:
                layer.weight.grad.copy_(layer.seen)

    def drive(self) -> None:
        """Let the optimizer step the algorithm."""
        if not self.driven:
            self.driven = True
            if self.algorithm is None:
                self.optimizer.register_step_post_hook(lambda *_: self._count())
            else:
                self.algorithm.attach(self.model, self.optimizer)

    def algorithm_step(self) -> None:
        if self.algorithm is not None:
            self.algorithm.step()
        else:
            self._count()

    def _count(self) -> None:
        self.steps += 1
        if self.steps % EVERY == 0:
            for layer in self.cut:
                if layer.seen is not None:
                    before = layer.mask.clone()
                    rigl_update(layer.weight, layer.mask, layer.seen, FRACTION)
                    for state in (each.state[layer.weight] for each in self._holding(layer)):
                        if state.get("momentum_buffer") is not None:
                            state["momentum_buffer"][~(before & layer.mask)] = 0

    def _holding(self, layer: Cut) -> list[Any]:
        return [each for each in self.optimizers if layer in self._held(each)]

    @property
    def layers(self) -> list[Any]:
        return self.cut or [layer for _, layer in find_sparse(self.model)]

    def finish(self) -> None:
        """What most loops end with."""
        self.optimizer.step()
        self.algorithm_step()

    def weights(self) -> Iterator[Tensor]:
        for layer in self.layers:
            dense = layer if isinstance(layer, Cut) else layer.to_dense()
            yield from (dense.weight.detach(), layer.bias.detach())
