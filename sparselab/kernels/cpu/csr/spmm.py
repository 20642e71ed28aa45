"""Sparse x dense: ``Y = W X + b``, and the loop it shares with the transpose product.

Loop order, from outside: (row group, tile of tokens) in a dynamic schedule; blocks of columns; segments, two
at a time. In registers: the tile rows of two sums. In first-level cache: one block of packed X. In the
second-level cache: the sums of the group's rows and the group's connections, which stay there while the
worker goes from tile to tile. Per connection and tile: one tile row loaded and multiplied, 4 + 2 bytes of
value and column read. A tile row of X serves one multiply-add, so the limit is the load bandwidth of the
first-level cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparselab.kernels.arrays import Array, address, index_dtype
from sparselab.kernels.cpu.csr.plan import Segments, product_groups
from sparselab.kernels.cpu.csr.skinny import Matrix, matrix
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, new_counter, worker_count
from sparselab.kernels.cpu.runtime.memory import scratch
from sparselab.kernels.cpu.runtime.program import COUNT, Place, Program
from sparselab.kernels.cpu.runtime.target import TILE_BYTES
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.vectors import (
    fma,
    get,
    load,
    next_item,
    splat,
    store,
    tile_width,
    view_at,
    weight,
    zeros_tile,
)
from sparselab.kernels.cpu.tiles import pack, unpack


@jit
def add_segments(values, indices, row, start, length, p, q, x, column0, sums, row0, bias, begin):  # type: ignore[no-untyped-def]
    """Add the segments p : q, whose tokens are packed in `x` from `column0` on, to the tile rows of sums.

    Two segments at a time, because one tile row of sums is too few independent chains to hide the latency of
    a multiply-add. Segments are sorted by length, so the first of the two is the shorter. The sums `begin`
    with the bias in the first block, in which every row has a segment.
    """
    like, width = zeros_tile(x), tile_width(x)
    origin = column0 * width
    while p + 1 < q:
        a, b = np.int64(get(start, p)), np.int64(get(start, p + 1))
        n, m = np.int64(get(length, p)), np.int64(get(length, p + 1))
        at_a = (np.int64(get(row, p)) - row0) * width
        at_b = (np.int64(get(row, p + 1)) - row0) * width
        if begin:
            sum_a = splat(get(bias, np.int64(get(row, p))), like)
            sum_b = splat(get(bias, np.int64(get(row, p + 1))), like)
        else:
            sum_a, sum_b = load(sums, at_a, like), load(sums, at_b, like)
        for k in range(n):
            x_a = load(x, np.int64(get(indices, a + k)) * width - origin, like)
            x_b = load(x, np.int64(get(indices, b + k)) * width - origin, like)
            sum_a = fma(weight(values, a + k), x_a, sum_a)
            sum_b = fma(weight(values, b + k), x_b, sum_b)
        for k in range(n, m):
            x_b = load(x, np.int64(get(indices, b + k)) * width - origin, like)
            sum_b = fma(weight(values, b + k), x_b, sum_b)
        store(sums, at_a, sum_a)
        store(sums, at_b, sum_b)
        p += 2
    if p < q:
        a, n = np.int64(get(start, p)), np.int64(get(length, p))
        at_a = (np.int64(get(row, p)) - row0) * width
        sum_a = splat(get(bias, np.int64(get(row, p))), like) if begin else load(sums, at_a, like)
        for k in range(n):
            x_a = load(x, np.int64(get(indices, a + k)) * width - origin, like)
            sum_a = fma(weight(values, a + k), x_a, sum_a)
        store(sums, at_a, sum_a)


@jit
def _multiply_tiles(  # type: ignore[no-untyped-def]
    worker, n_workers, counter, values_at, bits, indices, bias_at, plan, groups,
    x_at, x_like, x_strides, n_columns, y_at, y_like, y_strides, n_tokens, work,
):  # fmt: skip
    """Compute (row group, tile) pairs, group by group, in a dynamic schedule."""
    if spread(worker, n_workers):
        return
    memory = work[worker]
    values, bias = view_at(values_at, bits), view_at(bias_at, memory)
    width = tile_width(memory)
    tile = memory[: plan.block_columns * width]
    sums = memory[plan.block_columns * width :]
    x, y = view_at(x_at, x_like), view_at(y_at, y_like)
    n_tiles = (n_tokens + width - 1) // width
    n_pairs = (len(groups) - 1) * n_tiles
    pair = next_item(counter)
    while pair < n_pairs:
        chunk0, chunk1 = groups[pair // n_tiles], groups[pair // n_tiles + 1]
        row0, row1 = plan.chunk_rows[chunk0], plan.chunk_rows[chunk1]
        token0 = pair % n_tiles * width
        tokens = min(width, n_tokens - token0)
        for b in range(plan.ptr.shape[1] - 1):
            column0 = b * plan.block_columns
            columns = min(plan.block_columns, n_columns - column0)
            first = column0 * x_strides[0] + token0 * x_strides[1]
            pack(x, first, x_strides[0], x_strides[1], columns, tokens, tile, width)
            for c in range(chunk0, chunk1):
                p, q = plan.ptr[c, b], plan.ptr[c, b + 1]
                add_segments(
                    values, indices, plan.row, plan.start, plan.length, p, q,
                    tile, column0, sums, row0, bias, b == 0,
                )  # fmt: skip
        first = row0 * y_strides[0] + token0 * y_strides[1]
        unpack(sums, width, row1 - row0, tokens, y, first, y_strides[0], y_strides[1])
        pair = next_item(counter)


class ProductCut(NamedTuple):
    """How a product with so many tokens is cut, which depends on nothing else that a call brings.

    Attributes
    ----------
    groups : int64 array
        Chunk boundaries of the row groups.
    n_workers : int
        Workers.
    items : int
        Scratch of each.
    """

    groups: Array
    n_workers: int
    items: int


def cut_product(plan: Segments, shape: tuple[int, int], n_tokens: int, itemsize: int) -> ProductCut:
    """The cut of a product of a matrix of this shape with at least one token, for the threads of now."""
    width = TILE_BYTES // itemsize
    n_tiles = -(-n_tokens // width)
    workers = worker_count((plan.n_connections + sum(shape)) * n_tiles * width)
    groups = product_groups(plan, n_tiles, workers, itemsize + index_dtype(shape[1]).itemsize)
    group_rows = int(np.diff(plan.chunk_rows[groups]).max())
    n_workers = min(workers, (len(groups) - 1) * n_tiles)
    return ProductCut(groups, n_workers, (plan.block_columns + group_rows) * width)


def add_multiply(
    program: Program, values_at: Place, bits: Array, indices: Array, plan: Segments, X: Matrix, Y: Matrix,
    bias_at: Place, dtype: np.dtype[Any], cut: ProductCut,
) -> None:  # fmt: skip
    """Let a program do what `multiply_cut` does."""
    counter, work = program.zeros(1, COUNT), program.work((cut.n_workers, cut.items), dtype)
    program.add(
        _multiply_tiles,
        cut.n_workers,
        *_of_tiles(counter, values_at, bits, indices, plan, X, Y, bias_at, cut, work),
    )


def multiply(
    values: Array, indices: Array, plan: Segments, X: Array, Y: Array, bias: Array | None = None
) -> None:
    """``Y = S X + b`` where S is the matrix whose connections `plan` walks in `values` and `indices`.

    X ``(columns, tokens)`` and Y ``(rows, tokens)`` may have any strides and are not checked; Y is
    overwritten. All have one dtype; or the values, X and Y each are the bits of bfloat16 in uint16 or of
    float32, with a bias and sums in float32.
    """
    if Y.size == 0:
        return
    dtype = np.dtype(np.float32) if Y.dtype == np.uint16 else Y.dtype
    offsets = np.zeros(Y.shape[0], dtype) if bias is None else bias
    cut = cut_product(plan, (len(Y), len(X)), X.shape[1], dtype.itemsize)
    multiply_cut(address(values), values, indices, plan, matrix(X), matrix(Y), address(offsets), dtype, cut)


def multiply_cut(
    values_at: int, bits: Array, indices: Array, plan: Segments, X: Matrix, Y: Matrix, bias_at: int,
    dtype: np.dtype[Any], cut: ProductCut,
) -> None:  # fmt: skip
    """As `multiply`, for matrices of at least one entry, all by their addresses.

    The weights and the bias are contiguous. Those are of the dtype of the array `bits`, whose contents are
    not read. Everything is of `dtype`, or, where that is float32, weights, X and Y may each be of bfloat16,
    by its bits in uint16.
    """
    work = scratch(cut.n_workers, cut.items, dtype)
    counter = new_counter()
    launch(
        _multiply_tiles,
        cut.n_workers,
        *_of_tiles(counter, values_at, bits, indices, plan, X, Y, bias_at, cut, work),
    )


def _of_tiles(
    counter: Any, values_at: Place, bits: Array, indices: Array, plan: Segments, X: Matrix, Y: Matrix,
    bias_at: Place, cut: ProductCut, work: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of `_multiply_tiles` behind the workers."""
    return (
        counter, values_at, bits, indices, bias_at, plan, cut.groups, X[0], X[3], X[1], X[2][0],
        Y[0], Y[3], Y[1], Y[2][1], work,
    )  # fmt: skip
