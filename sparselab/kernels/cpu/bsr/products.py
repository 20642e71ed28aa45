"""The products of `BlockCSR` on the CPU; the contract is `sparselab.kernels.backends.Products`."""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array, address, for_kernels
from sparselab.kernels.cpu.bsr import sddmm_dw, spmm
from sparselab.kernels.cpu.bsr.plan import panel_plan
from sparselab.kernels.cpu.bsr.skinny import MOST_BLOCK_TOKENS, multiply_skinny_blocks
from sparselab.kernels.cpu.csr.skinny import matrix
from sparselab.kernels.cpu.runtime.launch import worker_count
from sparselab.kernels.layouts.block_csr import BlockTopology


def product(topology: BlockTopology, values: Array, X: Array, Y: Array, bias: Array | None) -> None:
    """``Y = W X + b``."""
    weights = for_kernels(values).reshape(-1)
    offsets = np.zeros(topology.shape[0], Y.dtype) if bias is None else for_kernels(bias)
    if X.shape[1] > MOST_BLOCK_TOKENS:
        spmm.multiply(weights, panel_plan(topology, False), False, X, Y, offsets)
        return
    rows = topology.blocks.rows
    multiply_skinny_blocks(
        (address(weights), weights, None), rows.indices, rows.indptr, topology.block_shape, address(offsets),
        offsets, matrix(X), matrix(Y), worker_count(),
    )  # fmt: skip


def product_t(topology: BlockTopology, values: Array, DY: Array, DX: Array) -> None:
    """``DX = W^T DY``."""
    spmm.multiply(for_kernels(values).reshape(-1), panel_plan(topology, True), True, DY, DX)


def gradient(topology: BlockTopology, DY: Array, X: Array, dW: Array) -> None:
    """``dW[i, j] = sum_t DY[i, t] X[j, t]`` in the blocks, 0 where they reach beyond the matrix."""
    plan = panel_plan(topology, False)
    R, C = (X, DY) if plan.transposed else (DY, X)
    sddmm_dw.sample(plan, R, C, dW.reshape(-1))
    slots, outside = topology.outside()
    if len(slots):
        dW[slots] = np.where(outside, 0, dW[slots])
