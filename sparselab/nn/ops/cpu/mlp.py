"""Two sparse layers with a nonlinearity between them on CPU tensors, tile by tile.

Operands have been checked. Weights, biases and what is saved are of float32, tokens of float32 or bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.bsr import direct, direct_dw
from sparselab.kernels.cpu.bsr.plan import wants_transpose
from sparselab.kernels.cpu.mlp.backward import Passed, backward
from sparselab.kernels.cpu.mlp.forward import forward
from sparselab.kernels.cpu.mlp.gradients import Gradient, gradient_of
from sparselab.kernels.cpu.mlp.matrices import Matrix, matrix_of, ordered_items, tokens_of_tile
from sparselab.kernels.cpu.runtime.memory import scratch_of_weights
from sparselab.kernels.cpu.runtime.target import CACHE_LINE, TARGET
from sparselab.nn.ops.cpu import bsr, csr
from sparselab.nn.ops.cpu.memory import as_array, as_vector
from sparselab.nn.ops.cpu.threads import use_torch_threads
from sparselab.nn.ops.topologies import TensorTopology

#: Tiles for each thread that repay it that the rows of a product are not shared out.
_TILES_EACH = 2

#: What is computed with each of the two matrices.
_OPERATIONS = ("forward", "input_grad", "values_grad")


class Weights(NamedTuple):
    """A layer as an operand: its topology, its weights and, if it has some, its biases."""

    topology: TensorTopology
    values: Tensor
    bias: Tensor | None


def serves(up: TensorTopology, down: TensorTopology, n_tokens: int) -> bool:
    """Whether there are kernels for layers with these topologies."""
    products = up.products
    if products is not down.products or products not in (csr, bsr) or min(*up.shape, *down.shape) == 0:
        return False
    own: list[Any] = [up.own, down.own]
    return products is csr or all(_by_panels(each.block_shape, n_tokens) for each in own)


def pays(up: TensorTopology, down: TensorTopology, n_tokens: int) -> bool:
    """Whether there are, and so many tokens are faster by them than by one layer after the other."""
    if not serves(up, down, n_tokens):
        return False
    products = up.products
    width = tokens_of_tile(products is bsr)
    return (
        n_tokens >= _TILES_EACH * width * use_torch_threads()
        and up.shape[0] * width * 4 <= TARGET.cache_budget_bytes
        and all(
            products.variant(each, operation, n_tokens).name == "tiles"
            for each in (up, down)
            for operation in _OPERATIONS
        )
    )


def _by_panels(block_shape: tuple[int, int], n_tokens: int) -> bool:
    """Whether products of such blocks gather along micro-panels, in both directions."""
    return (
        not wants_transpose(block_shape, False)
        and wants_transpose(block_shape, True)
        and not any(direct.serves(size, 4, n_tokens) for size in block_shape)
        and not direct_dw.serves(block_shape, 4)
    )


def product(
    x: Tensor, up: Weights, down: Weights, activation: str, out: torch.dtype, saves: bool
) -> tuple[Tensor, Tensor | None]:
    """The output in a dtype, and, if that is wanted, what `gradients` needs of the hidden layer."""
    use_torch_threads()
    n_tokens = len(x)
    y = torch.empty((n_tokens, down.topology.shape[0]), dtype=out)
    saved = None
    if saves:
        width = tokens_of_tile(up.topology.products is bsr)
        saved = torch.empty(-(-n_tokens // width) * width * up.topology.shape[0])
    memory = _memory((up, down), (False,))
    forward(
        _matrix(up, False, memory[0]), _matrix(down, False, memory[1]), activation, as_array(x).T,
        as_array(y).T, None if saved is None else as_vector(saved),
    )  # fmt: skip
    return y, saved


class Found(NamedTuple):
    """Gradients, as far as they were asked for."""

    x: Tensor | None
    up: Tensor | None
    down: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None


def gradients(
    needs: tuple[bool, ...], grad: Tensor, x: Tensor, saved: Tensor, up: Weights, down: Weights,
    activation: str,
) -> Found:  # fmt: skip
    """By x, in its dtype, the weights of both layers, and the biases of both: those that `needs` names.

    Gradients by biases come with those by weights alone.
    """
    use_torch_threads()
    if saved.data_ptr() % CACHE_LINE:  # a hook on saved tensors has put it elsewhere
        saved = saved.clone()
    memory = _memory((up, down), (False, True))
    passed = Passed(
        _matrix(up, True, memory[0]), _matrix(down, True, memory[1]), activation, as_vector(saved),
        as_array(x).T, as_array(grad).T,
    )  # fmt: skip
    dx = torch.empty_like(x) if needs[0] else None
    of_up = _WeightsGrad(up, needs[3], memory[2]) if needs[1] else None
    of_down = _WeightsGrad(down, needs[4], memory[3]) if needs[2] else None
    backward(
        passed,
        None if dx is None else as_array(dx).T,
        of_up.gradient if of_up else None,
        of_down.gradient if of_down else None,
    )
    dup, dup_bias = (None, None) if of_up is None else of_up.finished()
    ddown, ddown_bias = (None, None) if of_down is None else of_down.finished()
    return Found(dx, dup, ddown, dup_bias, ddown_bias)


class _WeightsGrad:
    """Gradients by the weights of a layer, and by its biases if that is wanted."""

    def __init__(self, layer: Weights, with_bias: bool, memory: Array) -> None:
        self.topology, self.with_bias = layer.topology, with_bias
        self.values = torch.empty(self.topology.values_shape)
        self.bias = torch.empty(self.topology.shape[0] if with_bias else 0)
        outputs = as_vector(self.values), as_vector(self.bias)
        self.gradient: Gradient = gradient_of(self.topology.own, *outputs, memory)

    def finished(self) -> tuple[Tensor, Tensor | None]:
        """Both, with zeros where blocks reach beyond the matrix."""
        own: Any = self.topology.own
        if self.topology.products is bsr:
            bsr.without_outside(own, self.values)
        return self.values, self.bias if self.with_bias else None


def _memory(layers: Sequence[Weights], transposed: Sequence[bool]) -> Array:
    """Memory for weights of each layer in two orders at most, or their gradients; a row for each."""
    items = max(ordered_items(each.topology.own, flag) for each in layers for flag in transposed)
    return scratch_of_weights(len(layers) * 2, items, np.dtype(np.float32))


def _matrix(layer: Weights, transposed: bool, memory: Array) -> Matrix:
    bias = None if layer.bias is None or transposed else as_vector(layer.bias)
    return matrix_of(layer.topology.own, transposed, as_vector(layer.values), memory, bias)
