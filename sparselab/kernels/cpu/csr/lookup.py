"""Rows of W that are looked up by number, as an embedding does, and the sums of their gradients.

Forward: for each token, zeros for a dense row of Y, then the live entries of one row of W. Tokens are shared
out in ranges. Backward: every worker goes through all tokens and adds up those rows of W that are its own,
by the remainder of their number, so that each entry has one writer and the order of tokens as its order of
summation. 6 bytes of W per live entry of a row that is looked up, beside Y or dY.
"""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array, for_kernels
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.vectors import get, put


@jit
def _look_up(worker, n_workers, tokens, begin, indices, values, n_columns, out):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    n = len(tokens)
    for t in range(worker * n // n_workers, (worker + 1) * n // n_workers):
        at = t * n_columns
        out[at : at + n_columns] = 0
        row = get(tokens, t)
        for k in range(get(begin, row), get(begin, row + 1)):
            put(out, at + np.int64(get(indices, k)), get(values, k))


@jit
def _add_up(worker, n_workers, tokens, begin, indices, grad, n_columns, out):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    for t in range(len(tokens)):
        row = get(tokens, t)
        if row % n_workers == worker:
            at = t * n_columns
            for k in range(get(begin, row), get(begin, row + 1)):
                put(out, k, get(out, k) + get(grad, at + np.int64(get(indices, k))))


def look_up(tokens: Array, indptr: Array, indices: Array, values: Array, n_columns: int, out: Array) -> None:
    """Write the rows of W with these numbers to `out`, dense.

    Parameters
    ----------
    tokens : int64 array, (n,)
        Numbers of rows, not checked.
    indptr, indices, values : arrays
        W, without spare slots; the bits of bfloat16 in uint16.
    n_columns : int
    out : array, (n * n_columns,), of the dtype of the values
    """
    n_workers = worker_count(out.size)
    arrays = (for_kernels(each) for each in (tokens, indptr, indices, values))
    launch(_look_up, n_workers, *arrays, n_columns, out)


def add_up(tokens: Array, indptr: Array, indices: Array, grad: Array, n_columns: int, out: Array) -> None:
    """Add to `out`, slot by slot, what the gradients of looked-up rows have at the connections.

    Parameters
    ----------
    tokens, indptr, indices : arrays
        As of `look_up`.
    grad : float32 or float64 array, (n * n_columns,)
    n_columns : int
    out : array, (nnz,), of that dtype
    """
    n_workers = worker_count(grad.size)
    arrays = (for_kernels(each) for each in (tokens, indptr, indices, grad))
    launch(_add_up, n_workers, *arrays, n_columns, out)
