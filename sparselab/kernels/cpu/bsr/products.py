"""The products of `BlockCSR` on the CPU; the contract is `sparselab.kernels.backends.Products`."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparselab.kernels.arrays import Array, address, for_kernels
from sparselab.kernels.cpu.bsr import direct, direct_dw, sddmm_dw, spmm
from sparselab.kernels.cpu.bsr.plan import block_plan, panel_plan
from sparselab.kernels.cpu.bsr.skinny import MOST_BLOCK_TOKENS, multiply_skinny_blocks
from sparselab.kernels.cpu.csr.skinny import matrix
from sparselab.kernels.cpu.runtime.launch import worker_count
from sparselab.kernels.layouts.block_csr import BlockTopology


def _are_batches(dtype: np.dtype[Any], *tokens: Array) -> bool:
    """Whether all are of this dtype, with the features of a token side by side."""
    return all(each.dtype == dtype and each.strides[0] == each.itemsize for each in tokens)


def multiply(
    topology: BlockTopology, transposed: bool, values: Array, X: Array, Y: Array, bias: Array | None = None
) -> None:
    """``Y = W X + b``, or with W^T if `transposed`, for more than a few tokens; nothing is checked.

    The values are flat. X and Y are as in `spmm.multiply`.
    """
    height = topology.block_shape[int(transposed)]
    if direct.serves(height, values.itemsize, X.shape[1]) and _are_batches(values.dtype, X, Y):
        direct.multiply_direct(values, block_plan(topology, transposed), X, Y, bias)
    else:
        spmm.multiply(values, panel_plan(topology, transposed), transposed, X, Y, bias)


def sample(topology: BlockTopology, DY: Array, X: Array, out: Array, sums: Array | None = None) -> None:
    """The gradient of every entry of every block (flat), as in `sddmm_dw.sample`; nothing is checked.

    Also of those beyond the matrix: they are 0 times a number. If `sums` is given, it becomes
    ``sum_t DY[:, t]``.
    """
    if direct_dw.serves(topology.block_shape, out.itemsize) and all(
        each.strides[0] == each.itemsize for each in (DY, X)
    ):
        direct_dw.sample_direct(block_plan(topology, False), DY, X, out, sums)
        return
    plan = panel_plan(topology, False)
    if not plan.transposed:
        sddmm_dw.sample(plan, DY, X, out, sums)
        return
    sddmm_dw.sample(plan, X, DY, out)
    if sums is not None:
        numbers = (DY.astype(np.uint32) << 16).view(np.float32) if DY.dtype == np.uint16 else DY
        np.sum(numbers, 1, out=sums)


def product(topology: BlockTopology, values: Array, X: Array, Y: Array, bias: Array | None) -> None:
    """``Y = W X + b``."""
    weights = for_kernels(values).reshape(-1)
    offsets = np.zeros(topology.shape[0], Y.dtype) if bias is None else for_kernels(bias)
    if X.shape[1] > MOST_BLOCK_TOKENS:
        multiply(topology, False, weights, X, Y, offsets)
        return
    rows = topology.blocks.rows
    multiply_skinny_blocks(
        (address(weights), weights, None), rows.indices, rows.indptr, topology.block_shape, address(offsets),
        offsets, matrix(X), matrix(Y), worker_count(),
    )  # fmt: skip


def product_t(topology: BlockTopology, values: Array, DY: Array, DX: Array) -> None:
    """``DX = W^T DY``."""
    multiply(topology, True, for_kernels(values).reshape(-1), DY, DX)


def gradient(topology: BlockTopology, DY: Array, X: Array, dW: Array) -> None:
    """``dW[i, j] = sum_t DY[i, t] X[j, t]`` in the blocks, 0 where they reach beyond the matrix."""
    sample(topology, DY, X, dW.reshape(-1))
    slots, outside = topology.outside()
    if len(slots):
        dW[slots] = np.where(outside, 0, dW[slots])
