"""Products of a matrix of blocks with tokens: by gathering along its strips, or scattering along W^T's.

Loop order, from outside: shares of (block rows, tile of tokens) on threads; groups of block rows; strips;
the strip's columns. To gather, the four rows of sums stay in registers for the whole strip, and each
column's row of tokens is loaded from the packed tile of X, once for four multiply-adds. To scatter, the four
rows of operands stay in registers, and each column's row of sums is loaded, added to four times, and stored.
The tile lies in the second-level cache, the group's rows in the first. The weights come from the third
level, 16 + 2 bytes for four multiply-adds of a row, in the order in which they are needed: they are packed
so once a call.
"""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array, strides
from sparselab.kernels.cpu.bsr.panels import (
    HEIGHT,
    PARTS,
    fma_parts,
    load_parts,
    narrow_row,
    row_width,
    splat_parts,
    store_parts,
    wide_row,
)
from sparselab.kernels.cpu.bsr.plan import Strips, pack_weights
from sparselab.kernels.cpu.partition import cut_rows
from sparselab.kernels.cpu.runtime.jit import aligned_empty, jit, launch, no_turns, scratch, worker_count
from sparselab.kernels.cpu.runtime.target import VECTOR_BYTES
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.vectors import get, take_turn, view_at
from sparselab.kernels.cpu.tiles import pack, unpack

#: Rows of the strips whose tokens are packed or unpacked together.
_GROUP_ROWS = 64


@jit
def _gather_strip(weights, at, columns, first, count, tile, bias, row, sums, sums_row, like):  # type: ignore[no-untyped-def]
    """Four rows of sums: the strip's `count` columns, of which `columns` has the first at `first`."""
    width = row_width(like)
    s0 = splat_parts(get(bias, row), like)
    s1 = splat_parts(get(bias, row + 1), like)
    s2 = splat_parts(get(bias, row + 2), like)
    s3 = splat_parts(get(bias, row + 3), like)
    for k in range(first, first + count):
        x = load_parts(tile, np.int64(get(columns, k)) * width, like)
        s0 = fma_parts(get(weights, at), x, s0)
        s1 = fma_parts(get(weights, at + 1), x, s1)
        s2 = fma_parts(get(weights, at + 2), x, s2)
        s3 = fma_parts(get(weights, at + 3), x, s3)
        at += HEIGHT
    store_parts(sums, sums_row * width, s0)
    store_parts(sums, (sums_row + 1) * width, s1)
    store_parts(sums, (sums_row + 2) * width, s2)
    store_parts(sums, (sums_row + 3) * width, s3)


@jit
def _scatter_strip(weights, at, columns, first, count, rows, row, tile, like):  # type: ignore[no-untyped-def]
    """Add four rows of tokens, times the strip's weights, to the rows of the tile that its columns name."""
    width = row_width(like)
    x0 = load_parts(rows, row * width, like)
    x1 = load_parts(rows, (row + 1) * width, like)
    x2 = load_parts(rows, (row + 2) * width, like)
    x3 = load_parts(rows, (row + 3) * width, like)
    for k in range(first, first + count):
        place = np.int64(get(columns, k)) * width
        total = load_parts(tile, place, like)
        total = fma_parts(get(weights, at), x0, total)
        total = fma_parts(get(weights, at + 1), x1, total)
        total = fma_parts(get(weights, at + 2), x2, total)
        total = fma_parts(get(weights, at + 3), x3, total)
        store_parts(tile, place, total)
        at += HEIGHT


