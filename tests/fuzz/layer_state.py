"""A random sparse layer with its dense twin in float64."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.fuzz import adapter
from tests.fuzz.case import Case
from tests.fuzz.judge import Twin, expect_equal
from tests.fuzz.operator_judge import EPS, expect_tensor

BLOCKS = ((4, 4), (1, 8), (4, 1), (3, 5), (8, 8))
WIDTHS = (1, 2, 3, 7, 8, 16, 17, 33, 64, 80)


class Outcome(NamedTuple):
    """Output and gradients by x, W and bias of a dense layer; each with the magnitude of its terms."""

    y: tuple[Tensor, Tensor]
    dx: tuple[Tensor, Tensor]
    dW: tuple[Tensor, Tensor]
    dbias: tuple[Tensor, Tensor] | None


class LayerTwin:
    """What a layer must be: its matrix and bias, in float64, and how they are applied."""

    def __init__(self, layer: Any) -> None:
        self.matrix = Twin(adapter.matrix_shape(layer), adapter.block_of(layer))
        self.read(layer)

    def read(self, layer: Any) -> None:
        """Take over what the layer holds now."""
        weights = adapter.per_connection(layer, adapter.stored(layer))
        self.matrix.set(adapter.layer_positions(layer), weights)
        self.bias = None if layer.bias is None else layer.bias.detach().double().clone()

    def copy(self) -> LayerTwin:
        """A twin of its own."""
        return copy.deepcopy(self)

    def apply(self, layer: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        """The dense layer; `layer` only tells the settings of a convolution."""
        if not hasattr(layer, "kernel_size"):
            return torch.nn.functional.linear(x, W, bias)
        weight = W.reshape(W.shape[0], layer.in_channels // layer.groups, *layer.kernel_size)
        return torch.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    def outcome(self, layer: Any, x: Tensor, dy: Tensor | None = None) -> Outcome:
        """What must come out for x, and for the upstream gradient dy (default: ones)."""
        signed = self._outcome(layer, x, dy, False)
        sizes = self._outcome(layer, x, dy, True)
        pairs = [None if a is None else (a, b) for a, b in zip(signed, sizes, strict=True)]
        return Outcome(*pairs)  # type: ignore[arg-type]

    def _outcome(self, layer: Any, x: Tensor, dy: Tensor | None, magnitude: bool) -> list[Any]:
        tensors = [x.detach().double(), torch.from_numpy(self.matrix.dense().copy())]
        tensors += [] if self.bias is None else [self.bias]
        with torch.enable_grad():
            leaves = [(t.abs() if magnitude else t).clone().requires_grad_() for t in tensors]
            y = self.apply(layer, leaves[0], leaves[1], leaves[2] if self.bias is not None else None)
            upstream = torch.ones_like(y) if dy is None else dy.detach().double()
            gradients = torch.autograd.grad(y, leaves, upstream.abs() if magnitude else upstream)
        return [y.detach(), *gradients, *([None] * (3 - len(gradients)))]

    def expect_state(self, layer: Any, what: str) -> None:
        """Raise `Found` unless the layer holds this matrix."""
        expect_equal(adapter.layer_positions(layer), self.matrix.positions, f"{what}: positions")
        weights = adapter.per_connection(layer, adapter.stored(layer))
        expect_equal(weights, self.matrix.weights, f"{what}: weights")

    def expect_output(self, layer: Any, x: Tensor, y: Tensor, outcome: Outcome) -> None:
        """Raise `Found` unless an output is right."""
        expect_tensor(y, *outcome.y, self.matrix.shape[1] + 1, EPS[x.dtype], "output")

    def expect_gradients(self, layer: Any, x: Tensor, outcome: Outcome) -> None:
        """Raise `Found` unless all gradients are right."""
        eps, tokens = EPS[x.dtype], math.prod(outcome.y[0].shape) // max(self.matrix.shape[0], 1)
        if x.grad is not None:
            terms = self.matrix.shape[0] * math.prod(getattr(layer, "kernel_size", (1,)))
            expect_tensor(x.grad, *outcome.dx, terms, eps, "gradient of x")
        dW = [torch.from_numpy(self.matrix.gather(each.numpy())) for each in outcome.dW]
        got = torch.from_numpy(adapter.per_connection(layer, adapter.stored(layer).grad))
        expect_tensor(got, dW[0], dW[1], tokens, eps, "gradient of the weights")
        if outcome.dbias is not None:
            expect_tensor(layer.bias.grad, *outcome.dbias, tokens, eps, "gradient of the bias")


def draw_layer(case: Case, kind: str, *, masked: bool) -> tuple[Any, LayerTwin]:
    """A random layer of that kind, or the masked twin of one."""
    torch.manual_seed(int(case.rng.integers(2**31)))
    dtype = case.pick((torch.float32,) * 3 + (torch.float64,))
    density = case.pick((0.0, 0.05, 0.2, 0.5, 1.0))
    sizes = case.pick(WIDTHS), case.pick(WIDTHS)
    others: dict[str, Any] = {}
    if kind == "BlockSparseLinear":
        others["block_shape"] = case.pick(BLOCKS)
    if kind == "SparseConv2d":
        groups = case.pick((1, 1, 2, 3))
        sizes = groups * case.pick((1, 2, 3, 5)), groups * case.pick((1, 2, 4, 9))
        others = {
            "kernel_size": case.pick((1, 3, 3, (2, 3), 5)), "stride": case.pick((1, 1, 2, (2, 1))),
            "padding": case.pick((0, 1, 2, (1, 0))), "dilation": case.pick((1, 1, 2)), "groups": groups,
        }  # fmt: skip
    case.note("make", kind)
    layer = case.valid(
        lambda: adapter.make_layer(kind, sizes, bias=case.chance(0.7), density=density, dtype=dtype, **others)
    )
    if masked:
        layer = case.valid(lambda: adapter.masked(layer))
    return layer, LayerTwin(layer)


def draw_input(case: Case, layer: Any) -> Tensor:
    """A random batch, in any strides."""
    dtype = adapter.stored(layer).dtype
    if hasattr(layer, "kernel_size"):
        needed = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        size = [n + int(case.rng.integers(12)) for n in needed]
        shape = (case.pick((1, 2, 5)), layer.in_channels, *size)
        x = torch.from_numpy(case.rng.standard_normal(shape)).to(dtype)
        return x.to(memory_format=torch.channels_last) if case.chance(0.3) else x
    leading = case.pick(((1,), (2,), (3, 5), (16,), (17,), (33,), (64,), (65,), (130,), (0,), (2, 0), ()))
    shape = (*leading, layer.in_features)
    x = torch.from_numpy(case.rng.standard_normal(shape)).to(dtype)
    if len(shape) == 2 and case.chance(0.3):
        x = x.T.contiguous().T
    elif case.chance(0.2):
        wide = torch.from_numpy(np.repeat(x.numpy(), 2, -1))
        x = wide[..., ::2]
    return x
