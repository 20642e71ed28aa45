"""Rows of a sparse matrix as dense blocks, for products that a dense library does faster.

At low sparsity a dense product of all positions beats a sparse one of the live ones. Blocks of rows are
expanded for it, or their entries collected from a dense result; the whole matrix never exists dense.
"""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.bfloat16 import put_number
from sparselab.kernels.cpu.simd.vectors import get, put, weight


@jit
def _expand(worker, n_workers, values, indices, begin, end, row0, row1, n_columns, block):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    rows = row1 - row0
    for i in range(row0 + worker * rows // n_workers, row0 + (worker + 1) * rows // n_workers):
        at = (i - row0) * n_columns
        block[at : at + n_columns] = 0
        for k in range(begin[i], end[i]):
            put_number(block, at + np.int64(get(indices, k)), weight(values, k))


@jit
def _collect(worker, n_workers, block, indices, begin, end, row0, row1, n_columns, out):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    rows = row1 - row0
    for i in range(row0 + worker * rows // n_workers, row0 + (worker + 1) * rows // n_workers):
        at = (i - row0) * n_columns
        for k in range(begin[i], end[i]):
            put(out, k, get(block, at + np.int64(get(indices, k))))


def expand_rows(
    values: Array, indices: Array, begin: Array, end: Array, row0: int, row1: int, n_columns: int,
    block: Array,
) -> None:  # fmt: skip
    """Write rows ``row0 : row1`` of W to `block`, flat in C order and at least as long as they need.

    Row i of W is the slots ``begin[i] : end[i]``. The values have the block's dtype, or are the bits of
    bfloat16 in uint16 beside float32; float32 is rounded if the block holds such bits.
    """
    n_workers = max(1, min(worker_count(), row1 - row0))
    launch(_expand, n_workers, values, indices, begin, end, row0, row1, n_columns, block)


def collect_rows(
    block: Array, indices: Array, begin: Array, end: Array, row0: int, row1: int, n_columns: int, out: Array
) -> None:
    """Copy the live positions of `block`, laid out as by `expand_rows`, to their slots in `out`."""
    n_workers = max(1, min(worker_count(), row1 - row0))
    launch(_collect, n_workers, block, indices, begin, end, row0, row1, n_columns, out)
