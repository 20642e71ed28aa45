"""Skinny sparse x dense: ``Y = W X + b`` with at most `MOST_TOKENS` columns in X, and gemv for one.

A whole tile would spend most of its arithmetic on padding. Here a row's sums are one narrow vector (or one
number) that walks the row's connections once, in four independent chains, and no plan is needed. The limit is
the bandwidth at which values and columns arrive, since each is used once. Weights of bfloat16 and int8 are
converted in registers, and rows of the latter multiplied by their scales when they are summed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparselab.kernels.arrays import NONE_OF, Array, address, strides
from sparselab.kernels.cpu.narrow import Weights
from sparselab.kernels.cpu.partition import rows_of_worker
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch
from sparselab.kernels.cpu.runtime.memory import scratch
from sparselab.kernels.cpu.runtime.program import Place, Program
from sparselab.kernels.cpu.runtime.target import HAS_FAST_GATHERS, VECTOR_BYTES
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.narrow import four_weights, is_scaled
from sparselab.kernels.cpu.simd.vectors import (
    add,
    fma,
    get,
    lanes_of,
    load,
    put,
    splat,
    store,
    view_at,
    weight,
    zeros8,
    zeros16,
    zeros_twice16,
)
from sparselab.kernels.cpu.tiles import pack

#: Up to here narrow vectors beat a whole tile.
MOST_TOKENS = 32 if VECTOR_BYTES == 64 else 16

#: Up to here each token is read where it lies, by gathers, where these are fast.
_BY_ROWS = 2 if HAS_FAST_GATHERS else 1

#: Connections that are worth a thread of their own (5 us); starting one takes half as long.
_MIN_PART = 16_384


@jit
def _start(values, bias, i):  # type: ignore[no-untyped-def]
    """What the sum of row i begins with: its bias, unless it is to be multiplied by a scale."""
    return bias.dtype.type(0) if is_scaled(values) else get(bias, i)


@jit
def _finish(values, scales_at, bias, i, total):  # type: ignore[no-untyped-def]
    """The output of row i, of its sum."""
    if scales_at is not None:
        scales = view_at(scales_at, bias)
        total = get(scales, i) * total + get(bias, i) if is_scaled(values) else total
    return total


@jit
def _one_token(values, scales_at, indices, begin, end, bias, first, last, x, step, y, y_step):  # type: ignore[no-untyped-def]
    """Rows first : last for one token: each is a dot with gathered inputs."""
    for i in range(first, last):
        total = _start(values, bias, i)
        if step == 1:
            for k in range(begin[i], end[i]):
                total += weight(values, k) * get(x, np.int64(get(indices, k)))
        else:
            for k in range(begin[i], end[i]):
                total += weight(values, k) * get(x, np.int64(get(indices, k)) * step)
        put(y, i * y_step, _finish(values, scales_at, bias, i, total))


@jit
def _two_tokens(  # type: ignore[no-untyped-def]
    values, scales_at, indices, begin, end, bias, first, last, x, x_strides, y, y_strides
):
    """The same for two."""
    step, other = x_strides
    for i in range(first, last):
        a = b = _start(values, bias, i)
        if step == 1:
            for k in range(begin[i], end[i]):
                j = np.int64(get(indices, k))
                a += weight(values, k) * get(x, j)
                b += weight(values, k) * get(x, other + j)
        else:
            for k in range(begin[i], end[i]):
                j = np.int64(get(indices, k)) * step
                a += weight(values, k) * get(x, j)
                b += weight(values, k) * get(x, other + j)
        put(y, i * y_strides[0], _finish(values, scales_at, bias, i, a))
        put(y, i * y_strides[0] + y_strides[1], _finish(values, scales_at, bias, i, b))


@jit
def _row_sum(values, indices, k, end, tile, start):  # type: ignore[no-untyped-def]
    """`start` plus the products of connections k : end with their rows of the tile."""
    width = lanes_of(start)
    a, b = start, splat(tile.dtype.type(0), start)
    c, d = b, b
    while k + 4 <= end:
        four = four_weights(values, k, start)
        a = fma(four[0], load(tile, np.int64(get(indices, k)) * width, a), a)
        b = fma(four[1], load(tile, np.int64(get(indices, k + 1)) * width, a), b)
        c = fma(four[2], load(tile, np.int64(get(indices, k + 2)) * width, a), c)
        d = fma(four[3], load(tile, np.int64(get(indices, k + 3)) * width, a), d)
        k += 4
    while k < end:
        a = fma(weight(values, k), load(tile, np.int64(get(indices, k)) * width, a), a)
        k += 1
    return add(add(a, b), add(c, d))


@jit
def _some_tokens(  # type: ignore[no-untyped-def]
    values, scales_at, indices, begin, end, bias, first, last,
    x, x_strides, n_columns, y, y_strides, n_tokens, memory, zeros,
):  # fmt: skip
    """Rows first : last for some tokens: all of X is packed, one vector of tokens to a row of the tile."""
    width = lanes_of(zeros)
    line, tile = memory[:width], memory[width:]
    pack(x, 0, x_strides[0], x_strides[1], n_columns, n_tokens, tile, width)
    for i in range(first, last):
        start = splat(_start(values, bias, i), zeros)
        store(line, 0, _row_sum(values, indices, begin[i], end[i], tile, start))
        for t in range(n_tokens):
            total = _finish(values, scales_at, bias, i, get(line, t))
            put(y, i * y_strides[0] + t * y_strides[1], total)


@jit
def _multiply_skinny(  # type: ignore[no-untyped-def]
    worker, n_workers, values_at, bits, scales_at, indices, begin, end, bias_at, like,
    x_at, x_strides, n_columns, y_at, y_strides, n_tokens, work,
):  # fmt: skip
    if spread(worker, n_workers):
        return
    values, bias = view_at(values_at, bits), view_at(bias_at, like)
    x, y = view_at(x_at, like), view_at(y_at, like)
    first, last = rows_of_worker(worker, n_workers, begin, end)
    if n_tokens <= _BY_ROWS:
        if n_tokens == 1:
            _one_token(
                values, scales_at, indices, begin, end, bias, first, last, x, x_strides[0], y, y_strides[0]
            )
        else:
            _two_tokens(values, scales_at, indices, begin, end, bias, first, last, x, x_strides, y, y_strides)
    elif n_tokens <= 8:
        _some_tokens(
            values, scales_at, indices, begin, end, bias, first, last,
            x, x_strides, n_columns, y, y_strides, n_tokens, work[worker], zeros8(like),
        )  # fmt: skip
    else:
        _some_tokens(
            values, scales_at, indices, begin, end, bias, first, last,
            x, x_strides, n_columns, y, y_strides, n_tokens, work[worker], zeros16(like),
        )  # fmt: skip


@jit
def _multiply_wide(  # type: ignore[no-untyped-def]
    worker, n_workers, values_at, bits, scales_at, indices, begin, end, bias_at, like,
    x_at, x_strides, n_columns, y_at, y_strides, n_tokens, work,
):  # fmt: skip
    """The same for 17 to 32 tokens; by itself, so that who has no such products does not compile it."""
    if spread(worker, n_workers):
        return
    values, bias = view_at(values_at, bits), view_at(bias_at, like)
    first, last = rows_of_worker(worker, n_workers, begin, end)
    _some_tokens(
        values, scales_at, indices, begin, end, bias, first, last, view_at(x_at, like), x_strides, n_columns,
        view_at(y_at, like), y_strides, n_tokens, work[worker], zeros_twice16(like),
    )  # fmt: skip


#: A dense matrix by its address, strides, shape, and the entry of `NONE_OF` for its dtype, which cost less to
#: hand over than an array.
Matrix = tuple[Place, tuple[int, int], tuple[int, int], Array]


def matrix(array: Array) -> Matrix:
    """A 2-D array as the kernels here take it."""
    rows, columns = array.shape
    return address(array), strides(array), (rows, columns), NONE_OF[array.dtype]


def skinny_workers(n_connections: int, n_threads: int) -> int:
    """Workers for so many connections and few tokens."""
    return min(n_threads, 1 + n_connections // _MIN_PART)


_EMPTY = {np.dtype(name): np.empty((0, 0), name) for name in (np.float32, np.float64)}


def multiply_skinny(
    weights: Weights, indices: Array, begin: Array, end: Array, bias_at: int, like: Array, X: Matrix,
    Y: Matrix, n_threads: int,
) -> None:  # fmt: skip
    """``Y = W X + b`` for 1 to `MOST_TOKENS` tokens, where row i of W is the slots ``begin[i] : end[i]``.

    X ``(columns, tokens)`` and Y ``(rows, tokens)`` may have any strides (in items). The weights and the bias
    are contiguous at their addresses. The array `like`, whose contents are not read, has the dtype of X, Y
    and the bias. The weights have the same, or, beside float32, are uint16, the bits of bfloat16, or int8.
    Nothing is checked; Y is overwritten and overlaps nothing.
    """
    if Y[2][0] * Y[2][1] == 0:
        return
    n_workers, n_items = skinny_workers(len(indices), n_threads), _skinny_items(X)
    work = scratch(n_workers, n_items, like.dtype) if n_items else _EMPTY[like.dtype]
    launch(_skinny_kernel(X), n_workers, *_of_skinny(weights, indices, begin, end, bias_at, like, X, Y, work))


def add_skinny(
    program: Program, weights: Weights, indices: Array, begin: Array, end: Array, bias_at: Place, like: Array,
    X: Matrix, Y: Matrix, n_threads: int,
) -> None:  # fmt: skip
    """Let a program do what `multiply_skinny` does, for at least one output."""
    n_workers, n_items = skinny_workers(len(indices), n_threads), _skinny_items(X)
    work = program.work((n_workers, n_items), like.dtype) if n_items else _EMPTY[like.dtype]
    program.add(
        _skinny_kernel(X), n_workers, *_of_skinny(weights, indices, begin, end, bias_at, like, X, Y, work)
    )


def _skinny_kernel(X: Matrix) -> Any:
    return _multiply_wide if X[2][1] > 16 else _multiply_skinny


def _skinny_items(X: Matrix) -> int:
    """Work memory of each worker."""
    n_columns, n_tokens = X[2]
    if n_tokens <= _BY_ROWS:
        return 0
    return (n_columns + 1) * (8 if n_tokens <= 8 else 16 if n_tokens <= 16 else 32)


def _of_skinny(
    weights: Weights, indices: Array, begin: Array, end: Array, bias_at: Place, like: Array, X: Matrix,
    Y: Matrix, work: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of the kernels behind the workers."""
    return (
        *weights, indices, begin, end, bias_at, like, X[0], X[1], X[2][0], Y[0], Y[1], X[2][1], work
    )  # fmt: skip
