"""Two sparse layers with a nonlinearity between them on CPU tensors, tile by tile.

Operands have been checked. Weights, biases and what is saved are of float32, tokens of float32 or bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
from sparselab.nn.ops.contract import OnTensors
from sparselab.nn.ops.cpu import bsr, csr
from sparselab.nn.ops.cpu.memory import as_array, as_vector
from sparselab.nn.ops.cpu.threads import use_torch_threads

#: Tiles for each thread that repay it that the rows of a product are not shared out.
_TILES_EACH = 2

#: What is computed with each of the two matrices.
_OPERATIONS = ("forward", "input_grad", "values_grad")


class Weights(NamedTuple):
    """A layer as an operand: its topology, its weights and, if it has some, its biases."""

    topology: OnTensors
    values: Tensor
    bias: Tensor | None


def pays(up: OnTensors, down: OnTensors, n_tokens: int) -> bool:
    """Whether layers with these topologies have the kernels, and so many tokens are faster by them."""
    products = up.products
    if products is not down.products or products not in (csr, bsr):
        return False
    is_blocks = products is bsr
    width = tokens_of_tile(is_blocks)
    if n_tokens < _TILES_EACH * width * use_torch_threads():
        return False
    if up.shape[0] * width * 4 > TARGET.cache_budget_bytes or min(*up.shape, *down.shape) == 0:
        return False
    if is_blocks and not all(_by_panels(each.own.block_shape, n_tokens) for each in (up, down)):
        return False
    return all(
        products.variant(each, operation, n_tokens).name == "tiles"
        for each in (up, down)
        for operation in _OPERATIONS
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
        *(_matrix(each, False, memory[k]) for k, each in enumerate((up, down))), activation, as_array(x).T, as_array(y).T,
        None if saved is None else as_vector(saved),
    )  # fmt: skip
    return y, saved


def gradients(
    needs: tuple[bool, ...], grad: Tensor, x: Tensor, saved: Tensor, up: Weights, down: Weights, activation: str
) -> tuple[Tensor | None, ...]:
    """By x, in its dtype, the weights of both layers, and the biases of both, as far as they are needed.

    Gradients by biases come with those by weights alone.
    """
    use_torch_threads()
    if saved.data_ptr() % CACHE_LINE:  # a hook on saved tensors has put it elsewhere
        saved = saved.clone()
    found: list[Tensor | None] = [torch.empty_like(x) if needs[0] else None, None, None, None, None]
    memory, parts = _memory((up, down), (False, True)), list[Gradient | None]()
    for k, each in enumerate((up, down)):
        if not needs[1 + k]:
            parts.append(None)
            continue
        dvalues = found[1 + k] = torch.empty(each.topology.values_shape)
        dbias = torch.empty(each.topology.shape[0] if needs[3 + k] else 0)
        found[3 + k] = dbias if needs[3 + k] else None
        parts.append(gradient_of(each.topology.own, as_vector(dvalues), as_vector(dbias), memory[2 + k]))
    passed = Passed(
        _matrix(up, True, memory[0]), _matrix(down, True, memory[1]), activation, as_vector(saved), as_array(x).T, as_array(grad).T
    )
    dx = found[0]
    backward(passed, None if dx is None else as_array(dx).T, *parts)
    for k, each in enumerate((up, down)):
        if needs[1 + k] and each.topology.products is bsr:
            bsr.without_outside(each.topology.own, found[1 + k])
    return tuple(found)


def _memory(layers: Sequence[Weights], transposed: Sequence[bool]) -> Array:
    """Memory for weights of each layer in two orders at most, or their gradients; a row for each."""
    items = max(ordered_items(each.topology.own, flag) for each in layers for flag in transposed)
    return scratch_of_weights(len(layers) * 2, items, np.dtype(np.float32))


def _matrix(layer: Weights, transposed: bool, memory: Array) -> Matrix:
    bias = None if layer.bias is None or transposed else as_vector(layer.bias)
    return matrix_of(layer.topology.own, transposed, as_vector(layer.values), memory, bias)
