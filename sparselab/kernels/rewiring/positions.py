"""Where connections are and may come to be, as linear positions ``row * columns + column``.

Nothing here lists the free positions: they are what lies between the live ones. Each worker has a range of
rows and finds its place in the sorted arguments by bisection, so the result does not depend on how many
workers there are.
"""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array, Rows, for_kernels, slot_dtype
from sparselab.kernels.cpu.partition import first_not_below, split_rows
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.team import spread

_MIN_PART = 1 << 15


@jit
def _list_kept(worker, n_workers, edges, indptr, row_nnz, indices, n_columns, drop, before, out):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    row0 = edges[worker]
    d = first_not_below(drop, indptr[row0])
    at = before[worker] - d
    for i in range(row0, edges[worker + 1]):
        for slot in range(indptr[i], indptr[i] + row_nnz[i]):
            if d < len(drop) and drop[d] == slot:
                d += 1
                continue
            out[at] = i * n_columns + np.int64(indices[slot])
            at += 1


def kept_positions(W: Rows, drop: Array) -> Array:
    """Positions of the connections that are not dropped, ascending.

    Parameters
    ----------
    W : Rows
    drop : int array, (k,)
        Live slots, strictly ascending; not checked.

    Returns
    -------
    int32 or int64 array, (nnz - k,)
    """
    W, drop = W.rows, for_kernels(drop)
    rows, columns = W.shape
    edges = split_rows(W)
    before = _live_before(W, edges)
    out = np.empty(W.nnz - len(drop), slot_dtype(rows * columns))
    launch(_list_kept, len(edges) - 1, edges, W.indptr, W.row_nnz, W.indices, columns, drop, before, out)
    return out


def _live_before(W: Rows, edges: Array) -> Array:
    """Live slots before each of some rows."""
    cumulative = np.zeros(W.shape[0] + 1, np.int64)
    np.cumsum(W.row_nnz, out=cumulative[1:])
    return cumulative[edges]


@jit
def _skip_kept(worker, n_workers, ranks, kept):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    n = len(ranks)
    k0, k1 = worker * n // n_workers, (worker + 1) * n // n_workers
    if k0 == k1:
        return
    # Before kept[i] lie kept[i] - i free positions; find the first i with more of them than the first rank.
    low, high = 0, len(kept)
    while low < high:
        middle = (low + high) // 2
        if np.int64(kept[middle]) - middle <= ranks[k0]:
            low = middle + 1
        else:
            high = middle
    i = low
    for k in range(k0, k1):
        while i < len(kept) and np.int64(kept[i]) - i <= ranks[k]:
            i += 1
        ranks[k] += i


def skip_kept(ranks: Array, kept: Array) -> Array:
    """Turn ranks among the positions that are not kept into those positions, in place.

    Parameters
    ----------
    ranks : int64 array, (k,)
        Strictly ascending, each below the number of free positions. Overwritten and returned.
    kept : int array, (n,)
        Strictly ascending.
    """
    n_workers = max(1, min(worker_count(), (len(ranks) + len(kept)) // _MIN_PART))
    launch(_skip_kept, n_workers, ranks, for_kernels(kept))
    return ranks


@jit
def _merge(  # type: ignore[no-untyped-def]
    worker, n_workers, edges, indptr, indices, n_columns, drop, slot_scores,
    free, free_scores, positions, scores,
):  # fmt: skip
    if spread(worker, n_workers):
        return
    row0, row1 = edges[worker], edges[worker + 1]
    d, d_end = first_not_below(drop, indptr[row0]), first_not_below(drop, indptr[row1])
    f, f_end = first_not_below(free, row0 * n_columns), first_not_below(free, row1 * n_columns)
    if row1 == len(indptr) - 1:
        d_end, f_end = len(drop), len(free)
    at = d + f
    i = row0
    while d < d_end:
        slot = np.int64(drop[d])
        while indptr[i + 1] <= slot:
            i += 1
        position = i * n_columns + np.int64(indices[slot])
        while f < f_end and free[f] < position:
            positions[at] = free[f]
            scores[at] = free_scores[f]
            f += 1
            at += 1
        positions[at] = position
        scores[at] = slot_scores[slot]
        d += 1
        at += 1
    while f < f_end:
        positions[at] = free[f]
        scores[at] = free_scores[f]
        f += 1
        at += 1


def merge_candidates(
    W: Rows, drop: Array, slot_scores: Array, free: Array, free_scores: Array
) -> tuple[Array, Array]:
    """Positions and scores of some slots and some free positions together, by ascending position.

    Parameters
    ----------
    W : Rows
    drop : int array, (n,)
        Live slots, strictly ascending; not checked.
    slot_scores : float array, (capacity,)
        Score of each slot.
    free : int array, (m,)
        Free positions, strictly ascending; not checked.
    free_scores : float array, (m,)

    Returns
    -------
    (int32 or int64 array, float array), both (n + m,)
    """
    W = W.rows
    drop, slot_scores, free, free_scores = map(for_kernels, (drop, slot_scores, free, free_scores))
    rows, columns = W.shape
    edges = split_rows(W)
    positions = np.empty(len(drop) + len(free), slot_dtype(rows * columns))
    scores = np.empty(len(positions), slot_scores.dtype)
    launch(
        _merge, len(edges) - 1, edges, W.indptr, W.indices, columns, drop, slot_scores,
        free, free_scores, positions, scores,
    )  # fmt: skip
    return positions, scores
