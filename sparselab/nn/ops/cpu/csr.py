"""The products of single connections on CPU tensors, each by the variant that suits it.

Operands have been checked; see `sparselab.nn.ops.products.LinearProducts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.csr.dense_rows import collect_rows, expand_rows
from sparselab.kernels.cpu.csr.plan import (
    GRADIENT,
    PRODUCT_T,
    gradient_plan,
    product_plan,
    transpose_plan,
)
from sparselab.kernels.cpu.csr.sddmm_dw import GradientCut, cut_gradient, sample_cut
from sparselab.kernels.cpu.csr.skinny import multiply_few
from sparselab.kernels.cpu.csr.spmm import ProductCut, cut_product, multiply_cut
from sparselab.kernels.cpu.csr.spmm_t import gather
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.nn.ops.cpu.memory import LIKE, Cuts, as_matrix, as_vector, zeros
from sparselab.nn.ops.cpu.threads import use_torch_threads
from sparselab.nn.ops.cpu.variants import SINGLE, Variant, choose, choose_name, possible
from sparselab.nn.ops.topologies import TensorTopology

_BLOCK_BYTES = 8 << 20

#: What is kept with a topology beside the plans of the kernels.
_ROWS = "cpu", "rows"


class Rows(Protocol):
    """Connections in compressed rows: row i is the slots ``begin[i] : end[i]``."""

    shape: tuple[int, int]
    begin: Array
    end: Array
    indices: Array


class RowProducts:
    """What products of one topology read again and again."""

    def __init__(self, topology: RowTopology) -> None:
        rows = topology.rows
        self.shape, self.indices = topology.shape, rows.indices
        self.begin, self.end = rows.indptr[:-1], rows.indptr[1:]
        self.density = topology.density
        #: How products of so many tokens, on so many threads, in a dtype are cut.
        self.products: Cuts[ProductCut] = Cuts()
        self.input_grads: Cuts[ProductCut] = Cuts()
        self.gradients: Cuts[GradientCut] = Cuts()

    @property
    def nbytes(self) -> int:
        """Nothing that counts."""
        return 0


def product(
    topology: TensorTopology, values: Tensor, x: Tensor, bias: Tensor | None, variant: str | None = None
) -> Tensor:
    """``x W^T + b``, by a variant or the one that suits it."""
    dtype, n_tokens = x.dtype, x.shape[0]
    if dtype is torch.bfloat16:
        wide = None if bias is None else bias.detach().float()
        return product(topology, values, x.float(), wide, variant).to(dtype)
    own: RowTopology = topology.own  # type: ignore[assignment]
    rows: RowProducts = own.plan(_ROWS, RowProducts)
    n_threads = use_torch_threads()
    y = torch.empty((n_tokens, rows.shape[0]), dtype=dtype)
    if y.numel() == 0:
        return y
    measured = topology.measured
    if variant is None and measured is not None:
        variant = measured.name(n_tokens)
    if variant is None:
        variant = choose_name("forward", n_tokens, rows.density, SINGLE)
    if variant == "dense blocks":
        return _product_of_blocks(rows, values, x, bias, y)
    if variant == "skinny":
        weights, offsets = values.contiguous(), zeros(rows.shape[0], dtype) if bias is None else bias.contiguous()
        multiply_few(
            weights.data_ptr(), LIKE[values.dtype], rows.indices, rows.begin, rows.end,
            offsets.data_ptr(), LIKE[dtype], as_matrix(x), as_matrix(y), n_threads,
        )  # fmt: skip
        return y
    key = n_tokens, n_threads, dtype
    plan = product_plan(own)
    cut = rows.products.get(key) or rows.products.add(
        key, cut_product(plan, rows.shape, n_tokens, dtype.itemsize)
    )
    offset = as_vector(zeros(rows.shape[0], dtype) if bias is None else bias)
    multiply_cut(as_vector(values), rows.indices, plan, as_matrix(x), as_matrix(y), offset, cut)
    return y


def _product_of_blocks(rows: Rows, values: Tensor, x: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    x, b = x.detach(), None if bias is None else bias.detach()
    for row0, row1, block in dense_blocks(values, rows, x):
        part = y[:, row0:row1]
        if b is None:
            torch.mm(x, block.T, out=part)
        else:
            torch.addmm(b[row0:row1], x, block.T, out=part)
    return y


def input_grad(topology: TensorTopology, values: Tensor, grad: Tensor) -> Tensor:
    """``dy W``."""
    dtype, n_tokens = grad.dtype, grad.shape[0]
    if dtype is torch.bfloat16:
        return input_grad(topology, values, grad.float()).to(dtype)
    own: RowTopology = topology.own  # type: ignore[assignment]
    rows: RowProducts = own.plan(_ROWS, RowProducts)
    n_threads = use_torch_threads()
    n_rows, n_columns = rows.shape
    dx = torch.empty((n_tokens, n_columns), dtype=dtype)
    if n_rows == 0 or dx.numel() == 0:
        return dx.zero_()
    if choose_name("input_grad", n_tokens, rows.density, SINGLE) == "dense blocks":
        for row0, row1, block in dense_blocks(values, rows, grad):
            torch.addmm(dx, grad[:, row0:row1], block, beta=min(row0, 1), out=dx)
        return dx
    plan = transpose_plan(own)
    weights = gather(as_vector(values), plan.slots, LIKE[dtype].dtype)
    nothing = zeros(n_columns, dtype)
    if n_tokens <= SINGLE.skinny:
        multiply_few(
            weights.__array_interface__["data"][0], LIKE[dtype], plan.indices, plan.indptr[:-1],
            plan.indptr[1:], nothing.data_ptr(), LIKE[dtype], as_matrix(grad), as_matrix(dx), n_threads,
        )  # fmt: skip
        return dx
    key = n_tokens, n_threads, dtype
    cut = rows.input_grads.get(key) or rows.input_grads.add(
        key, cut_product(plan.segments, (n_columns, n_rows), n_tokens, dtype.itemsize)
    )
    multiply_cut(
        weights, plan.indices, plan.segments, as_matrix(grad), as_matrix(dx), as_vector(nothing), cut
    )
    return dx


def values_grad(
    topology: TensorTopology, grad: Tensor, x: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor]:
    """``sum_t dy[t, i] x[t, j]`` for each connection (i, j), and ``sum_t dy[t]`` or an empty tensor."""
    dtype, n_tokens = grad.dtype, grad.shape[0]
    if dtype is torch.bfloat16:
        values, bias = values_grad(topology, grad.float(), x.float(), with_bias)
        return values.to(dtype), bias.to(dtype)
    own: RowTopology = topology.own  # type: ignore[assignment]
    rows: RowProducts = own.plan(_ROWS, RowProducts)
    n_threads = use_torch_threads()
    result = torch.empty(topology.values_shape, dtype=dtype)
    if choose_name("values_grad", n_tokens, rows.density, SINGLE) == "dense blocks":
        flat = as_vector(result)
        for row0, row1, block in row_blocks(rows, grad):
            torch.mm(grad[:, row0:row1].T, x, out=block)
            dense = block.view(-1).numpy()
            collect_rows(dense, rows.indices, rows.begin, rows.end, row0, row1, rows.shape[1], flat)
        return result, grad.sum(0) if with_bias else grad.new_empty(0)
    sums = torch.empty(rows.shape[0] if with_bias else 0, dtype=dtype)
    if n_tokens == 0 or (rows.indices.size == 0 and not with_bias):
        return result.zero_(), sums.zero_()
    key = n_tokens, n_threads, dtype
    plan = gradient_plan(own)
    cut = rows.gradients.get(key) or rows.gradients.add(
        key, cut_gradient(plan, rows.shape, n_tokens, dtype.itemsize)
    )
    sample_cut(
        rows.indices, plan, as_matrix(grad), as_matrix(x), as_vector(result), as_vector(sums), cut
    )
    return result, sums


def variant(topology: TensorTopology, operation: str, n_tokens: int) -> Variant:
    """Which way a product of so many tokens takes, and why."""
    return choose(operation, n_tokens, topology.own.density, topology.measured, SINGLE)


def ways(
    topology: TensorTopology, values: Tensor, x: Tensor, bias: Tensor | None
) -> dict[str, Callable[[], Tensor]]:
    """Every way to compute `product`, by the name of its variant."""
    return {
        name: partial(product, topology, values, x, bias, name) for name in possible(len(x), SINGLE)
    }


def keep_forward(topology: TensorTopology) -> None:
    """Let go of the plans of backward passes; they are made anew if they are needed."""
    topology.own.forget(lambda key: key not in (PRODUCT_T, GRADIENT))


def row_blocks(rows: Rows, like: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Rows and uninitialised dense blocks for them, all in the same memory."""
    n_rows, n_columns = rows.shape
    height = max(1, min(n_rows, _BLOCK_BYTES // max(1, n_columns * like.element_size())))
    memory = like.new_empty((height, n_columns))
    for row0 in range(0, n_rows, height):
        row1 = min(n_rows, row0 + height)
        yield row0, row1, memory[: row1 - row0]


def dense_blocks(values: Tensor, rows: Rows, like: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Rows and their dense weights; a block is lent until the next one is made."""
    weights = as_vector(values)
    for row0, row1, block in row_blocks(rows, like):
        flat = block.view(-1).numpy()
        expand_rows(weights, rows.indices, rows.begin, rows.end, row0, row1, rows.shape[1], flat)
        yield row0, row1, block
