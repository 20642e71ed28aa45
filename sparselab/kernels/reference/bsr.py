"""The products of `BlockCSR`, one block after the other."""

from __future__ import annotations

from collections.abc import Iterator

from sparselab.kernels.arrays import Array
from sparselab.kernels.layouts.block_csr import BlockTopology


def product(topology: BlockTopology, values: Array, X: Array, Y: Array, bias: Array | None) -> None:
    """``Y[i, t] = b[i] + sum_j W[i, j] X[j, t]``."""
    Y[:] = 0 if bias is None else bias[:, None]
    for slot, rows, columns in _blocks(topology):
        Y[rows] += _inside(values[slot], rows, columns) @ X[columns]


def product_t(topology: BlockTopology, values: Array, DY: Array, DX: Array) -> None:
    """``DX[j, t] = sum_i W[i, j] DY[i, t]``."""
    DX[:] = 0
    for slot, rows, columns in _blocks(topology):
        DX[columns] += _inside(values[slot], rows, columns).T @ DY[rows]


def gradient(topology: BlockTopology, DY: Array, X: Array, dW: Array) -> None:
    """``dW[i, j] = sum_t DY[i, t] X[j, t]`` in the blocks, 0 where they reach beyond the matrix."""
    dW[:] = 0
    for slot, rows, columns in _blocks(topology):
        _inside(dW[slot], rows, columns)[:] = DY[rows] @ X[columns].T


def _blocks(topology: BlockTopology) -> Iterator[tuple[int, slice, slice]]:
    """Each block's slot, its rows and its columns, as far as they are in the matrix."""
    for r in range(topology.grid[0]):
        for slot in range(int(topology.blocks.indptr[r]), int(topology.blocks.indptr[r + 1])):
            corner = r * topology.block_shape[0], int(topology.blocks.indices[slot]) * topology.block_shape[1]
            rows, columns = (
                slice(first, min(first + n, end))
                for first, n, end in zip(corner, topology.block_shape, topology.shape, strict=True)
            )
            yield slot, rows, columns


def _inside(block: Array, rows: slice, columns: slice) -> Array:
    return block[: rows.stop - rows.start, : columns.stop - columns.start]
