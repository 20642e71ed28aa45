"""Growth by momentum: an average of the dense gradient over many steps, for layers that can afford one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from sparselab.dst.checks import require_count, require_finite
from sparselab.dst.parts.grow import GradientGrowth, Growth
from sparselab.dst.parts.passes import PassWatcher
from sparselab.dst.replicas import Ranks
from sparselab.dst.view import LayerUpdate, LayerView
from sparselab.kernels.arrays import Array
from sparselab.kernels.rewiring.topk import StreamedTopK
from sparselab.nn.layers.base import SparseLayer
from sparselab.nn.ops.operands import GradientOperands


class GradientAverage(PassWatcher):
    """Sits on a layer and keeps ``M <- momentum * M + G`` of its dense gradient, ``G = dY^T X``.

    Parameters
    ----------
    layer : SparseLayer
        M has its shape and dtype, but is at least float32.
    momentum : float
        What a step leaves of M, in [0, 1).

    Attributes
    ----------
    entries : tensor, (out_features, in_features), or None
        M; None until a gradient has come.
    is_partial : bool
        Whether M has what only this process of several has seen.

    Notes
    -----
    G is the sum over the passes that are in ``.grad`` at the step: what was cleared before is forgotten. It
    lies beside M, as large, from the first pass of a step to its end.

    Of several processes each averages the gradient of its own part of the batch. The mean of their averages
    is the average of their mean, so they need not meet before somebody looks at it.
    """

    def __init__(self, layer: SparseLayer, momentum: float) -> None:
        self.shape = layer.shape
        self.dtype = torch.promote_types(layer.stored.dtype, torch.float32)
        self.entries: torch.Tensor | None = None
        self.is_partial = False
        self._momentum = momentum
        #: Whether M has been moved on in this step.
        self._is_taken_in = False
        #: G so far.
        self._sum: torch.Tensor | None = None
        super().__init__(layer)

    @property
    def nbytes(self) -> int:
        """Memory of M, whether or not it is there yet."""
        return average_bytes(self.shape, self.dtype)

    def start_step(self) -> None:
        """The next gradient is that of a new optimizer step."""
        if not self.take_in() and not self._is_taken_in and self._is_replicated():
            self._fade()
        self._settled = self._is_taken_in = False

    @torch.no_grad()
    def _fade(self) -> None:
        """``M <- momentum * M``, if other processes have seen a gradient in this step, and this one none."""
        layer = self._layer()
        grad = None if layer is None else layer.stored.grad
        if self.entries is not None and grad is not None and bool(grad.any()):
            self.entries.mul_(self._momentum)
            self.is_partial = True

    def meet(self, ranks: Ranks) -> None:
        """Let M be the mean over processes, of which those that have none count as 0."""
        if ranks.numbers([self.entries is not None]).any():
            if self.entries is None:
                layer = self._layer()
                place = None if layer is None else layer.stored.device
                self.entries = torch.zeros(self.shape, dtype=self.dtype, device=place)
            ranks.mean_(self.entries)
        self.is_partial = False

    @torch.no_grad()
    def take_in(self) -> bool:
        """``M <- momentum * M + G``, if there is a G; returns whether."""
        self.arrive()
        gradient, self._sum, self._grad = self._sum, None, None
        if gradient is None:
            return False
        self.entries = gradient if self.entries is None else self.entries.mul_(self._momentum).add_(gradient)
        self._is_taken_in = True
        self.is_partial = self._is_replicated()
        return True

    def _begins(self, parameter: torch.Tensor) -> None:
        if self._is_emptied(parameter.grad):
            self._sum = self._grad = None

    def _stepped(self, parameter: torch.Tensor) -> bool:
        if self._is_emptied(parameter.grad):
            self._sum = None
        return self.take_in()

    @torch.no_grad()
    def _ends(self, parameter: torch.Tensor, operands: list[GradientOperands]) -> None:
        """Add the gradient of one backward pass, unless it is not finite."""
        grad, before = parameter.grad, self._grad
        assert grad is not None
        if not operands:
            if before is not None and (grad is not before[0]() or grad._version > before[1] + 1):
                self._sum = self._grad = None  # it was cleared before this pass
            elif before is not None:
                self._note(grad)
            return
        self._note(grad)
        for each in operands:
            if each.is_finite():
                if self._sum is None:
                    self._sum = torch.zeros(self.shape, dtype=self.dtype, device=each.device)
                each.to(self.dtype).add_rows(0, self._sum)


def average_bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Memory of an average of that shape, of weights of that dtype."""
    return shape[0] * shape[1] * torch.promote_types(dtype, torch.float32).itemsize


