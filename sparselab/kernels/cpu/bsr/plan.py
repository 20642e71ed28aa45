"""Strips: how the block kernels see a matrix of dense blocks.

A *strip* is four rows of a block row, which share their columns: a loaded row of tokens serves four
multiply-adds. A product can gather along the strips of its own matrix, or scatter along those of the
transpose, so that blocks that are high or wide have strips without gaps either way.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from sparselab.kernels.arrays import Array, index_dtype
from sparselab.kernels.cpu.bsr.panels import HEIGHT
from sparselab.kernels.cpu.runtime.jit import jit, launch, worker_count
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.vectors import get, put
from sparselab.kernels.layouts.block_csr import BlockTopology

_MIN_SHARE = 1 << 14


class Strips(NamedTuple):
    """Order in which kernels walk the blocks of W, or of W^T if `transposed`.

    The matrix walked, M, has the shape `shape` and blocks of `height` rows and `width` columns. Its block
    row r is ``indptr[r] : indptr[r + 1]``; block k is slot ``slots[k]`` of W, and its columns, each of them
    named, are ``columns[k * width : (k + 1) * width]``.
    """

    transposed: bool
    shape: tuple[int, int]
    height: int
    width: int
    indptr: Array
    slots: Array
    columns: Array

    @property
    def strips_per_row(self) -> int:
        """Strips of a block row; the last one may have rows that do not exist."""
        return -(-self.height // HEIGHT)

    @property
    def packed_items(self) -> int:
        """Weights as packed: `HEIGHT` for each column of each strip."""
        return len(self.columns) * self.strips_per_row * HEIGHT

    @property
    def is_packed(self) -> bool:
        """Whether blocks have the order of packed weights already."""
        return not self.transposed and (self.height, self.width) == (HEIGHT, 1)

    @property
    def n_columns(self) -> int:
        """Columns of M with those that its last blocks have beyond it."""
        return -(-self.shape[1] // self.width) * self.width

    def work(self, n_tokens: int) -> int:
        """Multiply-adds of a product with so many tokens, and the items that it moves."""
        return (len(self.slots) * self.height * self.width + sum(self.shape)) * n_tokens


def strips(topology: BlockTopology, transposed: bool) -> Strips:
    """Strips for products with W, also for the gradient by its values, or with W^T."""
    along = wants_transpose(topology.block_shape, transposed)
    return topology.plan(("cpu", "strips", along), partial(_plan_strips, transposed=along))


def _plan_strips(W: BlockTopology, transposed: bool) -> Strips:
    """Strips of W, or of W^T."""
    shape, (height, width) = W.shape, W.block_shape
    rows = W.blocks.rows
    slots, blocks, indptr = np.arange(W.nnz), rows.indices.astype(np.int64), rows.indptr
    if transposed:
        shape, (height, width) = (shape[1], shape[0]), (width, height)
        slots = np.argsort(rows.indices, kind="stable")
        counts = np.bincount(blocks, minlength=W.grid[1])
        blocks = np.repeat(np.arange(W.grid[0]), np.diff(indptr))[slots]
        indptr = np.concatenate([[0], np.cumsum(counts)])
    columns = (blocks[:, None] * width + np.arange(width)).reshape(-1)
    narrow = index_dtype(-(-shape[1] // width) * width)
    return Strips(transposed, shape, height, width, indptr.astype(np.int64), slots, columns.astype(narrow))


def wants_transpose(block_shape: tuple[int, int], transposed: bool) -> bool:
    """Whether products with W, or with W^T if `transposed`, go along strips of W^T.

    To gather along strips of its own matrix is faster for a product; but where its blocks are too low for a
    strip, and higher in the transpose, it scatters along those.
    """
    height, width = block_shape[::-1] if transposed else block_shape
    gathers = height >= HEIGHT or height >= width
    return transposed == gathers


@jit
def _move_share(  # type: ignore[no-untyped-def]
    share, n_shares, pack, values, indptr, slots, height, width, row_step, column_step, packed
):
    """Copy the blocks of some block rows into the order of the strips, or back."""
    if spread(share, n_shares):
        return
    strips = (height + HEIGHT - 1) // HEIGHT
    n = len(indptr) - 1
    zero = packed.dtype.type(0)
    for r in range(share * n // n_shares, (share + 1) * n // n_shares):
        count = (indptr[r + 1] - indptr[r]) * width * HEIGHT
        for k in range(indptr[r], indptr[r + 1]):
            block = slots[k] * height * width
            at = (indptr[r] * (strips - 1) + k) * width * HEIGHT
            for row in range(0, height, HEIGHT):
                rows = min(HEIGHT, height - row)
                for j in range(width):
                    inside = block + row * row_step + j * column_step
                    place = at + j * HEIGHT
                    if not pack:
                        for i in range(rows):
                            put(values, inside + i * row_step, get(packed, place + i))
                    elif rows == HEIGHT:
                        for i in range(HEIGHT):
                            put(packed, place + i, get(values, inside + i * row_step))
                    else:
                        for i in range(HEIGHT):
                            put(packed, place + i, get(values, inside + i * row_step) if i < rows else zero)
                at += count


def pack_weights(values: Array, plan: Strips, packed: Array) -> None:
    """Bring the blocks (flat) into the order of the strips, with zeros in rows that blocks do not have."""
    _move(True, values, plan, packed)


def unpack_weights(packed: Array, plan: Strips, values: Array) -> None:
    """Bring entries in the order of the strips back into blocks (flat)."""
    _move(False, values, plan, packed)


def _move(pack: bool, values: Array, plan: Strips, packed: Array) -> None:
    n_shares = max(1, min(worker_count(), len(values) // _MIN_SHARE))
    steps = (1, plan.height) if plan.transposed else (plan.width, 1)
    launch(
        _move_share, n_shares, pack, values, plan.indptr, plan.slots, plan.height, plan.width, *steps, packed
    )
