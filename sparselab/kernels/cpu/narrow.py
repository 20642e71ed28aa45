"""Weights of bfloat16 and int8 as float32: some of them in work memory of a kernel, or all before it.

There a multiply-add reads a weight as it reads one of float32. To convert each by itself, whenever it is met,
would take two operations more, on the one port that has them.
"""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.partition import rows_of_worker
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch
from sparselab.kernels.cpu.runtime.memory import scratch, scratch_of_values
from sparselab.kernels.cpu.runtime.program import Place
from sparselab.kernels.cpu.runtime.target import VECTOR_BYTES
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.narrow import is_scaled, load_weights
from sparselab.kernels.cpu.simd.vectors import (
    fma,
    get,
    lanes_of,
    load_unaligned,
    put,
    store_unaligned,
    view_at,
    weight,
    zeros_register,
)

#: Address and dtype of contiguous weights, the latter as an array whose contents are not read, and the
#: address of the float32 scales of rows, which only weights of int8 have: 0 for bfloat16. It is None for
#: numbers, so that what converts is not compiled for them.
Weights = tuple[Place, Array, int | None]

#: Weights that are worth a thread of their own.
_MIN_PART = 65_536


@jit
def convert(values, first, end, out):  # type: ignore[no-untyped-def]
    """``out[k]`` is the number that weight k stands for, for k from `first` to `end`; without its scale."""
    like = zeros_register(out)
    width, k = lanes_of(like), first
    while k + width <= end:
        store_unaligned(out, k, load_weights(values, k, like))
        k += width
    if k < end and end - first >= width:  # some of them again
        store_unaligned(out, end - width, load_weights(values, end - width, like))
        k = end
    while k < end:
        put(out, k, weight(values, k))
        k += 1


@jit
def _convert_scaled(values, first, end, pattern, size, out):  # type: ignore[no-untyped-def]
    """As `convert`, times the numbers of a pattern that begins anew after every `size` weights."""
    like = zeros_register(out)
    width, k, at = lanes_of(like), first, 0
    step = width % size
    while k + width <= end:
        factors = load_unaligned(pattern, at, like)
        store_unaligned(out, k, fma(load_weights(values, k, like), factors, like))
        k += width
        at += step
        if at >= size:
            at -= size
    if k < end and end - first >= width:  # some of them again
        k = end - width
        factors = load_unaligned(pattern, (k - first) % size, like)
        store_unaligned(out, k, fma(load_weights(values, k, like), factors, like))
        k = end
    for j in range(end - k):
        put(out, k + j, weight(values, k + j) * get(pattern, at + j))


@jit
def _expand(  # type: ignore[no-untyped-def]
    worker, n_workers, values_at, bits, scales_at, begin, end, height, width, n_rows, out, patterns
):
    """Block rows of one worker."""
    if spread(worker, n_workers):
        return
    values, scales, pattern = view_at(values_at, bits), view_at(scales_at, out), patterns[worker]
    first, last = rows_of_worker(worker, n_workers, begin, end)
    size = height * width
    if not is_scaled(values):
        if first < last:
            convert(values, begin[first] * size, end[last - 1] * size, out)
        return
    for r in range(first, last):
        for i in range(height):
            row = r * height + i
            scale = get(scales, row) if row < n_rows else out.dtype.type(0)
            for j in range(i * width, (i + 1) * width):
                put(pattern, j, scale)
        for j in range(lanes_of(zeros_register(out))):  # as it goes on, for vectors
            put(pattern, size + j, get(pattern, j))
        _convert_scaled(values, begin[r] * size, end[r] * size, pattern, size, out)


def expand(
    weights: Weights, begin: Array, end: Array, block_shape: tuple[int, int], n_rows: int, n_threads: int,
    out: Array | None = None,
) -> Array:  # fmt: skip
    """All weights as float32, flat, with their scales.

    Parameters
    ----------
    weights : Weights
    begin, end : int64 (block rows,)
        Blocks of each block row; the first begins at 0, and they follow each other.
    block_shape : (int, int)
    n_rows : int
        Rows of the matrix, beyond which the last blocks may reach.
    n_threads : int
        Threads at most.
    out : float32 array, optional
        Written to. By default memory that is lent until the next call in the same thread, with anything
        behind the weights.
    """
    values_at, bits, scales_at = weights
    height, width = block_shape
    n_weights = int(end[-1]) * height * width if len(end) else 0
    if out is None:
        out = scratch_of_values(n_weights, np.dtype(np.float32))
    n_workers = max(1, min(n_threads, n_weights // _MIN_PART))
    patterns = scratch(n_workers, height * width + VECTOR_BYTES // out.itemsize, out.dtype)
    launch(_expand, n_workers, values_at, bits, scales_at, begin, end, height, width, n_rows, out, patterns)
    return out
