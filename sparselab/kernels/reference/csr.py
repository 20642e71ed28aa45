"""The products of `PaddedCSR`, one connection after the other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sparselab.kernels.arrays import Array
from sparselab.kernels.layouts.padded_csr import RowTopology


def product(topology: RowTopology, values: Array, X: Array, Y: Array, bias: Array | None) -> None:
    """``Y[i, t] = b[i] + sum_j W[i, j] X[j, t]``."""
    Y[:] = 0 if bias is None else bias[:, None]
    for slot, i, j in _connections(topology):
        Y[i] += values[slot] * X[j]


def product_t(topology: RowTopology, values: Array, DY: Array, DX: Array) -> None:
    """``DX[j, t] = sum_i W[i, j] DY[i, t]``."""
    DX[:] = 0
    for slot, i, j in _connections(topology):
        DX[j] += values[slot] * DY[i]


def gradient(topology: RowTopology, DY: Array, X: Array, dW: Array) -> None:
    """``dW[slot] = sum_t DY[i, t] X[j, t]`` for the connection (i, j) of each live slot, 0 in spare slots."""
    dW[:] = 0
    for slot, i, j in _connections(topology):
        dW[slot] = np.dot(DY[i], X[j])


def _connections(topology: RowTopology) -> Iterator[tuple[int, int, int]]:
    """Slot, row and column of each connection."""
    for i in range(topology.shape[0]):
        begin = int(topology.indptr[i])
        for slot in range(begin, begin + int(topology.row_nnz[i])):
            yield slot, i, int(topology.indices[slot])
