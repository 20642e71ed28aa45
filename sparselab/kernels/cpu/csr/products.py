"""The products of `PaddedCSR` on the CPU; the contract is `sparselab.kernels.backends.Products`."""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array, address, for_kernels
from sparselab.kernels.cpu.csr import sddmm_dw, spmm, spmm_t
from sparselab.kernels.cpu.csr.plan import gradient_plan, product_plan, transpose_plan
from sparselab.kernels.cpu.csr.skinny import MOST_TOKENS, matrix, multiply_skinny
from sparselab.kernels.cpu.csr.skinny_dw import MOST_SAMPLED_TOKENS, sample_skinny
from sparselab.kernels.cpu.runtime.launch import worker_count
from sparselab.kernels.layouts.padded_csr import RowTopology


def product(topology: RowTopology, values: Array, X: Array, Y: Array, bias: Array | None) -> None:
    """``Y = W X + b``."""
    rows = topology.rows
    weights = for_kernels(values)
    offsets = np.zeros(rows.shape[0], Y.dtype) if bias is None else for_kernels(bias)
    if X.shape[1] > MOST_TOKENS:
        spmm.multiply(weights, rows.indices, product_plan(topology), X, Y, offsets)
        return
    begin = rows.indptr[:-1]
    multiply_skinny(
        (address(weights), weights, None), rows.indices, begin, begin + rows.row_nnz, address(offsets),
        offsets, matrix(X), matrix(Y), worker_count(),
    )  # fmt: skip


def product_t(topology: RowTopology, values: Array, DY: Array, DX: Array) -> None:
    """``DX = W^T DY``."""
    spmm_t.multiply_t(for_kernels(values), topology.rows, transpose_plan(topology), DY, DX)


def gradient(topology: RowTopology, DY: Array, X: Array, dW: Array) -> None:
    """``dW[i, j] = sum_t DY[i, t] X[j, t]`` at the connections, 0 in spare slots."""
    rows = topology.rows
    if 0 < X.shape[1] <= MOST_SAMPLED_TOKENS:
        dW.fill(0)
        begin, tokens = rows.indptr[:-1], np.asfortranarray(X)
        sample_skinny(
            rows.indices, begin, begin + rows.row_nnz, matrix(DY), matrix(tokens), address(dW), 0, dW,
            worker_count(),
        )  # fmt: skip
        return
    sddmm_dw.sample(rows.indices, gradient_plan(topology), DY, X, dW)