class MomentumGrowth(Growth):
    """The positions of largest ``|M|``, ``M <- momentum * M + G``, where G is the dense gradient of a step.

    Parameters
    ----------
    momentum_bytes : int
        Memory for M over all layers. A layer has one as long as it fits into what those attached before it
        leave; every other layer grows where the gradient of the updating step alone is largest, as
        `GradientGrowth`. With 0 that is all of them.
    momentum : float
        In [0, 1).
    grad_accumulation : int
        Backward passes per optimizer step, for layers that have no M; M takes in however many come.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range.

    Notes
    -----
    M is as large as the dense weight, and every step, not only those that update, forms G beside the sparse
    gradient: ``n_tokens * out_features * in_features`` multiply-adds by the dense GEMM.
    While a step is made, G lies beside M. Backward passes with a NaN or an infinity are left out, and so is
    what was cleared from ``.grad`` before the step; clipping is not seen. M is part of the state that is
    saved. Ties go to the lower position.
    """

    def __init__(
        self, momentum_bytes: int = 64 << 20, momentum: float = 0.9, grad_accumulation: int = 1
    ) -> None:
        self.momentum_bytes = require_count("momentum_bytes", momentum_bytes)
        require_finite("momentum", momentum)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum!r}")
        self.momentum = momentum
        self._gradient = GradientGrowth(grad_accumulation)
        self.grad_accumulation = grad_accumulation
        self._averages: dict[int, GradientAverage] = {}
        self._n_seen = 0

    def prepare(self, layers: Sequence[SparseLayer], most: Callable[[int], int | Array] | None) -> None:
        """Average the gradient of the layers that may, and watch the others if the step updates."""
        for index in range(self._n_seen, len(layers)):
            layer, taken = layers[index], sum(average.nbytes for average in self._averages.values())
            if taken + average_bytes(layer.shape, layer.stored.dtype) <= self.momentum_bytes:
                self._averages[index] = GradientAverage(layer, self.momentum)
        self._n_seen = len(layers)
        for average in self._averages.values():
            average.start_step()
        others = {i: layer for i, layer in enumerate(layers) if i not in self._averages}
        self._gradient.watch(others, most)

    def expect_passes(self, passes: int) -> None:
        """Say how many backward passes the optimizer step under way sums over, and those after it."""
        self._gradient.expect_passes(passes)

    def settle(self, parameters: set[int]) -> None:
        """Leave out backward passes between the optimizer's step and the next `prepare`."""
        self._gradient.settle(parameters)
        for average in self._averages.values():
            average.settle(parameters)

    def meet(self, views: Sequence[LayerView], ranks: Ranks) -> None:
        """Average what each process has averaged, and form the gradients of the other layers together."""
        for view in views:
            if (average := self._averages.get(view.index)) is not None:
                average.take_in()
                average.meet(ranks)
        self._gradient.meet([view for view in views if view.index not in self._averages], ranks)

    def consolidate(self, ranks: Ranks) -> None:
        """Average what each process has averaged since the last update."""
        for average in self._averages.values():
            average.meet(ranks)

    def reason_to_skip(self, view: LayerView) -> str:
        """Why the layer cannot grow now; empty if it can."""
        if view.index not in self._averages:
            return self._gradient.reason_to_skip(view)
        self._averages[view.index].take_in()  # where nobody told of the optimizer's step
        entries = self._averages[view.index].entries
        if entries is None:
            return "no gradient"
        return "" if entries.isfinite().all() else "average of the gradient is not finite"

    def choose(self, update: LayerUpdate) -> Array:
        """The positions of largest ``|M|``, or ``|G|``, ascending."""
        average = self._averages.get(update.view.index)
        if average is None:
            return self._gradient.choose(update)
        assert average.entries is not None
        entries = average.entries.cpu().numpy()
        top = StreamedTopK(update.n_grow, update.kept, update.view.grid[1], entries.dtype)
        top.push(0, entries)
        return top.result()[0]

    def describe(self) -> str:
        """Name and settings, for comparing a saved run with the one that resumes it."""
        return f"MomentumGrowth({self.momentum_bytes}, {float(self.momentum)!r})"

    def detach(self, layers: Iterable[SparseLayer]) -> None:
        """Forget the averages, and take off the layers what collects them."""
        for average in self._averages.values():
            average.release()
        self._averages, self._n_seen = {}, 0
        self._gradient.detach(layers)

    def state_dict(self) -> dict[str, Any]:
        """The averages, by the number of their layer.

        Warns
        -----
        UserWarning
            If each process has a part of them.
        """
        if any(average.is_partial for average in self._averages.values()):
            warnings.warn(
                "what is saved are averages of the gradient of this process alone since the last update, of "
                "several; to resume exactly, call consolidate() of the algorithm in all of them before",
                stacklevel=2,
            )
        return {
            str(index): average.entries.clone()
            for index, average in self._averages.items()
            if average.entries is not None
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if the averages are of other layers; change nothing."""
        shapes = {name: tuple(entries.shape) for name, entries in state.items()}
        ours = {str(index): average.shape for index, average in self._averages.items()}
        if not shapes.items() <= ours.items():
            raise ValueError(
                f"the averages must be of layers {ours}, by number and shape, but those saved are of {shapes}"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the averages."""
        for index, average in self._averages.items():
            saved = state.get(str(index))
            average.entries = None if saved is None else saved.to(average.dtype, copy=True)