@jit
def _gather_tile(  # type: ignore[no-untyped-def]
    row0, row1, group, weights, columns, indptr, height, block_width, n_rows, n_columns, padded,
    x, x_strides, token0, n_tokens, bias, y, y_strides, memory, like,
):  # fmt: skip
    width = row_width(like)
    tile, sums = memory[: padded * width], memory[padded * width :]
    tokens = min(width, n_tokens - token0)
    pack(x, token0 * x_strides[1], x_strides[0], x_strides[1], n_columns, tokens, tile, width)
    tile[n_columns * width : padded * width] = 0
    strips = (height + HEIGHT - 1) // HEIGHT
    for r0 in range(row0, row1, group):
        r1 = min(r0 + group, row1)
        at = 0
        for r in range(r0, r1):
            first = indptr[r] * block_width
            count = (indptr[r + 1] - indptr[r]) * block_width
            for s in range(strips):
                _gather_strip(
                    weights, (first * strips + s * count) * HEIGHT, columns, first, count, tile,
                    bias, (r * strips + s) * HEIGHT, sums, at, like,
                )  # fmt: skip
                at += HEIGHT
        first_row = r0 * height
        rows = min(r1 * height, n_rows) - first_row
        start = first_row * y_strides[0] + token0 * y_strides[1]
        unpack(sums, width, rows, tokens, y, start, y_strides[0], y_strides[1])


@jit
def _scatter_tile(  # type: ignore[no-untyped-def]
    group, weights, columns, indptr, height, block_width, n_rows, n_columns, padded,
    x, x_strides, token0, n_tokens, bias, y, y_strides, memory, like,
):  # fmt: skip
    width = row_width(like)
    tile, rows = memory[: padded * width], memory[padded * width :]
    tokens = min(width, n_tokens - token0)
    for j in range(n_columns):
        store_parts(tile, j * width, splat_parts(get(bias, j), like))
    tile[n_columns * width :] = 0
    strips = (height + HEIGHT - 1) // HEIGHT
    n = len(indptr) - 1
    for r0 in range(0, n, group):
        r1 = min(r0 + group, n)
        first_row = r0 * height
        present = min(r1 * height, n_rows) - first_row
        start = first_row * x_strides[0] + token0 * x_strides[1]
        pack(x, start, x_strides[0], x_strides[1], present, tokens, rows, width)
        rows[present * width : (r1 - r0) * strips * HEIGHT * width] = 0
        at = 0
        for r in range(r0, r1):
            first = indptr[r] * block_width
            count = (indptr[r + 1] - indptr[r]) * block_width
            for s in range(strips):
                place = (first * strips + s * count) * HEIGHT
                _scatter_strip(weights, place, columns, first, count, rows, at, tile, like)
                at += HEIGHT
    unpack(tile, width, n_columns, tokens, y, token0 * y_strides[1], y_strides[0], y_strides[1])


