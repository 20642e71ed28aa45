"""Sparse products with shifted rows of planes (see `planes`), the arithmetic of a sparse convolution.

``Y[i, t] = sum_k v_k P[offset_k + t] + b_i`` over the connections k of row i, and its gradient by the values,
``dW_k = sum_t DY[i, t] P[offset_k + t]``. A column's tokens follow each other in memory, so nothing is
packed: the rows of P are loaded where they are, at any alignment.

Loop order of `multiply_shifted`, from outside: (row group, tile of tokens) in a dynamic schedule; blocks of
columns; rows. In registers: the tile of one sum, two tile rows. In the first-level cache: what the windows of
the tile see of a block's planes. Loop order of `sample_shifted`: workers; long tiles of tokens; rows;
`_DOTS` connections at a time, whose sums stay in registers while they go along the tile and share the loads
of DY. Per connection and tile row: one tile row loaded and multiplied; per connection and tile 4 + 2 bytes of
value and column.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.csr.plan import Segments, product_groups
from sparselab.kernels.cpu.partition import cut_rows
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, new_counter, worker_count
from sparselab.kernels.cpu.runtime.memory import scratch_of_values
from sparselab.kernels.cpu.runtime.target import TILE_BYTES
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.dots import add_sums
from sparselab.kernels.cpu.simd.vectors import (
    fma,
    get,
    lanes_of,
    load_unaligned,
    next_item,
    splat,
    store_unaligned,
    tile_width,
    view_at,
    weight,
    zeros_register,
    zeros_tile,
)

#: Connections whose dots are formed together.
_DOTS = 8

#: Bytes of a row of DY that a worker goes along before it turns to the next row.
_LONG_TILE_BYTES = 4096

_MIN_PART = 16384


class PlanePlan(NamedTuple):
    """The order of the gradient by planes: connections plane by plane, and the segments of these rows.

    Row p is the connections ``indptr[p] : indptr[p + 1]``. Connection k has column ``indices[k]`` (an output
    and an element) and the value in slot ``slots[k]``.
    """

    indptr: Array
    indices: Array
    slots: Array
    segments: Segments


@jit
def _gather_values(worker, n_workers, values_at, bits, slots, out):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    n, values = len(slots), view_at(values_at, bits)
    for k in range(worker * n // n_workers, (worker + 1) * n // n_workers):
        out[k] = weight(values, np.int64(get(slots, k)))


def gather(values_at: int, bits: Array, slots: Array, dtype: np.dtype[Any]) -> Array:
    """The values at an address, of the dtype of `bits`, in the order of the slots, and what lies behind them.

    bfloat16 is given as its bits in uint16. The array is lent until the next call in the same thread.
    """
    ordered = scratch_of_values(len(slots), dtype)
    n_workers = 1 if len(slots) < 2 * _MIN_PART else min(worker_count(), len(slots) // _MIN_PART)
    launch(_gather_values, n_workers, values_at, bits, slots, ordered)
    return ordered


@jit
def _multiply_windows(  # type: ignore[no-untyped-def]
    worker, n_workers, counter, values, indices, bias, plan, groups, offsets, x, y, y_stride, n_tokens
):
    if spread(worker, n_workers):
        return
    like, width = zeros_tile(y), tile_width(y)
    n_tiles = n_tokens // (2 * width)
    n_pairs = (len(groups) - 1) * n_tiles
    pair = next_item(counter)
    while pair < n_pairs:
        chunk0, chunk1 = groups[pair // n_tiles], groups[pair // n_tiles + 1]
        token = pair % n_tiles * 2 * width
        for b in range(plan.ptr.shape[1] - 1):
            for c in range(chunk0, chunk1):
                for p in range(plan.ptr[c, b], plan.ptr[c, b + 1]):
                    row = np.int64(get(plan.row, p))
                    slot = np.int64(get(plan.start, p))
                    at = row * y_stride + token
                    left = splat(get(bias, row), like)
                    right = left
                    if b > 0:
                        left, right = load_unaligned(y, at, left), load_unaligned(y, at + width, left)
                    for k in range(slot, slot + np.int64(get(plan.length, p))):
                        place = np.int64(get(offsets, np.int64(get(indices, k)))) + token
                        w = weight(values, k)
                        left = fma(w, load_unaligned(x, place, left), left)
                        right = fma(w, load_unaligned(x, place + width, left), right)
                    store_unaligned(y, at, left)
                    store_unaligned(y, at + width, right)
        pair = next_item(counter)


def multiply_shifted(
    values: Array, indices: Array, plan: Segments, offsets: Array, X: Array, Y: Array, n_tokens: int,
    bias: Array,
) -> None:  # fmt: skip
    """``Y[i, t] = sum_k v_k X[offsets[j_k] + t] + b_i`` for ``t < n_tokens``, in whole tiles.

    Parameters
    ----------
    values, indices : arrays, (nnz,)
        The values have the dtype of X, or are the bits of bfloat16 in uint16 beside float32.
    plan : Segments
    offsets : int64 array, (columns,)
        Where in X, flat, the tokens of each column begin.
    X : array, C order
    Y : array, (rows, at least n_tokens), C order
        Overwritten.
    n_tokens : int
        From `whole_tiles`.
    bias : array, (rows,)
    """
    n_tiles = n_tokens * Y.itemsize // (2 * TILE_BYTES)
    if n_tiles * len(Y) == 0:
        return
    workers = worker_count(plan.n_connections * n_tokens)
    groups = product_groups(plan, n_tiles, workers, Y.itemsize + indices.itemsize)
    n_workers = min(workers, (len(groups) - 1) * n_tiles)
    launch(
        _multiply_windows, n_workers, new_counter(), values, indices, bias, plan, groups, offsets,
        X.reshape(-1), Y.reshape(-1), Y.shape[1], n_tokens,
    )  # fmt: skip


@jit
def _place(offsets, indices, slot, last):  # type: ignore[no-untyped-def]
    return np.int64(get(offsets, np.int64(get(indices, min(slot, last)))))


@jit
def _sample_windows(  # type: ignore[no-untyped-def]
    worker, n_workers, edges, indices, begin, end, offsets, dy, dy_stride, x, n_tokens, long_tile, out
):
    if spread(worker, n_workers):
        return
    zero = zeros_register(x)
    lanes = lanes_of(zero)
    for token0 in range(0, n_tokens, long_tile):
        token1 = min(token0 + long_tile, n_tokens)
        for i in range(edges[worker], edges[worker + 1]):
            row, last = i * dy_stride, end[i] - 1
            for slot in range(begin[i], end[i], _DOTS):
                # The places past the last connection are its own again.
                p0, p1 = _place(offsets, indices, slot, last), _place(offsets, indices, slot + 1, last)
                p2, p3 = _place(offsets, indices, slot + 2, last), _place(offsets, indices, slot + 3, last)
                p4, p5 = _place(offsets, indices, slot + 4, last), _place(offsets, indices, slot + 5, last)
                p6, p7 = _place(offsets, indices, slot + 6, last), _place(offsets, indices, slot + 7, last)
                s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = zero
                for t in range(token0, token1, lanes):
                    d = load_unaligned(dy, row + t, zero)
                    s0 = fma(d, load_unaligned(x, p0 + t, zero), s0)
                    s1 = fma(d, load_unaligned(x, p1 + t, zero), s1)
                    s2 = fma(d, load_unaligned(x, p2 + t, zero), s2)
                    s3 = fma(d, load_unaligned(x, p3 + t, zero), s3)
                    s4 = fma(d, load_unaligned(x, p4 + t, zero), s4)
                    s5 = fma(d, load_unaligned(x, p5 + t, zero), s5)
                    s6 = fma(d, load_unaligned(x, p6 + t, zero), s6)
                    s7 = fma(d, load_unaligned(x, p7 + t, zero), s7)
                add_sums(out, slot, last + 1, (s0, s1, s2, s3, s4, s5, s6, s7))


def sample_shifted(
    indices: Array, begin: Array, end: Array, offsets: Array, DY: Array, X: Array, n_tokens: int,
    out: Array,
) -> None:  # fmt: skip
    """``out[k] += sum of DY[i, t] X[offsets[j_k] + t]`` over ``t < n_tokens``, in whole tiles.

    Row i is the connections ``begin[i] : end[i]``; DY (rows, tokens) and X are in C order.
    The sum over the tokens has the same order for any number of threads.
    """
    n_workers = max(1, min(worker_count(len(indices) * n_tokens), len(DY)))
    edges = cut_rows(np.append(begin, end[-1:]), n_workers)
    launch(
        _sample_windows, n_workers, edges, indices, begin, end, offsets, DY.reshape(-1), DY.shape[1],
        X.reshape(-1), n_tokens, _LONG_TILE_BYTES // X.itemsize, out,
    )  # fmt: skip
