"""The three products of a sparse layer on CPU tensors, each by the variant that suits it.

Tensors here are plain and checked; gradients and tracing are the business of `functional`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.csr.dense_rows import collect_rows, expand_rows
from sparselab.kernels.cpu.csr.sddmm_dw import sample
from sparselab.kernels.cpu.csr.skinny import Matrix, multiply_skinny
from sparselab.kernels.cpu.csr.spmm import multiply
from sparselab.kernels.cpu.csr.spmm_t import multiply_t
from sparselab.nn.ops.cpu.plans import Plans, TopologyPlans
from sparselab.nn.ops.cpu.threads import use_torch_threads

_BLOCK_BYTES = 8 << 20

#: Arrays that only tell a kernel the dtype of an address; bfloat16 as its bits.
LIKE: dict[torch.dtype, np.ndarray[Any, Any]] = {
    torch.float32: np.empty(0, np.float32),
    torch.float64: np.empty(0, np.float64),
    torch.bfloat16: np.empty(0, np.uint16),
}


class Rows(Protocol):
    """A topology in compressed rows: row i is the slots ``begin[i] : end[i]``."""

    shape: tuple[int, int]
    begin: Array
    end: Array
    indices: Array


def product(
    x: Tensor, values: Tensor, bias: Tensor | None, plans: TopologyPlans, variant: str | None = None
) -> Tensor:
    """``x W^T + b``, (tokens, rows), in the dtype of x, by a variant or the one that suits it."""
    if x.dtype == torch.bfloat16:
        wide = None if bias is None else bias.detach().float()
        return product(x.float(), values, wide, plans, variant).to(torch.bfloat16)
    n_threads = use_torch_threads()
    rows, n_tokens = plans.shape[0], x.shape[0]
    y = torch.empty((n_tokens, rows), dtype=x.dtype)
    if variant is None:
        variant = plans.variant("forward", n_tokens)
    if variant == "few tokens":
        few_tokens(x, values, bias, plans, y, n_threads)
        return y
    if variant == "dense blocks":
        b = None if bias is None else bias.detach()
        for row0, row1, block in dense_blocks(values, plans, x):
            part = y[:, row0:row1]
            if b is None:
                torch.mm(x.detach(), block.T, out=part)
            else:
                torch.addmm(b[row0:row1], x.detach(), block.T, out=part)
        return y
    offset = _vector(plans.zeros(x.dtype) if bias is None else bias)
    multiply(_vector(values), plans.indices, plans.forward, _array(x).T, _array(y).T, offset)
    return y


def few_tokens(
    x: Tensor, values: Tensor, bias: Tensor | None, plans: TopologyPlans, y: Tensor, n_threads: int
) -> None:
    """Fill y (..., rows), contiguous, with ``x W^T + b`` for x contiguous or (tokens, columns)."""
    weights, offsets, X, Y = few_operands(x, values, bias, plans, y)
    multiply_skinny(
        weights.data_ptr(), LIKE[values.dtype], plans.indices, plans.begin, plans.end,
        offsets.data_ptr(), LIKE[x.dtype], X, Y, n_threads,
    )  # fmt: skip


def few_operands(
    x: Tensor, values: Tensor, bias: Tensor | None, plans: Plans, y: Tensor
) -> tuple[Tensor, Tensor, Matrix, Matrix]:
    """Contiguous weights and offsets, and x and y as matrices with a column for each token."""
    rows, columns = plans.shape
    weights = values if values.is_contiguous() else values.contiguous()
    offsets = plans.zeros(x.dtype) if bias is None else bias.contiguous()
    token_stride, stride = (columns, 1) if x.is_contiguous() else x.stride()
    n_tokens = x.numel() // columns if columns else x.shape[0]
    X = x.data_ptr(), (stride, token_stride), (columns, n_tokens)
    return weights, offsets, X, (y.data_ptr(), (1, rows), (rows, n_tokens))


def input_grad(grad: Tensor, values: Tensor, plans: TopologyPlans) -> Tensor:
    """``dy W``, (tokens, columns), in the dtype of dy."""
    if grad.dtype == torch.bfloat16:
        return input_grad(grad.float(), values, plans).to(torch.bfloat16)
    use_torch_threads()
    dx = grad.new_empty((grad.shape[0], plans.shape[1]))
    if plans.shape[0] == 0:
        return dx.zero_()
    if plans.variant("input_grad", grad.shape[0]) == "dense blocks":
        for row0, row1, block in dense_blocks(values, plans, grad):
            torch.addmm(dx, grad[:, row0:row1], block, beta=min(row0, 1), out=dx)
    else:
        multiply_t(_vector(values), plans.input_grad, _array(grad).T, _array(dx).T)
    return dx


def values_grad(
    grad: Tensor, x: Tensor, plans: TopologyPlans, with_bias: bool = False
) -> tuple[Tensor, Tensor]:
    """``sum_t dy[t, i] x[t, j]`` for each live connection (i, j), and ``sum_t dy[t]`` or an empty tensor.

    Both in the dtype of dy.
    """
    if grad.dtype == torch.bfloat16:
        values, bias = values_grad(grad.float(), x.float(), plans, with_bias)
        return values.to(torch.bfloat16), bias.to(torch.bfloat16)
    use_torch_threads()
    result = grad.new_empty(plans.indices.shape[0])
    if plans.variant("values_grad", grad.shape[0]) == "dense blocks":
        for row0, row1, block in row_blocks(plans, grad):
            torch.mm(grad[:, row0:row1].T, x, out=block)
            flat = block.view(-1).numpy()
            collect_rows(
                flat, plans.indices, plans.begin, plans.end, row0, row1, plans.shape[1], _array(result)
            )
        return result, grad.sum(0) if with_bias else grad.new_empty(0)
    sums = grad.new_empty(plans.shape[0] if with_bias else 0)
    sample(plans.indices, plans.values_grad, _array(grad).T, _array(x).T, _array(result), _array(sums))
    return result, sums


def row_blocks(plans: Rows, like: Tensor) -> Any:
    """Rows and uninitialised dense blocks for them, all in the same memory."""
    rows, columns = plans.shape
    height = max(1, min(rows, _BLOCK_BYTES // max(1, columns * like.element_size())))
    memory = like.new_empty((height, columns))
    for row0 in range(0, rows, height):
        row1 = min(rows, row0 + height)
        yield row0, row1, memory[: row1 - row0]


def dense_blocks(values: Tensor, plans: Rows, like: Tensor) -> Any:
    """Rows and their dense weights; a block is lent until the next one is made."""
    weights = _vector(values)
    for row0, row1, block in row_blocks(plans, like):
        flat = block.view(-1).numpy()
        expand_rows(weights, plans.indices, plans.begin, plans.end, row0, row1, plans.shape[1], flat)
        yield row0, row1, block


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().numpy()
    return array


def _vector(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The entries in C order; the bits of bfloat16, which NumPy lacks, as uint16."""
    tensor = tensor.detach().contiguous().view(-1)
    return _array(tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor)
