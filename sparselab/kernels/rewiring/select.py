"""The k largest of many scores, exactly.

The k-th largest score is found by NumPy's partition, which is vectorised; who lies above it, and who of those
equal to it is first, by two passes of compiled code. A threshold alone would return too many or too few on
ties, which are common: grown weights start at zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sparselab.kernels.arrays import Array, for_kernels, slot_dtype
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.team import spread

_MIN_PART = 1 << 15


@jit
def _count_taken(worker, n_workers, scores, edge, nan_at_edge, above, equal):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    n = len(scores)
    n_above = n_equal = 0
    for i in range(worker * n // n_workers, (worker + 1) * n // n_workers):
        score = scores[i]
        n_above += score > edge
        n_equal += (score == edge) | (nan_at_edge & (score != score))
    above[worker] = n_above
    equal[worker] = n_equal


@jit
def _take(worker, n_workers, scores, edge, nan_at_edge, rest, quota, ends, out):  # type: ignore[no-untyped-def]
    """Write the indices that are taken (or, if `rest` is 1, left), `quota` of those at the edge taken."""
    if spread(worker, n_workers):
        return
    n = len(scores)
    at = ends[worker]
    end = ends[worker + 1]
    left = quota[worker]
    for i in range(worker * n // n_workers, (worker + 1) * n // n_workers):
        score = scores[i]
        taken = np.int64(score > edge)
        if score == edge or (nan_at_edge and score != score):
            taken = np.int64(left > 0)
            left -= 1
        # Always stored and sometimes kept: a branch on what the score is would be mispredicted.
        if at < end:
            out[at] = i
        at += taken ^ rest


def select(scores: npt.NDArray[np.floating[Any]], k: int, *, rest: bool = False) -> Array:
    """Indices of the `k` largest scores, or of all the others; equal scores prefer the lower index.

    Parameters
    ----------
    scores : float32 or float64 array, (n,)
        Read only. NaN ranks below every number, beside -inf.
    k : int
        How many, ``0 <= k <= n``.
    rest : bool
        Return those that are not among the k largest.

    Returns
    -------
    int32 or int64 array, (k,) or (n - k,)
        Strictly ascending.

    Raises
    ------
    ValueError
        If `k` is outside ``[0, n]``.

    Notes
    -----
    Linear time. One copy of the scores is made.
    """
    scores, n = for_kernels(scores), scores.size
    if not 0 <= k <= n:
        raise ValueError(f"k must lie in [0, {n}], the number of scores, got {k}")
    if k in (0, n):
        return np.arange(n if (k == n) != rest else 0, dtype=slot_dtype(n))
    ranked = scores.copy()
    ranked[np.isnan(ranked)] = -np.inf
    ranked.partition(n - k)
    edge = ranked[n - k]
    del ranked
    nan_at_edge = bool(edge == -np.inf)
    n_workers = max(1, min(worker_count(), n // _MIN_PART))
    above, equal = np.empty((2, n_workers), np.int64)
    launch(_count_taken, n_workers, scores, edge, nan_at_edge, above, equal)
    missing = k - int(above.sum())
    quota = np.clip(missing - (np.cumsum(equal) - equal), 0, equal)
    sizes = above + quota
    if rest:
        sizes = np.diff(np.arange(n_workers + 1) * n // n_workers) - sizes
    ends = np.zeros(n_workers + 1, np.int64)
    np.cumsum(sizes, out=ends[1:])
    out = np.empty(ends[-1], slot_dtype(n))
    launch(_take, n_workers, scores, edge, nan_at_edge, int(rest), quota, ends, out)
    return out
