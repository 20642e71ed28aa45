"""The kernels as plain loops: what they mean, with the same signatures. Slow; for reading and for tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import overload

import numpy as np

from sparselab.kernels.checks import Plan
from sparselab.kernels.layouts.block_csr import BlockCSR, BlockRewrite
from sparselab.kernels.layouts.padded_csr import Array, PaddedCSR
from sparselab.kernels.rewiring.rewrite import Rewrite


def spmm(
    W: PaddedCSR | BlockCSR,
    X: Array,
    out: Array | None = None,
    *,
    bias: Array | None = None,
    plan: Plan | None = None,
) -> Array:
    """``Y[i, t] = b[i] + sum_j W[i, j] X[j, t]``."""
    Y = np.empty((W.shape[0], X.shape[1]), W.dtype) if out is None else out
    for i in range(W.shape[0]):
        Y[i] = 0 if bias is None else bias[i]
    if isinstance(W, BlockCSR):
        for slot, rows, columns in _blocks(W):
            Y[rows] += _inside(W.values[slot], rows, columns) @ X[columns]
        return Y
    for i in range(W.shape[0]):
        for slot in range(W.indptr[i], W.indptr[i] + W.row_nnz[i]):
            Y[i] += W.values[slot] * X[W.indices[slot]]
    return Y


def spmm_t(
    W: PaddedCSR | BlockCSR, DY: Array, out: Array | None = None, *, plan: Plan | None = None
) -> Array:
    """``DX[j, t] = sum_i W[i, j] DY[i, t]``."""
    DX = np.empty((W.shape[1], DY.shape[1]), W.dtype) if out is None else out
    DX[:] = 0
    if isinstance(W, BlockCSR):
        for slot, rows, columns in _blocks(W):
            DX[columns] += _inside(W.values[slot], rows, columns).T @ DY[rows]
        return DX
    for i in range(W.shape[0]):
        for slot in range(W.indptr[i], W.indptr[i] + W.row_nnz[i]):
            DX[W.indices[slot]] += W.values[slot] * DY[i]
    return DX


def sddmm_dw(
    W: PaddedCSR | BlockCSR, DY: Array, X: Array, out: Array | None = None, *, plan: Plan | None = None
) -> Array:
    """``dW[slot] = sum_t DY[i, t] X[j, t]`` for the connection (i, j) of each live slot, 0 in spare slots."""
    dW = np.empty(W.values.shape, W.dtype) if out is None else out
    dW[:] = 0
    if isinstance(W, BlockCSR):
        for slot, rows, columns in _blocks(W):
            _inside(dW[slot], rows, columns)[:] = DY[rows] @ X[columns].T
        return dW
    for i in range(W.shape[0]):
        for slot in range(W.indptr[i], W.indptr[i] + W.row_nnz[i]):
            dW[slot] = np.dot(DY[i], X[W.indices[slot]])
    return dW


def _blocks(W: BlockCSR) -> Iterator[tuple[int, slice, slice]]:
    """Each block's slot, its rows and its columns, as far as they are in the matrix."""
    for r in range(W.grid[0]):
        for slot in range(W.indptr[r], W.indptr[r + 1]):
            corner = r * W.block_shape[0], int(W.indices[slot]) * W.block_shape[1]
            rows, columns = (
                slice(first, min(first + n, end))
                for first, n, end in zip(corner, W.block_shape, W.shape, strict=True)
            )
            yield slot, rows, columns


def _inside(block: Array, rows: slice, columns: slice) -> Array:
    return block[: rows.stop - rows.start, : columns.stop - columns.start]


@overload
def rewrite(W: PaddedCSR, drop: Array, grow: Array, *, compact: bool = False) -> Rewrite: ...


@overload
def rewrite(W: BlockCSR, drop: Array, grow: Array, *, compact: bool = False) -> BlockRewrite: ...


def rewrite(
    W: PaddedCSR | BlockCSR, drop: Array, grow: Array, *, compact: bool = False
) -> Rewrite | BlockRewrite:
    """Remove the connections in the slots `drop`, then add those at the positions `grow`."""
    if isinstance(W, BlockCSR):
        topology, source = rewrite(W.topology(), drop, grow, compact=True)
        empty = np.zeros(W.block_shape, W.dtype)
        blocks = [empty if slot < 0 else W.values[slot] for slot in source]
        values = np.array(blocks, W.dtype).reshape(-1, *W.block_shape)
        return BlockRewrite(
            BlockCSR(W.shape, W.block_shape, topology.indptr, topology.indices, values), source
        )
    columns = W.shape[1]
    old = {}
    for i in range(W.shape[0]):
        for slot in range(W.indptr[i], W.indptr[i] + W.row_nnz[i]):
            old[i * columns + int(W.indices[slot])] = int(slot)
    dropped = set(np.asarray(drop).tolist())
    new = {position: slot for position, slot in old.items() if slot not in dropped}
    for position in np.asarray(grow).tolist():
        new[position] = old.get(position, -1)
    per_row: list[list[tuple[int, int]]] = [[] for _ in range(W.shape[0])]
    for position, slot in sorted(new.items()):
        per_row[position // columns].append((position % columns, slot))
    room = np.diff(W.indptr)
    counts = np.array([len(row) for row in per_row], np.int64)
    if not compact and np.all(counts <= room):
        indptr = W.indptr
    else:
        spare = 0 if compact else max(W.capacity - int(counts.sum()), 0)
        extra = [spare * (i + 1) // len(counts) - spare * i // len(counts) for i in range(len(counts))]
        indptr = np.concatenate([[0], np.cumsum(counts + extra)]).astype(np.int64)
    indices, values = np.zeros(indptr[-1], W.indices.dtype), np.zeros(indptr[-1], W.dtype)
    source = np.full(indptr[-1], -1, np.int64)
    for i, row in enumerate(per_row):
        for k, (column, slot) in enumerate(row):
            at = indptr[i] + k
            indices[at], source[at] = column, slot
            values[at] = 0 if slot < 0 else W.values[slot]
    return Rewrite(PaddedCSR(W.shape, indptr, counts, indices, values), source)
