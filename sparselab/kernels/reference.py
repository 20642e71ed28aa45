"""The kernels as plain loops: what they mean, with the same signatures. Slow; for reading and for tests."""

from __future__ import annotations

import numpy as np

from sparselab.kernels._plan import Segments, TransposePlan
from sparselab.kernels._rewrite import Rewrite
from sparselab.kernels.layout import Array, PaddedCSR


def spmm(
    W: PaddedCSR,
    X: Array,
    out: Array | None = None,
    *,
    bias: Array | None = None,
    plan: Segments | None = None,
) -> Array:
    """``Y[i, t] = b[i] + sum_j W[i, j] X[j, t]``."""
    Y = np.empty((W.shape[0], X.shape[1]), W.dtype) if out is None else out
    for i in range(W.shape[0]):
        Y[i] = 0 if bias is None else bias[i]
        for slot in range(W.indptr[i], W.indptr[i] + W.row_nnz[i]):
            Y[i] += W.values[slot] * X[W.indices[slot]]
    return Y


def spmm_t(W: PaddedCSR, DY: Array, out: Array | None = None, *, plan: TransposePlan | None = None) -> Array:
    """``DX[j, t] = sum_i W[i, j] DY[i, t]``."""
    DX = np.empty((W.shape[1], DY.shape[1]), W.dtype) if out is None else out
    DX[:] = 0
    for i in range(W.shape[0]):
        for slot in range(W.indptr[i], W.indptr[i] + W.row_nnz[i]):
            DX[W.indices[slot]] += W.values[slot] * DY[i]
    return DX


def sddmm_dw(
    W: PaddedCSR, DY: Array, X: Array, out: Array | None = None, *, plan: Segments | None = None
) -> Array:
    """``dW[slot] = sum_t DY[i, t] X[j, t]`` for the connection (i, j) of each live slot, 0 in spare slots."""
    dW = np.empty(W.capacity, W.dtype) if out is None else out
    dW[:] = 0
    for i in range(W.shape[0]):
        for slot in range(W.indptr[i], W.indptr[i] + W.row_nnz[i]):
            dW[slot] = np.dot(DY[i], X[W.indices[slot]])
    return dW


def rewrite(W: PaddedCSR, drop: Array, grow: Array, *, compact: bool = False) -> Rewrite:
    """Remove the connections in the slots `drop`, then add those at the positions `grow`."""
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
