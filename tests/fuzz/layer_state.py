"""The dense twin of a layer in float64: what it must hold, return and send back."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparselab.nn.ops.conv.dense import in_c_order
from tests.fuzz import adapter
from tests.fuzz.judge import Twin, expect_equal
from tests.fuzz.operator_judge import EPS, expect_tensor


class Outcome(NamedTuple):
    """Output and gradients by x, W and bias of a dense layer; each with the magnitude of its terms."""

    y: tuple[Tensor, Tensor]
    dx: tuple[Tensor, Tensor] | None
    dW: tuple[Tensor, Tensor]
    dbias: tuple[Tensor, Tensor] | None


class Terms(NamedTuple):
    """How many terms the sums of an `Outcome` have at most."""

    y: int
    dx: int
    dW: int
    dbias: int


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
        """The dense layer; `layer` only tells its settings."""
        if hasattr(layer, "head"):
            hidden = F.linear(x, W) if layer.chained else x
            return F.linear(hidden, W.T if layer.head.transposed else W, bias)
        if hasattr(layer, "num_embeddings"):
            by_freq = layer.scale_grad_by_freq
            return F.embedding(x, W, layer.padding_idx, scale_grad_by_freq=by_freq)
        if not hasattr(layer, "kernel_size"):
            return F.linear(x, W, bias)
        settings = {name: getattr(layer, name) for name in layer.settings}
        dense = layer.dense_type(**settings, bias=bias is not None, device="meta", dtype=W.dtype)
        given = {"weight": W.reshape(dense.weight.shape)} | ({} if bias is None else {"bias": bias})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, that it may copy what it pads on one side
            return torch.func.functional_call(dense, given, (in_c_order(x),))  # type: ignore[no-any-return]

    def terms(self, layer: Any, x: Tensor, y: Tensor) -> Terms:
        """How many terms the sums have at most."""
        rows, columns = self.matrix.shape
        tokens = x.numel() // max(x.shape[-1], 1) if x.ndim else 0
        if hasattr(layer, "head") and layer.chained:
            both = rows + columns
            return Terms(both + 1, both, both + 2 * tokens, tokens)
        if hasattr(layer, "head") and layer.head.transposed:
            return Terms(rows + 1, columns, tokens, tokens)
        if hasattr(layer, "num_embeddings"):
            return Terms(1, 1, x.numel(), x.numel())
        kernel = math.prod(getattr(layer, "kernel_size", (1,)))
        if adapter.is_transposed_conv(layer):
            outputs = y.numel() // max(layer.out_channels, 1)
            return Terms(rows * kernel + 1, columns, x.numel() // max(rows, 1), outputs)
        tokens = y.numel() // max(rows, 1)
        # What is padded with itself reaches an input in up to three ways along each dimension.
        more = 3**layer.n_dims if getattr(layer, "padding_mode", "zeros") != "zeros" else 0
        return Terms(columns + 1, rows * kernel + more, tokens, tokens)

    def outcome(self, layer: Any, x: Tensor, dy: Tensor | None = None) -> Outcome:
        """What must come out for x, and for the upstream gradient dy (default: ones)."""
        signed = self._outcome(layer, x, dy, False)
        sizes = self._outcome(layer, x, dy, True)
        pairs = [None if a is None else (a, b) for a, b in zip(signed, sizes, strict=True)]
        return Outcome(*pairs)  # type: ignore[arg-type]

    def _outcome(self, layer: Any, x: Tensor, dy: Tensor | None, magnitude: bool) -> list[Any]:
        numbers = x.detach().double() if x.is_floating_point() else x
        tensors = [numbers, torch.from_numpy(self.matrix.dense().copy())]
        tensors += [] if self.bias is None else [self.bias]
        with torch.enable_grad():
            inputs = [(t.abs() if magnitude else t).clone() for t in tensors]
            leaves = [t.requires_grad_() for t in inputs if t.is_floating_point()]
            y = self.apply(layer, inputs[0], inputs[1], inputs[2] if self.bias is not None else None)
            upstream = torch.ones_like(y) if dy is None else dy.detach().double()
            upstream = upstream.contiguous()
            gradients = torch.autograd.grad(y, leaves, upstream.abs() if magnitude else upstream)
        of_input = [] if x.is_floating_point() else [None]
        found = [y.detach(), *of_input, *gradients]
        return [*found, *([None] * (4 - len(found)))]

    def expect_state(self, layer: Any, what: str) -> None:
        """Raise `Found` unless the layer holds this matrix."""
        expect_equal(adapter.layer_positions(layer), self.matrix.positions, f"{what}: positions")
        weights = adapter.per_connection(layer, adapter.stored(layer))
        expect_equal(weights, self.matrix.weights, f"{what}: weights")

    def expect_output(self, layer: Any, x: Tensor, y: Tensor, outcome: Outcome) -> None:
        """Raise `Found` unless an output is right."""
        eps = EPS[adapter.stored(layer).dtype]
        expect_tensor(y, *outcome.y, self.terms(layer, x, outcome.y[0]).y, eps, "output")

    def expect_gradients(self, layer: Any, x: Tensor, outcome: Outcome) -> None:
        """Raise `Found` unless all gradients are right."""
        eps, terms = EPS[adapter.stored(layer).dtype], self.terms(layer, x, outcome.y[0])
        if x.grad is not None:
            assert outcome.dx is not None
            expect_tensor(x.grad, *outcome.dx, terms.dx, eps, "gradient of x")
        dW = [torch.from_numpy(self.matrix.gather(each.numpy())) for each in outcome.dW]
        got = torch.from_numpy(adapter.per_connection(layer, adapter.stored(layer).grad))
        expect_tensor(got, dW[0], dW[1], terms.dW, eps, "gradient of the weights")
        if outcome.dbias is not None:
            expect_tensor(layer.bias.grad, *outcome.dbias, terms.dbias, eps, "gradient of the bias")


class State:
    """The layer and its twin; copies and originals that must stay as they were."""

    def __init__(self, kind: str, layer: Any, twin: LayerTwin) -> None:
        self.kind, self.layer, self.twin = kind, layer, twin
        self.kept: list[tuple[Any, LayerTwin]] = []

    def check(self, what: str) -> None:
        """Raise `Found` unless every layer holds what its twin does."""
        self.twin.expect_state(self.layer, what)
        for layer, twin in self.kept:
            twin.expect_state(layer, f"{what}: a layer of before")

    def replace(self, layer: Any) -> None:
        """Go on with a copy of the layer, and keep the original."""
        self.kept = [*self.kept[-1:], (self.layer, self.twin)]
        self.layer, self.twin = layer, self.twin.copy()