@jit
def _gather_share(  # type: ignore[no-untyped-def]
    share, n_shares, turns, edges, narrow, group, weights, columns, indptr, height, block_width, n_rows,
    n_columns, padded, x_at, x_strides, n_tokens, bias, y_at, y_strides, work,
):  # fmt: skip
    if spread(share, n_shares):
        return
    memory = work[share]
    x, y = view_at(x_at, memory), view_at(y_at, memory)
    wide, thin = wide_row(memory), narrow_row(memory)
    width = row_width(thin) if narrow else row_width(wide)
    n_tiles = (n_tokens + width - 1) // width
    n_pairs = (len(edges) - 1) * n_tiles
    pair = take_turn(turns)
    while pair < n_pairs:
        row0, row1 = edges[pair // n_tiles], edges[pair // n_tiles + 1]
        token0 = pair % n_tiles * width
        if narrow:
            _gather_tile(
                row0, row1, group, weights, columns, indptr, height, block_width, n_rows, n_columns, padded,
                x, x_strides, token0, n_tokens, bias, y, y_strides, memory, thin,
            )  # fmt: skip
        else:
            _gather_tile(
                row0, row1, group, weights, columns, indptr, height, block_width, n_rows, n_columns, padded,
                x, x_strides, token0, n_tokens, bias, y, y_strides, memory, wide,
            )  # fmt: skip
        pair = take_turn(turns)


@jit
def _scatter_share(  # type: ignore[no-untyped-def]
    share, n_shares, turns, group, weights, columns, indptr, height, block_width, n_rows, n_columns,
    padded, x_at, x_strides, n_tokens, bias, y_at, y_strides, work,
):  # fmt: skip
    if spread(share, n_shares):
        return
    memory = work[share]
    x, y = view_at(x_at, memory), view_at(y_at, memory)
    like = wide_row(memory)
    width = row_width(like)
    n_tiles = (n_tokens + width - 1) // width
    tile = take_turn(turns)
    while tile < n_tiles:
        _scatter_tile(
            group, weights, columns, indptr, height, block_width, n_rows, n_columns, padded,
            x, x_strides, tile * width, n_tokens, bias, y, y_strides, memory, like,
        )  # fmt: skip
        tile = take_turn(turns)


def multiply(
    values: Array, plan: Strips, transposed: bool, X: Array, Y: Array, bias: Array | None = None
) -> None:
    """``Y = S X + b`` where S is W, or W^T if `transposed`, with the blocks `values` (flat).

    X ``(columns, tokens)`` and Y ``(rows, tokens)`` may have any strides and are not checked; Y is
    overwritten.
    """
    if Y.size == 0:
        return
    offsets = np.zeros(Y.shape[0], Y.dtype) if bias is None else bias
    packed = values
    if not plan.is_packed:
        packed = aligned_empty(plan.packed_items, Y.dtype)
        pack_weights(values, plan, packed)
    if plan.transposed == transposed:
        _gather(packed, plan, X, Y, offsets)
    else:
        _scatter(packed, plan, X, Y, offsets)


def _gather(weights: Array, plan: Strips, X: Array, Y: Array, bias: Array) -> None:
    n_tokens = X.shape[1]
    workers = worker_count(plan.work(n_tokens))
    lanes = VECTOR_BYTES // Y.itemsize
    narrow = n_tokens <= lanes
    width = lanes if narrow else lanes * PARTS
    n_tiles = -(-n_tokens // width)
    # Each part of the rows packs the tokens again.
    edges = cut_rows(plan.indptr, 1 if n_tiles >= 4 * workers else 2 * workers)
    n_shares = min(workers, n_tiles * (len(edges) - 1))
    group, strip_rows = _group(plan)
    work = scratch(n_shares, (plan.n_columns + strip_rows) * width, Y.dtype)
    launch(
        _gather_share, n_shares, no_turns(), edges, int(narrow), group, weights, plan.columns, plan.indptr,
        plan.height, plan.width, *plan.shape, plan.n_columns, X.__array_interface__["data"][0], strides(X),
        n_tokens, _by_strip(bias, plan), Y.__array_interface__["data"][0], strides(Y), work,
    )  # fmt: skip


def _scatter(weights: Array, plan: Strips, X: Array, Y: Array, bias: Array) -> None:
    width = VECTOR_BYTES // Y.itemsize * PARTS
    n_tokens = X.shape[1]
    n_shares = min(worker_count(plan.work(n_tokens)), -(-n_tokens // width))
    group, strip_rows = _group(plan)
    work = scratch(n_shares, (plan.n_columns + strip_rows) * width, Y.dtype)
    launch(
        _scatter_share, n_shares, no_turns(), group, weights, plan.columns, plan.indptr, plan.height,
        plan.width, *plan.shape, plan.n_columns, X.__array_interface__["data"][0], strides(X), n_tokens,
        bias, Y.__array_interface__["data"][0], strides(Y), work,
    )  # fmt: skip


def _group(plan: Strips) -> tuple[int, int]:
    """Block rows that are packed or unpacked together, and their rows in strips."""
    group = max(1, _GROUP_ROWS // plan.height) if plan.height % HEIGHT == 0 else 1
    return group, group * plan.strips_per_row * HEIGHT


def _by_strip(bias: Array, plan: Strips) -> Array:
    """The bias of each row of the strips, 0 for those that do not exist."""
    n = len(plan.indptr) - 1
    rows = np.zeros((n, plan.strips_per_row * HEIGHT), bias.dtype)
    whole = np.zeros(n * plan.height, bias.dtype)
    whole[: len(bias)] = bias
    rows[:, : plan.height] = whole.reshape(n, plan.height)
    return rows.reshape(-1)
