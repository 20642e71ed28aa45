"""Strips: how the block kernels see a matrix of dense blocks.

A *strip* is four rows of a block row, which share their columns: a loaded row of tokens serves four
multiply-adds. Strips are cut along the longer side of the blocks, so for blocks that are wider than tall (as
1 x 8) they lie in the transpose, and the products swap roles.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sparselab.kernels._block_vectors import HEIGHT
from sparselab.kernels._intrinsics import get, put
from sparselab.kernels._jit import jit, launch, worker_count
from sparselab.kernels._team import spread
from sparselab.kernels.layout import Array, index_dtype

_MIN_SHARE = 1 << 15


class Strips(NamedTuple):
    """Order in which kernels walk the blocks of a matrix W, or of W^T if `transposed`.

    The matrix walked has blocks of `height` rows and `width` columns, of which those within `shape` exist.
    Block row r is ``indptr[r] : indptr[r + 1]``: block k is ``slots[k]`` of W, and its columns, each named,
    are ``columns[k * width : (k + 1) * width]``. `edges` are the blocks that reach beyond the shape.
    """

    transposed: bool
    shape: tuple[int, int]
    height: int
    width: int
    indptr: Array
    slots: Array
    columns: Array
    edges: Array

    @property
    def strips_per_row(self) -> int:
        """Strips of a block row; the last one may have rows that do not exist."""
        return -(-self.height // HEIGHT)

    @property
    def packed_items(self) -> int:
        """Weights as packed: `HEIGHT` for each column of each strip."""
        return len(self.columns) * self.strips_per_row * HEIGHT


def plan_blocks(
    shape: tuple[int, int], block_shape: tuple[int, int], indptr: Array, indices: Array
) -> Strips:
    """Strips of a matrix of that shape; its blocks lie in compressed rows of the grid."""
    height, width = block_shape
    slots, blocks = np.arange(len(indices)), indices.astype(np.int64)
    transposed = height < HEIGHT and width > height
    if transposed:
        shape, (height, width) = (shape[1], shape[0]), (width, height)
        slots = np.argsort(blocks, kind="stable")
        counts = np.bincount(blocks, minlength=-(-shape[0] // height))
        blocks = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))[slots]
        indptr = np.concatenate([[0], np.cumsum(counts)])
    columns = (blocks[:, None] * width + np.arange(width)).reshape(-1)
    grid = -(-shape[0] // height), -(-shape[1] // width)
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    over = (rows == shape[0] // height) | (blocks == shape[1] // width)
    return Strips(
        transposed, shape, height, width, indptr.astype(np.int64), slots,
        columns.astype(index_dtype(grid[1] * width)), np.flatnonzero(over),
    )  # fmt: skip


@jit
def _pack_share(share, n_shares, values, indptr, slots, height, width, row_step, column_step, packed):  # type: ignore[no-untyped-def]
    if spread(share, n_shares):
        return
    strips = (height + HEIGHT - 1) // HEIGHT
    n = len(indptr) - 1
    zero = packed.dtype.type(0)
    for r in range(share * n // n_shares, (share + 1) * n // n_shares):
        count = (indptr[r + 1] - indptr[r]) * width * HEIGHT
        for k in range(indptr[r], indptr[r + 1]):
            block = slots[k] * height * width
            at = indptr[r] * width * HEIGHT * strips + (k - indptr[r]) * width * HEIGHT
            for row in range(0, height, HEIGHT):
                rows = min(HEIGHT, height - row)
                for j in range(width):
                    source = block + row * row_step + j * column_step
                    place = at + j * HEIGHT
                    if rows == HEIGHT:
                        for i in range(HEIGHT):
                            put(packed, place + i, get(values, source + i * row_step))
                    else:
                        for i in range(HEIGHT):
                            put(packed, place + i, get(values, source + i * row_step) if i < rows else zero)
                at += count


@jit
def _unpack_share(share, n_shares, packed, indptr, slots, height, width, row_step, column_step, values):  # type: ignore[no-untyped-def]
    if spread(share, n_shares):
        return
    strips = (height + HEIGHT - 1) // HEIGHT
    n = len(indptr) - 1
    for r in range(share * n // n_shares, (share + 1) * n // n_shares):
        count = (indptr[r + 1] - indptr[r]) * width * HEIGHT
        for k in range(indptr[r], indptr[r + 1]):
            block = slots[k] * height * width
            at = indptr[r] * width * HEIGHT * strips + (k - indptr[r]) * width * HEIGHT
            for row in range(0, height, HEIGHT):
                rows = min(HEIGHT, height - row)
                for j in range(width):
                    target = block + row * row_step + j * column_step
                    place = at + j * HEIGHT
                    if rows == HEIGHT:
                        for i in range(HEIGHT):
                            put(values, target + i * row_step, get(packed, place + i))
                    else:
                        for i in range(rows):
                            put(values, target + i * row_step, get(packed, place + i))
                at += count


def pack_weights(values: Array, plan: Strips, packed: Array) -> None:
    """Bring the blocks (flat) into the order of the strips, with zeros in rows that blocks do not have."""
    _move(_pack_share, values, plan, packed)


def unpack_weights(packed: Array, plan: Strips, values: Array) -> None:
    """Bring entries in the order of the strips back into blocks (flat)."""
    _move(_unpack_share, packed, plan, values)


def _move(kernel, source: Array, plan: Strips, target: Array) -> None:  # type: ignore[no-untyped-def]
    n_shares = max(1, min(worker_count(), len(source) // _MIN_SHARE))
    steps = (1, plan.height) if plan.transposed else (plan.width, 1)
    launch(kernel, n_shares, source, plan.indptr, plan.slots, plan.height, plan.width, *steps, target)
