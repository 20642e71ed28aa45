"""Products with sparse tokens: ``Y = X W^T`` and ``dW = dY^T X`` where X is sparse, too.

Both walk the stored entries of X. An entry (t, j) meets row j of the transpose of W, the connections of one
input: forward it adds to the outputs of token t, backward to the gradients of these connections. Tokens are
shared out in ranges of about equal entries; backward every worker goes through all tokens and takes the
inputs that are its own, by the remainder of their number, so that each gradient has one writer and the order
of tokens as its order of summation. 6 bytes of W per multiply-add, beside Y or dY in a near cache.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sparselab.kernels.arrays import Array, Rows, address, for_kernels
from sparselab.kernels.cpu.csr.order import into_order, out_of_order
from sparselab.kernels.cpu.csr.plan import TransposePlan
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.vectors import get, put


class SparseTokens(NamedTuple):
    """X in compressed rows: of token t ``entries[starts[t] : starts[t + 1]]`` in these columns, in any order.

    int32 or int64 starts (tokens + 1,) and columns (entries,), not checked; float32 or float64 entries. A
    column that is there twice counts twice.
    """

    starts: Array
    columns: Array
    entries: Array


@jit
def _multiply(worker, n_workers, edges, starts, columns, entries, begin, indices, weights, offset, out):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    n_rows = len(offset)
    for t in range(edges[worker], edges[worker + 1]):
        at = t * n_rows
        for i in range(n_rows):
            put(out, at + i, get(offset, i))
        for e in range(get(starts, t), get(starts, t + 1)):
            j, factor = np.int64(get(columns, e)), get(entries, e)
            for k in range(get(begin, j), get(begin, j + 1)):
                i = at + np.int64(get(indices, k))
                put(out, i, get(out, i) + factor * get(weights, k))


@jit
def _sample(worker, n_workers, starts, columns, entries, begin, indices, grad, n_rows, sums):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    for t in range(len(starts) - 1):
        at = t * n_rows
        for e in range(get(starts, t), get(starts, t + 1)):
            j, factor = np.int64(get(columns, e)), get(entries, e)
            if j % n_workers == worker:
                for k in range(get(begin, j), get(begin, j + 1)):
                    put(sums, k, get(sums, k) + factor * get(grad, at + np.int64(get(indices, k))))


def multiply_sparse(
    x: SparseTokens, values: Array, W: Rows, plan: TransposePlan, offset: Array, out: Array
) -> None:
    """Write ``X W^T + b`` to `out`, flat (tokens * rows,).

    Parameters
    ----------
    x : SparseTokens
    values : array, (slots,)
        Of W, in the dtype of the entries of X.
    W : Rows
    plan : TransposePlan
        Of W.
    offset : array, (rows,)
        b.
    out : array
    """
    n_tokens = len(x.starts) - 1
    weights = into_order(address(values), values, W, plan.order, out.dtype)
    n_workers = max(1, min(worker_count(_work(x, plan) + out.size), n_tokens))
    # Of about equal work: an entry costs its connections, a token its outputs.
    shares = np.arange(1, n_workers) * (len(x.columns) / n_workers)
    edges = np.concatenate([[0], np.searchsorted(x.starts, shares), [n_tokens]])
    launch(
        _multiply, n_workers, edges, *map(for_kernels, x), plan.indptr, plan.indices, weights,
        for_kernels(offset), out,
    )  # fmt: skip


def sample_sparse(x: SparseTokens, W: Rows, plan: TransposePlan, grad: Array, out: Array) -> None:
    """Write ``sum_t dY[t, i] X[t, j]`` at the connections (i, j) to `out`, (slots,).

    Parameters
    ----------
    x : SparseTokens
    W : Rows
    plan : TransposePlan
        Of W.
    grad : array, flat (tokens * rows,)
        dY, in the dtype of the entries of X.
    out : array
        Spare slots are left as they are.
    """
    sums = np.zeros(W.nnz, out.dtype)
    n_workers = worker_count(_work(x, plan))
    launch(
        _sample, n_workers, *map(for_kernels, x), plan.indptr, plan.indices, for_kernels(grad), W.shape[0],
        sums,
    )  # fmt: skip
    out_of_order(sums, W, plan.order, out)


def _work(x: SparseTokens, plan: TransposePlan) -> int:
    """Multiply-adds, were all inputs alike."""
    return len(x.columns) * len(plan.indices) // max(len(plan.indptr) - 1, 1)
