"""Dense x dense sampled at the connections, for the few tokens that do not repay tiles.

A tile of `sddmm_dw` costs the same however few tokens fill it. Here the connections of a row stay in the
first-level cache while the tokens pass over them, two at a time: each reads its inputs where they lie.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.csr.skinny import Matrix, skinny_workers
from sparselab.kernels.cpu.partition import rows_of_worker
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch
from sparselab.kernels.cpu.runtime.program import Place, Program
from sparselab.kernels.cpu.runtime.target import HAS_FAST_GATHERS
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.scattered import gather
from sparselab.kernels.cpu.simd.vectors import (
    fma,
    get,
    lanes_of,
    load_unaligned,
    put,
    store_unaligned,
    view_at,
    zeros16,
)

#: Up to here it is faster than a whole tile.
MOST_SAMPLED_TOKENS = 6 if HAS_FAST_GATHERS else 2


@jit
def _one_token(indices, k, end, d, x, at, out):  # type: ignore[no-untyped-def]
    """Write ``d x[at + j]`` for the connections k : end of a row."""
    zeros = zeros16(x)
    lanes = lanes_of(zeros)
    while k + lanes <= end:
        store_unaligned(out, k, fma(d, gather(x, at, indices, k, zeros), zeros))
        k += lanes
    while k < end:
        put(out, k, d * get(x, at + np.int64(get(indices, k))))
        k += 1


@jit
def _two_tokens(indices, k, end, d, x, at, other_d, other_at, out, begins):  # type: ignore[no-untyped-def]
    """Write, or add if it is not the first that `begins`, the products of two tokens."""
    zeros = zeros16(x)
    lanes = lanes_of(zeros)
    while k + lanes <= end:
        total = zeros if begins else load_unaligned(out, k, zeros)
        total = fma(d, gather(x, at, indices, k, zeros), total)
        store_unaligned(out, k, fma(other_d, gather(x, other_at, indices, k, zeros), total))
        k += lanes
    while k < end:
        j = np.int64(get(indices, k))
        total = d * get(x, at + j) + other_d * get(x, other_at + j)
        put(out, k, total if begins else get(out, k) + total)
        k += 1


@jit
def _sample_skinny(  # type: ignore[no-untyped-def]
    worker, n_workers, indices, begin, end, like, dy_at, dy_strides, x_at, token_stride, n_tokens,
    out_at, sums_at,
):  # fmt: skip
    if spread(worker, n_workers):
        return
    x, dy, out, sums = (
        view_at(x_at, like),
        view_at(dy_at, like),
        view_at(out_at, like),
        view_at(sums_at, like),
    )
    first, last = rows_of_worker(worker, n_workers, begin, end)
    for i in range(first, last):
        at, step = i * dy_strides[0], dy_strides[1]
        token = n_tokens % 2
        if token:
            _one_token(indices, begin[i], end[i], get(dy, at), x, 0, out)
        while token < n_tokens:
            d, other_d = get(dy, at + token * step), get(dy, at + (token + 1) * step)
            start = token * token_stride
            _two_tokens(
                indices, begin[i], end[i], d, x, start, other_d, start + token_stride, out, token == 0
            )
            token += 2
        if sums_at != 0:
            total = get(dy, at)
            for t in range(1, n_tokens):
                total += get(dy, at + t * step)
            put(sums, i, total)


def sample_skinny(
    indices: Array, begin: Array, end: Array, DY: Matrix, X: Matrix, out_at: int, sums_at: int, like: Array,
    n_threads: int,
) -> None:  # fmt: skip
    """``out[slot] = DY[i] . X[j]`` for the slots ``begin[i] : end[i]`` of every row, whose columns are j.

    For 1 to `MOST_SAMPLED_TOKENS` tokens, whose inputs lie side by side. The sums of DY over the tokens go to
    another address, or nowhere if it is 0. Everything is of the dtype of the array `like`, whose contents are
    not read.
    """
    arguments = _arguments(indices, begin, end, DY, X, out_at, sums_at, like)
    launch(_sample_skinny, skinny_workers(len(indices), n_threads), *arguments)


def add_sample_skinny(
    program: Program, indices: Array, begin: Array, end: Array, DY: Matrix, X: Matrix, out_at: Place,
    sums_at: Place, like: Array, n_threads: int,
) -> None:  # fmt: skip
    """Let a program do what `sample_skinny` does."""
    arguments = _arguments(indices, begin, end, DY, X, out_at, sums_at, like)
    program.add(_sample_skinny, skinny_workers(len(indices), n_threads), *arguments)


def _arguments(
    indices: Array, begin: Array, end: Array, DY: Matrix, X: Matrix, out_at: Place, sums_at: Place,
    like: Array,
) -> tuple[Any, ...]:  # fmt: skip
    return indices, begin, end, like, DY[0], DY[1], X[0], X[1][1], X[2][1], out_at, sums_at
