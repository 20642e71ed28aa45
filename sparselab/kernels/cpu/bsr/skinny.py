"""Skinny dense blocks x dense: ``Y = W X + b`` for at most `MOST_BLOCK_TOKENS` tokens, and gemv for one.

Loop order, from outside: workers, each with some block rows; block rows; four rows of them; blocks; their
columns. The sums of the four rows stay in registers, and a loaded vector of X serves all of them. Its lanes
are tokens. For one token, or two one after the other, they are columns if a block has whole vectors of them,
so that the weights are loaded as vectors too. No plan is needed, and nothing is packed but the tokens, which
stay in the first two caches. The weights are read where they are, once: 4 bytes each, and 2 for the column of
a block. The bandwidth at which they arrive is the limit for one token, the multiply-adds are for many.

Weights of bfloat16 and int8 are converted when the tokens come to four rows of them (or one that is left
over), into memory that stays in the first-level cache. Sums of the latter are multiplied by their scales.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.csr.skinny import Matrix
from sparselab.kernels.cpu.narrow import Weights, convert
from sparselab.kernels.cpu.partition import rows_of_worker
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch
from sparselab.kernels.cpu.runtime.memory import scratch
from sparselab.kernels.cpu.runtime.program import Place, Program
from sparselab.kernels.cpu.runtime.target import CACHE_LINE
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.dots import sum_of
from sparselab.kernels.cpu.simd.narrow import is_scaled, load_weights, moved, numbers_of
from sparselab.kernels.cpu.simd.vectors import (
    add,
    fma,
    get,
    half_line,
    lanes_of,
    load,
    load_unaligned,
    put,
    quarter_line,
    store,
    view_at,
    whole_line,
)
from sparselab.kernels.cpu.tiles import pack

#: Up to here weights read where they are beat packed ones.
MOST_BLOCK_TOKENS = 64

#: So many tokens one after the other are faster than together, if lanes can be columns.
_ONE_BY_ONE = 2

#: Weights that are worth a thread of their own.
_MIN_PART = 32_768


@jit
def _output(values, scales_at, bias, row, total):  # type: ignore[no-untyped-def]
    """Of the sum of a row."""
    if scales_at is not None:
        total = get(view_at(scales_at, bias), row) * total if is_scaled(values) else total
    return total + get(bias, row)


@jit
def _columns(values, place, tile, column, total):  # type: ignore[no-untyped-def]
    """`total` plus weights times inputs, column by column."""
    return fma(load_weights(values, place, total), load_unaligned(tile, column, total), total)


@jit
def _tokens(values, place, tile, at, total):  # type: ignore[no-untyped-def]
    """`total` plus a weight times its tokens."""
    return fma(get(values, place), load(tile, at, total), total)


@jit
def _dots_of_four(values, start, indices, first, end, size, width, x, like):  # type: ignore[no-untyped-def]
    """Four rows, the first at `start`, of the blocks first : end of `size` weights each; one token."""
    a = b = c = d = like
    for k in range(first, end):
        place, column = start + k * size, np.int64(get(indices, k)) * width
        stop = place + width
        while place < stop:
            a = _columns(values, place, x, column, a)
            b = _columns(values, place + width, x, column, b)
            c = _columns(values, place + 2 * width, x, column, c)
            d = _columns(values, place + 3 * width, x, column, d)
            place += lanes_of(like)
            column += lanes_of(like)
    return sum_of(a), sum_of(b), sum_of(c), sum_of(d)


@jit
def _dot(values, start, indices, first, end, size, width, x, like):  # type: ignore[no-untyped-def]
    """As `_dots_of_four`, of one row."""
    total = like
    for k in range(first, end):
        place, column = start + k * size, np.int64(get(indices, k)) * width
        for j in range(0, width, lanes_of(like)):
            total = _columns(values, place + j, x, column + j, total)
    return sum_of(total)


@jit
def _one_token(  # type: ignore[no-untyped-def]
    first, last, values, scales_at, indices, indptr, height, width, bias, x, y, start, step, n_rows
):
    """Block rows first : last for one token x; its outputs are ``y[start + row * step]``."""
    size, like = height * width, quarter_line(x)
    for r in range(first, last):
        k0, k1 = indptr[r], indptr[r + 1]
        row, bottom = r * height, min((r + 1) * height, n_rows)
        for at in range(0, (bottom - row) // 4 * 4 * width, 4 * width):
            a, b, c, d = _dots_of_four(values, at, indices, k0, k1, size, width, x, like)
            put(y, start + row * step, _output(values, scales_at, bias, row, a))
            put(y, start + (row + 1) * step, _output(values, scales_at, bias, row + 1, b))
            put(y, start + (row + 2) * step, _output(values, scales_at, bias, row + 2, c))
            put(y, start + (row + 3) * step, _output(values, scales_at, bias, row + 3, d))
            row += 4
        while row < bottom:
            total = _dot(values, (row - r * height) * width, indices, k0, k1, size, width, x, like)
            put(y, start + row * step, _output(values, scales_at, bias, row, total))
            row += 1


@jit
def _sums_of_four(values, start, indices, first, end, size, width, tile, sums, like):  # type: ignore[no-untyped-def]
    """As `_dots_of_four`, of a vector of tokens."""
    lanes = lanes_of(like)
    a = b = c = d = like
    if width == 1:  # a loop of its own: setting up the inner one would take most of the time
        for k in range(first, end):
            place, at = start + k * size, np.int64(get(indices, k)) * lanes
            a = _tokens(values, place, tile, at, a)
            b = _tokens(values, place + 1, tile, at, b)
            c = _tokens(values, place + 2, tile, at, c)
            d = _tokens(values, place + 3, tile, at, d)
        first = end
    for k in range(first, end):
        place, at = start + k * size, np.int64(get(indices, k)) * width * lanes
        stop = place + width
        while place < stop:
            a = _tokens(values, place, tile, at, a)
            b = _tokens(values, place + width, tile, at, b)
            c = _tokens(values, place + 2 * width, tile, at, c)
            d = _tokens(values, place + 3 * width, tile, at, d)
            place += 1
            at += lanes
    store(sums, 0, a)
    store(sums, lanes, b)
    store(sums, 2 * lanes, c)
    store(sums, 3 * lanes, d)


@jit
def _sum(values, start, indices, first, end, size, width, tile, sums, like):  # type: ignore[no-untyped-def]
    """As `_sums_of_four`, of one row: the independent chains are of four blocks."""
    step = width * lanes_of(like)
    a = b = c = d = like
    k = first
    while k + 4 <= end:
        place = start + k * size
        at, bt = np.int64(get(indices, k)) * step, np.int64(get(indices, k + 1)) * step
        ct, dt = np.int64(get(indices, k + 2)) * step, np.int64(get(indices, k + 3)) * step
        for j in range(width):
            token = j * lanes_of(like)
            a = _tokens(values, place + j, tile, at + token, a)
            b = _tokens(values, place + size + j, tile, bt + token, b)
            c = _tokens(values, place + 2 * size + j, tile, ct + token, c)
            d = _tokens(values, place + 3 * size + j, tile, dt + token, d)
        k += 4
    while k < end:
        for j in range(width):
            at = np.int64(get(indices, k)) * step + j * lanes_of(like)
            a = _tokens(values, start + k * size + j, tile, at, a)
        k += 1
    store(sums, 0, add(add(a, b), add(c, d)))


@jit
def _some_tokens(  # type: ignore[no-untyped-def]
    first, last, values, scales_at, indices, indptr, height, width, bias, tile, n_tokens, sums,
    y, start, y_strides, n_rows, spare, like,
):  # fmt: skip
    """Block rows first : last for the tokens of a tile."""
    size, lanes = height * width, lanes_of(like)
    for r in range(first, last):
        k0, k1 = indptr[r], indptr[r + 1]
        converted = moved(spare, -k0 * size)
        if scales_at is not None:
            convert(values, k0 * size, k1 * size, converted)
        weights = numbers_of(values, converted)
        row, bottom = r * height, min((r + 1) * height, n_rows)
        while row < bottom:
            at, together = (row - r * height) * width, 4 if row + 4 <= bottom else 1
            if together == 4:
                _sums_of_four(weights, at, indices, k0, k1, size, width, tile, sums, like)
            else:
                _sum(weights, at, indices, k0, k1, size, width, tile, sums, like)
            for i in range(together):
                for t in range(n_tokens):
                    total = _output(values, scales_at, bias, row + i, get(sums, i * lanes + t))
                    put(y, start + (row + i) * y_strides[0] + t * y_strides[1], total)
            row += together


@jit
def _multiply_skinny_blocks(  # type: ignore[no-untyped-def]
    worker, n_workers, values_at, bits, scales_at, indices, indptr, height, width, bias_at, like,
    x_at, x_strides, n_columns, y_at, y_strides, n_rows, n_tokens, lanes, work,
):  # fmt: skip
    if spread(worker, n_workers):
        return
    values, bias = view_at(values_at, bits), view_at(bias_at, like)
    x, y = view_at(x_at, like), view_at(y_at, like)
    first, last = rows_of_worker(worker, n_workers, indptr[:-1], indptr[1:])
    items = 4 * lanes_of(whole_line(like))
    sums, tile = work[worker, :items], work[worker, items:]
    spare = tile[(n_columns + width) * lanes :]
    for token0 in range(0, n_tokens, lanes):
        tokens, start = min(lanes, n_tokens - token0), token0 * y_strides[1]
        pack(x, token0 * x_strides[1], x_strides[0], x_strides[1], n_columns, tokens, tile, lanes)
        tile[n_columns * lanes : (n_columns + width) * lanes] = 0
        if lanes == 1:
            _one_token(
                first, last, values, scales_at, indices, indptr, height, width, bias, tile,
                y, start, y_strides[0], n_rows,
            )  # fmt: skip
        elif lanes == lanes_of(half_line(like)):
            _some_tokens(
                first, last, values, scales_at, indices, indptr, height, width, bias, tile, tokens, sums,
                y, start, y_strides, n_rows, spare, half_line(like),
            )  # fmt: skip
        else:
            _some_tokens(
                first, last, values, scales_at, indices, indptr, height, width, bias, tile, tokens, sums,
                y, start, y_strides, n_rows, spare, whole_line(like),
            )  # fmt: skip


def multiply_skinny_blocks(
    weights: Weights, indices: Array, indptr: Array, block_shape: tuple[int, int], bias_at: int, like: Array,
    X: Matrix, Y: Matrix, n_threads: int,
) -> None:  # fmt: skip
    """``Y = W X + b`` for 1 to `MOST_BLOCK_TOKENS` tokens, with the rows and the blocks of a `BlockCSR`.

    All else is as for `multiply_skinny`.
    """
    if Y[2][0] * Y[2][1] == 0:
        return
    cut = _cut(weights, indices, block_shape, like, X, n_threads)
    work = scratch(cut.n_workers, cut.items, like.dtype)
    launch(
        _multiply_skinny_blocks, cut.n_workers,
        *_arguments(weights, indices, indptr, block_shape, bias_at, like, X, Y, cut.lanes, work),
    )  # fmt: skip


def add_skinny_blocks(
    program: Program, weights: Weights, indices: Array, indptr: Array, block_shape: tuple[int, int],
    bias_at: Place, like: Array, X: Matrix, Y: Matrix, n_threads: int,
) -> None:  # fmt: skip
    """Let a program do what `multiply_skinny_blocks` does, for at least one output."""
    cut = _cut(weights, indices, block_shape, like, X, n_threads)
    work = program.work((cut.n_workers, cut.items), like.dtype)
    program.add(
        _multiply_skinny_blocks, cut.n_workers,
        *_arguments(weights, indices, indptr, block_shape, bias_at, like, X, Y, cut.lanes, work),
    )  # fmt: skip


class _Cut(NamedTuple):
    """Workers, tokens in a vector, and the work memory of each worker."""

    n_workers: int
    lanes: int
    items: int


def _cut(
    weights: Weights, indices: Array, block_shape: tuple[int, int], like: Array, X: Matrix, n_threads: int
) -> _Cut:
    (height, width), (n_columns, n_tokens) = block_shape, X[2]
    line = CACHE_LINE // like.itemsize
    if n_tokens <= _ONE_BY_ONE and width % (line // 4) == 0:
        lanes = 1
    else:
        lanes = line // 2 if n_tokens <= line // 2 else line
    n_workers = min(n_threads, 1 + len(indices) * height * width // _MIN_PART)
    # Room for the weights of a block row that has every column.
    spare = 0 if lanes == 1 or weights[1].dtype == like.dtype else height * (n_columns + width)
    return _Cut(n_workers, lanes, 4 * line + (n_columns + width) * lanes + spare)


def _arguments(
    weights: Weights, indices: Array, indptr: Array, block_shape: tuple[int, int], bias_at: Place,
    like: Array, X: Matrix, Y: Matrix, lanes: int, work: Any,
) -> tuple[Any, ...]:  # fmt: skip
    return (
        *weights, indices, indptr, *block_shape, bias_at, like, X[0], X[1], X[2][0], Y[0], Y[1], Y[2][0],
        X[2][1], lanes, work,
    )  # fmt: skip
