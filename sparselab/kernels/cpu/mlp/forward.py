"""Forward passes of two layers, ``Y = V f(W X + b) + c``, one tile of tokens after the other.

Per tile, in a dynamic schedule: X is packed; groups of rows of W X are summed up, and f is applied to them
while they are in the first-level cache; when all are there, the product with V reads them where they are, in
the second-level cache, and its groups of rows are unpacked to Y. What is streamed are the weights, once a
tile, X, Y, and, for the gradients, W X + b, written as it lies in the tile. The hidden numbers after f are
never written to memory.
"""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import NONE_OF, Array, address, strides
from sparselab.kernels.cpu.mlp.matrices import (
    SPARE_ROWS,
    Matrix,
    PanelMatrix,
    most_rows,
    multiply_rows,
    row_of,
    tile_width,
)
from sparselab.kernels.cpu.mlp.tiles import activate
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, new_counter, worker_count
from sparselab.kernels.cpu.runtime.memory import scratch
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.activations import ACTIVATIONS
from sparselab.kernels.cpu.simd.vectors import lanes_of, next_item, view_at
from sparselab.kernels.cpu.tiles import pack, unpack


@jit
def pack_tile(matrix, x, x_strides, token0, tokens, tile, width):  # type: ignore[no-untyped-def]
    """Pack all features of some tokens, with zeros for the columns that only blocks have."""
    pack(x, token0 * x_strides[1], x_strides[0], x_strides[1], matrix.columns, tokens, tile, width)
    tile[matrix.columns * width : matrix.padded * width] = 0


@jit
def multiply_and_unpack(matrix, tile, sums, y, y_strides, token0, tokens, width):  # type: ignore[no-untyped-def]
    """The product with a whole tile, written to `y`."""
    for g in range(len(matrix.rows) - 1):
        row0, row1 = matrix.rows[g], matrix.rows[g + 1]
        multiply_rows(matrix, g, tile, sums, 0)
        start = row0 * y_strides[0] + token0 * y_strides[1]
        unpack(sums, width, row1 - row0, tokens, y, start, y_strides[0], y_strides[1])


@jit
def _forward_tiles(  # type: ignore[no-untyped-def]
    worker, n_workers, counter, kind, up, down, hidden_rows,
    x_at, x_like, x_strides, n_tokens, y_at, y_like, y_strides, saved_at, work,
):  # fmt: skip
    if spread(worker, n_workers):
        return
    memory = work[worker]
    width = lanes_of(row_of(up, memory))
    x, y, saved = view_at(x_at, x_like), view_at(y_at, y_like), view_at(saved_at, memory)
    hidden, rest = memory[: hidden_rows * width], memory[hidden_rows * width :]
    tile, sums = rest[: up.padded * width], rest[up.padded * width :]
    n_tiles = (n_tokens + width - 1) // width
    at = next_item(counter)
    while at < n_tiles:
        token0 = at * width
        tokens = min(width, n_tokens - token0)
        pack_tile(up, x, x_strides, token0, tokens, tile, width)
        shift = at * down.columns * width if saved_at != 0 else -1
        for g in range(len(up.rows) - 1):
            row0, row1 = up.rows[g], up.rows[g + 1]
            multiply_rows(up, g, tile, hidden, row0)
            activate(kind, hidden, row0 * width, row1 * width, saved, shift)
        hidden[down.columns * width : down.padded * width] = 0
        multiply_and_unpack(down, hidden, sums, y, y_strides, token0, tokens, width)
        at = next_item(counter)


def hidden_rows(first: Matrix, second: Matrix) -> int:
    """Rows of a tile that lies between two products, with those that are written behind it."""
    height = first.height if isinstance(first, PanelMatrix) else 1
    return max(second.padded, -(-second.columns // height) * height) + SPARE_ROWS


def forward(up: Matrix, down: Matrix, activation: str, X: Array, Y: Array, saved: Array | None) -> None:
    """``Y = V f(W X + b) + c`` for at least one token, in float32.

    Parameters
    ----------
    up, down : Matrix
        W with b, and V with c, both of blocks or both of single connections.
    activation : str
        f: one of `ACTIVATIONS`.
    X : (in_features, tokens), any strides, not checked
    Y : (out_features, tokens), any strides, overwritten
    saved : (tiles * hidden_features * width,), starting on a cache line, or None
        Where W X + b is written, tile by tile.
    """
    width, n_tokens = tile_width(up), X.shape[1]
    rows = hidden_rows(up, down)
    n_workers = min(worker_count(), -(-n_tokens // width))
    work = scratch(n_workers, (rows + up.padded + most_rows(down)) * width, np.dtype(np.float32))
    launch(
        _forward_tiles, n_workers, new_counter(), ACTIVATIONS.index(activation), up, down, rows,
        address(X), NONE_OF[X.dtype], strides(X), n_tokens, address(Y), NONE_OF[Y.dtype], strides(Y),
        0 if saved is None else address(saved), work,
    )  # fmt: skip
