"""How work on sorted slots and positions is cut into shares, one for each worker."""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array, Rows
from sparselab.kernels.cpu.runtime.jit import jit, worker_count

_MIN_SHARE = 1 << 16


def share_rows(W: Rows) -> Array:
    """int64 (shares + 1,): boundaries of ranges of rows with about equally many slots."""
    return cut_rows(W.indptr, max(1, min(worker_count(), int(W.indptr[-1]) // _MIN_SHARE)))


def cut_rows(begin: Array, n_shares: int) -> Array:
    """int64 (n_shares + 1,): boundaries of ranges of rows that are about equally long together.

    Row r is ``begin[r] : begin[r + 1]``.
    """
    n_rows = len(begin) - 1
    inner = np.searchsorted(begin, np.arange(1, n_shares) * begin[-1] // n_shares)
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
