"""Backward passes of two layers, ``Y = V f(W X + b) + c``, one tile of tokens after the other.

Per tile, in a dynamic schedule: DY is packed; groups of rows of V^T DY are summed up, and multiplied by the
derivative of f at W X + b, which was saved as it lies in the tile, while they are in the first-level cache;
the product with W^T reads them in the second-level cache and is unpacked to DX. The rows, and f(W X + b),
which is computed anew beside its derivative, are also written to work memory, for gradients by W and V: in
the layout in which those read tokens, so that they pack only X and DY. Tokens go in parts, for which that
memory is small enough to stay in the third-level cache.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sparselab.kernels.arrays import NONE_OF, Array, address, strides
from sparselab.kernels.cpu.bsr.sddmm_dw import KC_BYTES, STRIDE_BYTES
from sparselab.kernels.cpu.mlp.forward import hidden_rows, multiply_and_unpack, pack_tile
from sparselab.kernels.cpu.mlp.gradients import Gradient
from sparselab.kernels.cpu.mlp.matrices import (
    Matrix,
    PanelMatrix,
    most_rows,
    multiply_rows,
    row_of,
    tile_width,
)
from sparselab.kernels.cpu.mlp.tiles import Tiling, differentiate, first_of
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, new_counter, worker_count
from sparselab.kernels.cpu.runtime.memory import scratch, scratch_of_hidden
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.activations import ACTIVATIONS
from sparselab.kernels.cpu.simd.vectors import lanes_of, next_item, view_at

#: Tokens of a part, at least, and tiles for each worker.
_PART_TOKENS = 768
_TILES_EACH = 4


@jit
def _backward_tiles(  # type: ignore[no-untyped-def]
    worker, n_workers, counter, kind, down_t, up_t, rows, tiling, tile0, tile1,
    dy_at, dy_like, dy_strides, dx_at, dx_like, dx_strides, n_tokens, saved_at, grads_at, values_at, work,
):  # fmt: skip
    """The tiles tile0 : tile1; DX is left out if its address is 0."""
    if spread(worker, n_workers):
        return
    memory = work[worker]
    width = lanes_of(row_of(up_t, memory))
    dy, dx = view_at(dy_at, dy_like), view_at(dx_at, dx_like)
    saved, grads, values = view_at(saved_at, memory), view_at(grads_at, memory), view_at(values_at, memory)
    hidden, rest = memory[: rows * width], memory[rows * width :]
    tile, sums = rest[: down_t.padded * width], rest[down_t.padded * width :]
    at = tile0 + next_item(counter)
    while at < tile1:
        token0 = at * width
        tokens = min(width, n_tokens - token0)
        pack_tile(down_t, dy, dy_strides, token0, tokens, tile, width)
        shift, place = at * tiling.rows * width, first_of(tiling, at - tile0)
        for g in range(len(down_t.rows) - 1):
            row0, row1 = down_t.rows[g], down_t.rows[g + 1]
            multiply_rows(down_t, g, tile, hidden, row0)
            differentiate(
                kind, hidden, row0, row1, width, tokens, saved, shift, grads, values, place, tiling.stride
            )
        if dx_at != 0:
            hidden[up_t.columns * width : up_t.padded * width] = 0
            multiply_and_unpack(up_t, hidden, sums, dx, dx_strides, token0, tokens, width)
        at = tile0 + next_item(counter)


class Passed(NamedTuple):
    """What a backward pass is of.

    `up_t` and `down_t` are W^T and V^T; `saved` is of the forward pass; X and DY are (features, tokens).
    """

    up_t: Matrix
    down_t: Matrix
    activation: str
    saved: Array
    X: Array
    DY: Array


def _tiling(up_t: Matrix, width: int) -> Tiling:
    """How gradients by the two matrices read hidden numbers."""
    if isinstance(up_t, PanelMatrix):
        return Tiling(up_t.columns, width, KC_BYTES // 4 // width, STRIDE_BYTES // 4)
    return Tiling(up_t.columns, width, 1, width)


def _tiles_of_part(n_tiles: int, width: int, together: int) -> int:
    """Tiles of a part of the tokens, which are whole rows of memory: enough for all workers."""
    wanted = max(_PART_TOKENS // width, _TILES_EACH * worker_count())
    return min(-(-wanted // together) * together, n_tiles)


def _by_address(matrix: Array) -> tuple[int, Array, tuple[int, int]]:
    return address(matrix), NONE_OF[matrix.dtype], strides(matrix)


def backward(of: Passed, DX: Array | None, up: Gradient | None, down: Gradient | None) -> None:
    """Gradients by X, W and V, and by their biases, for at least one token, in float32.

    Parameters
    ----------
    of : Passed
    DX : (in_features, tokens), any strides, overwritten; or None
    up, down : Gradient or None
        Where gradients by W and V go.
    """
    width, n_tokens = tile_width(of.up_t), of.DY.shape[1]
    n_tiles = -(-n_tokens // width)
    tiling = _tiling(of.up_t, width)
    part = _tiles_of_part(n_tiles, width, tiling.together)
    rows = hidden_rows(of.down_t, of.up_t)
    n_workers = min(worker_count(), part)
    single = np.dtype(np.float32)
    dx_at, dx_like, dx_strides = (0, NONE_OF[single], (0, 0)) if DX is None else _by_address(DX)
    items = (rows + of.down_t.padded + most_rows(of.up_t)) * width
    size = -(-part // tiling.together) * tiling.rows * tiling.stride
    # A gradient by blocks may read rows behind the last, of blocks that reach beyond the matrix.
    spare = rows * tiling.stride
    grads, values = scratch_of_hidden(2, size + spare, single)
    for tile0 in range(0, n_tiles, part):
        tile1 = min(tile0 + part, n_tiles)
        launch(
            _backward_tiles, n_workers, new_counter(), ACTIVATIONS.index(of.activation), of.down_t, of.up_t,
            rows, tiling, tile0, tile1, address(of.DY), NONE_OF[of.DY.dtype], strides(of.DY),
            dx_at, dx_like, dx_strides, n_tokens, address(of.saved), address(grads), address(values),
            scratch(n_workers, items, single),
        )  # fmt: skip
        tokens = slice(tile0 * width, tile1 * width)
        if up is not None:
            up.add_outputs(grads, tiling, of.X[:, tokens])
        if down is not None:
            down.add_inputs(of.DY[:, tokens], values, tiling)
    for gradient in (up, down):
        if gradient is not None:
            gradient.finish()
