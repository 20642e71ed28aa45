"""The three products of a layer of dense blocks on CPU tensors, each by the variant that suits it.

Tensors here are plain and checked, as those of `_products`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparselab.kernels.arrays import Array, for_kernels
from sparselab.kernels.cpu.bsr.plan import PanelPlan
from sparselab.kernels.cpu.bsr.sddmm_dw import sample
from sparselab.kernels.cpu.bsr.skinny import multiply_skinny_blocks
from sparselab.kernels.cpu.bsr.spmm import multiply
from sparselab.kernels.layouts.block_csr import grid_of
from sparselab.nn.ops.cpu.plans import BlockPlans
from sparselab.nn.ops.cpu.products import LIKE, _array, few_operands
from sparselab.nn.ops.cpu.threads import use_torch_threads
from sparselab.nn.storage.blocks import cut, join

_CHUNK_BYTES = 8 << 20


def product(
    x: Tensor, values: Tensor, bias: Tensor | None, plans: BlockPlans, variant: str | None = None
) -> Tensor:
    """``x W^T + b``, (tokens, out_features), in the dtype of x, by a variant or the one that suits it."""
    if x.dtype == torch.bfloat16:
        wide = None if bias is None else bias.detach().float()
        return product(x.float(), values.float(), wide, plans, variant).to(torch.bfloat16)
    n_threads = use_torch_threads()
    x, y = x.detach(), x.new_empty((x.shape[0], plans.shape[0]))
    variant = variant or plans.variant("forward", len(x))
    if variant == "few tokens":
        few_tokens(x, values, bias, plans, y, n_threads)
        return y
    if variant == "dense blocks":
        for part in _chunks(plans):
            out, weight = y[:, part.rows], part.expand(values.detach(), plans)
            torch.mm(x, weight.T, out=out)
            if bias is not None:
                out += bias.detach()[part.rows]
        return y
    offset = None if bias is None else _array(bias.contiguous())
    multiply(_flat(values), plans.product(False), False, _array(x).T, _array(y).T, offset)
    return y


def few_tokens(
    x: Tensor, values: Tensor, bias: Tensor | None, plans: BlockPlans, y: Tensor, n_threads: int
) -> None:
    """As `_products.few_tokens`."""
    weights, offsets, X, Y = few_operands(x, values, bias, plans, y)
    rows = plans.topology.blocks.rows
    multiply_skinny_blocks(
        weights.data_ptr(), rows.indices, rows.indptr, plans.block_shape,
        offsets.data_ptr(), LIKE[x.dtype], X, Y, n_threads,
    )  # fmt: skip


def input_grad(grad: Tensor, values: Tensor, plans: BlockPlans) -> Tensor:
    """``dy W``, (tokens, in_features), in the dtype of dy."""
    if grad.dtype == torch.bfloat16:
        return input_grad(grad.float(), values.float(), plans).to(torch.bfloat16)
    use_torch_threads()
    grad, dx = grad.detach(), grad.new_empty((grad.shape[0], plans.shape[1]))
    if plans.variant("input_grad", len(grad)) == "dense blocks":
        for part in _chunks(plans):
            weight = part.expand(values.detach(), plans)
            torch.addmm(dx, grad[:, part.rows], weight, beta=min(part.rows.start, 1), out=dx)
        return dx
    multiply(_flat(values), plans.product(True), True, _array(grad).T, _array(dx).T)
    return dx


def values_grad(grad: Tensor, x: Tensor, plans: BlockPlans, with_bias: bool = False) -> tuple[Tensor, Tensor]:
    """The gradient of every block, 0 outside the matrix, and ``sum_t dy[t]`` or an empty tensor."""
    if grad.dtype == torch.bfloat16:
        values, bias = values_grad(grad.float(), x.float(), plans, with_bias)
        return values.to(torch.bfloat16), bias.to(torch.bfloat16)
    use_torch_threads()
    grad, x = grad.detach(), x.detach()
    result = grad.new_empty(plans.layout)
    strips: PanelPlan = plans.product(False)
    fused = with_bias and not strips.transposed
    sums = grad.new_empty(plans.shape[0] if fused else 0)
    if plans.variant("values_grad", len(grad)) == "dense blocks":
        fused = False
        for part in _chunks(plans):
            part.collect(grad[:, part.rows].T @ x, result, plans)
    elif strips.transposed:
        sample(strips, _array(x).T, _array(grad).T, _flat(result))
    else:
        sample(strips, _array(grad).T, _array(x).T, _flat(result), _array(sums) if fused else None)
    slots, outside = (torch.from_numpy(for_kernels(part)) for part in plans.outside)
    if len(slots):
        result[slots] = result[slots].masked_fill(outside, 0)
    return result, grad.sum(0) if with_bias and not fused else sums


class _Chunk(NamedTuple):
    """Some block rows, which are expanded for dense products."""

    rows: slice
    slots: slice
    positions: Tensor
    grid: tuple[int, int]

    def expand(self, values: Tensor, plans: BlockPlans) -> Tensor:
        """Their weights as a dense matrix (rows, in_features)."""
        blocks = values.new_zeros((self.grid[0] * self.grid[1], *plans.block_shape))
        blocks[self.positions] = values[self.slots]
        return join(blocks, (self.rows.stop - self.rows.start, plans.shape[1]))

    def collect(self, dense: Tensor, out: Tensor, plans: BlockPlans) -> None:
        """Copy their blocks from a dense matrix (rows, in_features)."""
        out[self.slots] = cut(dense, plans.block_shape)[self.positions]


def _chunks(plans: BlockPlans) -> Iterator[_Chunk]:
    """All block rows, a few megabytes of dense weights at a time."""
    rows, columns = grid_of(plans.shape, plans.block_shape)
    height = plans.block_shape[0]
    step = max(1, _CHUNK_BYTES // (4 * height * max(plans.shape[1], 1)))
    indptr, positions = plans.topology.blocks.indptr, torch.from_numpy(plans.topology.positions())
    for r0 in range(0, rows, step):
        r1 = min(r0 + step, rows)
        slots = slice(int(indptr[r0]), int(indptr[r1]))
        inside = slice(r0 * height, min(r1 * height, plans.shape[0]))
        yield _Chunk(inside, slots, positions[slots] - r0 * columns, (r1 - r0, columns))


def _flat(tensor: Tensor) -> Array:
    """The tensor's memory in C order, as a vector."""
    return _array(tensor.contiguous()).reshape(-1)
