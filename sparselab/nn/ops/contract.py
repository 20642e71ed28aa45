"""What products on tensors are given, and what they must do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sparselab.kernels.layouts.topology import Topology
from sparselab.nn.ops.cpu.memory import in_order
from sparselab.nn.ops.cpu.variants import Measured, Variant
from sparselab.nn.ops.inputs.sparse import TokenRows


class OnTensors(Protocol):
    """A topology as products on tensors see it; `sparselab.nn.ops.topologies.TensorTopology` is one."""

    own: Topology
    shape: tuple[int, int]
    values_shape: torch.Size
    measured: Measured | None
    #: Whatever the products want to keep with the topology.
    kept: Any


class LinearProducts(Protocol):
    """The products of linear layers of one layout on one device.

    Operands have been checked against the topology; they are plain, of one dtype, with any strides. Tokens
    are rows. Results are new tensors.

    Where the attribute ``CASTS_TOKENS`` is there and true, the first three also take tokens in float32 or
    bfloat16 beside values in float32, and a dtype `out` for what they return; see `sparselab.nn.ops.casting`.

    Where there is a function ``gradients(topology, values, grad, x, with_bias)``, backward passes ask it
    first for all of what `input_grad` (if there are values) and `values_grad` (if there is an x) return; it
    may answer None.
    """

    def product(self, topology: OnTensors, values: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + b``, (tokens, rows)."""

    def input_grad(self, topology: OnTensors, values: Tensor, grad: Tensor) -> Tensor:
        """``dy W``, (tokens, columns)."""

    def values_grad(
        self, topology: OnTensors, grad: Tensor, x: Tensor, with_bias: bool
    ) -> tuple[Tensor, Tensor]:
        """``sum_t dy[t, i] x[t, j]`` at the connections, shaped as the values; ``sum_t dy[t]``, or empty."""

    def variant(self, topology: OnTensors, operation: str, n_tokens: int) -> Variant:
        """Which way a product of so many tokens takes, and why."""

    def ways(
        self, topology: OnTensors, values: Tensor, x: Tensor, bias: Tensor | None
    ) -> dict[str, Callable[[], Tensor]]:
        """Every way to compute `product`, by the name of its variant."""

    def keep_forward(self, topology: OnTensors) -> None:
        """Let go of what only backward passes need; it is made anew if it is needed."""


class Narrow(NamedTuple):
    """The weights of a frozen layer in bfloat16, or in int8 with a scale for each output.

    Attributes
    ----------
    values : (connections, block_out, block_in)
        A weight of output i is ``scales[i] * values``, or the value itself without scales.
    scales : float32 (out_features,), or None
        Of int8; 0 for an output that has no weight but 0.
    """

    values: Tensor
    scales: Tensor | None

    def in_order(self) -> Narrow:
        """The same, copied where entries do not lie in C order."""
        if self.values.is_contiguous() and (self.scales is None or self.scales.is_contiguous()):
            return self
        return Narrow(in_order(self.values), None if self.scales is None else in_order(self.scales))


class NarrowProducts(Protocol):
    """The forward product with narrow weights; operands have been checked, and sums are float32."""

    def narrow_product(
        self, topology: OnTensors, narrow: Narrow, x: Tensor, bias: Tensor | None, variant: str | None,
        out: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """``x W^T + b`` of tokens in float32 or bfloat16, returned in either; the bias is float32."""

    def widen(self, topology: OnTensors, narrow: Narrow) -> Tensor:
        """The weights in float32, a new tensor."""

    def narrow_ways(
        self, topology: OnTensors, narrow: Narrow, x: Tensor, bias: Tensor | None
    ) -> dict[str, Callable[[], Tensor]]:
        """Every way to compute `narrow_product`, by the name of its variant."""


class ConvolutionProducts(Protocol):
    """The products of convolutions of one layout on one device; operands have been checked."""

    def product(
        self, topology: OnTensors, values: Tensor, x: Tensor, bias: Tensor | None, geometry: Any
    ) -> Tensor:
        """The convolution of images, in channels_last if they are."""

    def input_grad(
        self, topology: OnTensors, values: Tensor, grad: Tensor, geometry: Any, size: tuple[int, int]
    ) -> Tensor:
        """The gradient by images of that size."""

    def values_grad(self, topology: OnTensors, grad: Tensor, x: Tensor, geometry: Any) -> Tensor:
        """The gradient by the values, shaped as they are."""


class LookupProducts(Protocol):
    """Rows of W that are looked up by number; operands have been checked."""

    def product(self, topology: OnTensors, values: Tensor, tokens: Tensor) -> Tensor:
        """The rows with these int64 numbers, dense: (tokens, columns), contiguous."""

    def values_grad(self, topology: OnTensors, grad: Tensor, tokens: Tensor) -> Tensor:
        """``sum_t dy[t, j]`` over the tokens with the number i, at each connection (i, j)."""


class SparseInputProducts(Protocol):
    """Products of linear layers with sparse tokens, by their stored entries; operands have been checked."""

    def pays(self, rows: TokenRows) -> bool:
        """Whether that is faster than dense chunks of the tokens."""

    def product(self, topology: OnTensors, values: Tensor, rows: TokenRows, bias: Tensor | None) -> Tensor:
        """``x W^T + b``, (tokens, rows)."""

    def values_grad(self, topology: OnTensors, grad: Tensor, rows: TokenRows) -> Tensor:
        """``sum_t dy[t, i] x[t, j]`` at the connections, shaped as the values."""
