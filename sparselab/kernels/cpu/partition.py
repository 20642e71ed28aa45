"""How rows, sorted slots and sorted positions are divided among workers."""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array, Rows
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import worker_count

_MIN_PART = 1 << 14


def split_rows(W: Rows) -> Array:
    """int64 (workers + 1,): boundaries of ranges of rows with about equally many slots."""
    return cut_rows(W.indptr, max(1, min(worker_count(), int(W.indptr[-1]) // _MIN_PART)))


def cut_rows(begin: Array, n_workers: int) -> Array:
    """int64 (n_workers + 1,): boundaries of ranges of rows that are about equally long together.

    Row r is ``begin[r] : begin[r + 1]``.
    """
    n_rows = len(begin) - 1
    inner = np.searchsorted(begin, np.arange(1, n_workers) * begin[-1] // n_workers)
    return np.concatenate([[0], np.minimum(inner, n_rows), [n_rows]]).astype(np.int64)


@jit
def first_not_below(ascending, bound):  # type: ignore[no-untyped-def]
    """How many entries are below `bound`."""
    low, high = 0, len(ascending)
    while low < high:
        middle = (low + high) // 2
        if ascending[middle] < bound:
            low = middle + 1
        else:
            high = middle
    return low


@jit
def rows_of_worker(worker, n_workers, begin, end):  # type: ignore[no-untyped-def]
    """Rows of one worker; workers have equally many connections, not rows."""
    n_rows = len(begin)
    if n_rows == 0:
        return 0, 0
    low, span = begin[0], end[n_rows - 1] - begin[0]
    first = first_not_below(begin, low + span * worker // n_workers) if worker > 0 else 0
    last = (
        first_not_below(begin, low + span * (worker + 1) // n_workers) if worker + 1 < n_workers else n_rows
    )
    return first, last
