"""The largest of every row, and random ones of every row.

Each row has a count of its own, so rows are independent: a worker writes to its own part of the result, which
does not depend on how many workers there are. The k-th largest of a row is found digit by digit from
the leading one (radix selection), which takes linear time whatever the numbers are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sparselab.kernels.arrays import Array, Rows, for_kernels, slot_dtype
from sparselab.kernels.cpu.partition import cut_rows
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.rewiring.stream import BlockStream, float_bits

_MIN_PART = 1 << 15

#: Values of a digit of a key.
_DIGITS = 256


@jit
def _key(bits, mask, infinity):  # type: ignore[no-untyped-def]
    """The number with these bits as an integer that orders like it; NaN as -inf, and -0 as 0."""
    size = bits & mask
    if bits >= 0 and size <= infinity:
        return bits
    if size > infinity:
        size = infinity
    return -size


@jit
def _edge(keys, n, k, top_shift, counts):  # type: ignore[no-untyped-def]
    """The k-th largest of ``keys[:n]``, which are overwritten, and how many equal to it are among the k."""
    if k == 0:
        return np.int64(np.iinfo(np.int64).max), np.int64(0)
    left = k
    shift = top_shift
    while shift >= 0 and n > 1:
        sign = 128 if shift == top_shift else 0
        counts[:] = 0
        for i in range(n):
            counts[(keys[i] >> shift & 255) ^ sign] += 1
        digit = 255
        while counts[digit] < left:
            left -= counts[digit]
            digit -= 1
        kept = 0
        for i in range(n):
            key = keys[i]
            # Always stored and sometimes kept: a branch on the key would be mispredicted.
            keys[kept] = key
            kept += (key >> shift & 255) ^ sign == digit
        n = kept
        shift -= 8
    return keys[0], left


@jit
def _select(  # type: ignore[no-untyped-def]
    worker, n_workers, edges, bits, mask, infinity, top_shift, begin, k, rest, out_begin, work, counts, out
):
    if spread(worker, n_workers):
        return
    keys = work[worker]
    for r in range(edges[worker], edges[worker + 1]):
        first = begin[r]
        n = begin[r + 1] - first
        at = out_begin[r]
        end = out_begin[r + 1]
        if at == end:
            continue
        for i in range(n):
            keys[i] = _key(np.int64(bits[first + i]), mask, infinity)
        edge, left = _edge(keys, n, k[r], top_shift, counts[worker])
        for i in range(n):
            key = _key(np.int64(bits[first + i]), mask, infinity)
            taken = np.int64(key > edge)
            if key == edge:
                taken = np.int64(left > 0)
                left -= 1
            if at < end:
                out[at] = first + i
            at += taken ^ rest


def select_rows(
    scores: npt.NDArray[np.floating[Any]], begin: Array, k: Array, *, rest: bool = False
) -> Array:
    """Indices of the largest scores of every row, or of all the others; equal scores prefer the lower index.

    Parameters
    ----------
    scores : float32 or float64 array, (n,)
        Read only. NaN ranks below every number, beside -inf.
    begin : int array, (rows + 1,)
        Row r has the scores ``begin[r] : begin[r + 1]``; from 0 to n.
    k : int array, (rows,)
        How many of each row, from 0 to its length.
    rest : bool
        Return those that are not among the largest.

    Returns
    -------
    int32 or int64 array, (k.sum(),) or (n - k.sum(),)
        Strictly ascending.

    Raises
    ------
    ValueError
        If an entry of `k` is negative or exceeds the length of its row.
    """
    scores = for_kernels(scores)
    begin, k = for_kernels(np.asarray(begin, np.int64)), for_kernels(np.asarray(k, np.int64))
    length = np.diff(begin)
    _check_counts(k, length)
    n_workers = max(1, min(worker_count(), len(scores) // _MIN_PART))
    edges = cut_rows(begin, n_workers)
    bits, mask, infinity = float_bits(scores)
    out_begin = _starts(length - k if rest else k)
    out = np.empty(out_begin[-1], slot_dtype(len(scores)))
    work = np.empty((n_workers, length.max(initial=0)), np.int64)
    counts = np.empty((n_workers, _DIGITS), np.int64)
    launch(
        _select, n_workers, edges, bits, mask, infinity, _top_shift(scores.dtype), begin, k,
        int(rest), out_begin, work, counts, out,
    )  # fmt: skip
    return out


@jit
def _find_top(  # type: ignore[no-untyped-def]
    worker, n_workers, bits, mask, infinity, top_shift, block, base, begin, row_nnz, live, k, out_begin, work,
    counts, live_scores, positions, scores, finite,
):  # fmt: skip
    if spread(worker, n_workers):
        return
    n_rows, n_columns = bits.shape
    keys, spare = work[worker, 0], work[worker, 1]
    biggest = np.int64(0)
    for r in range(worker * n_rows // n_workers, (worker + 1) * n_rows // n_workers):
        row = bits[r]
        for j in range(n_columns):
            size = np.int64(row[j]) & mask
            biggest = max(biggest, size)
            keys[j] = size
            spare[j] = size
        for slot in range(begin[r], begin[r] + row_nnz[r]):
            j = np.int64(live[slot])
            live_scores[slot] = abs(block[r, j])
            keys[j] = -1
            spare[j] = -1
        at = out_begin[r]
        if at == out_begin[r + 1]:
            continue
        edge, left = _edge(spare, n_columns, k[r], top_shift, counts[worker])
        for j in range(n_columns):
            if keys[j] < edge:
                continue
            if keys[j] == edge:
                left -= 1
                if left < 0:
                    continue
            positions[at] = base + r * n_columns + j
            scores[at] = abs(block[r, j])
            at += 1
    finite[worker] = biggest < infinity


class RowTopK(BlockStream):
    """The largest ``|entry|`` of every row of a matrix among the positions that are not live.

    As `StreamedTopK`, but each row has a count of its own.

    Parameters
    ----------
    k : int array, (rows,)
        Entries to keep of each row; fewer are where fewer positions are free.
    live : Rows
        The connections to leave out.
    dtype : float32 or float64
        Type of the blocks.

    Raises
    ------
    ValueError
        If an entry of `k` is negative.

    Notes
    -----
    Holds ``k.sum()`` scores and positions, and two rows of integers for each thread.
    """

    def __init__(self, k: Array, live: Rows, dtype: npt.DTypeLike) -> None:
        live = live.rows
        super().__init__(live.shape[1], dtype)
        self._k = np.minimum(k, live.shape[1] - live.row_nnz)
        _check_counts(self._k, self._k)
        self._begin = _starts(self._k)
        self._live = live
        self._found = np.empty(self._begin[-1], dtype)
        self._positions = np.empty(len(self._found), slot_dtype(live.shape[0] * live.shape[1]))
        self.live_scores = np.empty(int(live.indptr[-1]), dtype)

    def _take_in(self, first_row: int, block: Array) -> None:
        n_rows, n_columns = block.shape
        rows = slice(first_row, first_row + n_rows)
        W = self._live
        n_workers = max(1, min(worker_count(), block.size // _MIN_PART, n_rows))
        bits, mask, infinity = float_bits(block)
        work = np.empty((n_workers, 2, n_columns), np.int64)
        counts = np.empty((n_workers, _DIGITS), np.int64)
        finite = np.empty(n_workers, np.bool_)
        launch(
            _find_top, n_workers, bits, mask, infinity, _top_shift(block.dtype), block,
            np.int64(first_row * n_columns), W.indptr[rows], W.row_nnz[rows], W.indices, self._k[rows],
            self._begin[first_row : first_row + n_rows + 1], work, counts, self.live_scores,
            self._positions, self._found, finite,
        )  # fmt: skip
        self.finite = bool(finite.all())

    def _winners(self) -> tuple[Array, npt.NDArray[np.floating[Any]]]:
        return self._positions, self._found


@jit
def _floyd(worker, n_workers, edges, begin, free, before, seen, drawn):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    taken = seen[worker]
    for r in range(edges[worker], edges[worker + 1]):
        first = begin[r]
        n = begin[r + 1] - first
        for i in range(n):
            last = free[r] - n + i
            if taken[drawn[first + i]]:
                drawn[first + i] = last
            taken[drawn[first + i]] = True
        for i in range(n):
            taken[drawn[first + i]] = False
            drawn[first + i] += before[r]


def sample_rows(rng: np.random.Generator, free: Array, k: Array) -> Array:
    """Draw distinct numbers for every row, every set of them equally likely.

    Parameters
    ----------
    rng : numpy.random.Generator
        Advanced by ``k.sum()`` draws.
    free : int array, (rows,)
        What to draw from: row r has the numbers ``free[:r].sum()`` up to ``free[: r + 1].sum()``.
    k : int array, (rows,)
        How many of each row, from 0 to ``free[r]``.

    Returns
    -------
    int64 array, (k.sum(),)
        Strictly ascending.

    Raises
    ------
    ValueError
        If an entry of `k` is negative or exceeds what is free.

    Notes
    -----
    Floyd's algorithm (Bentley and Floyd, "Programming pearls: a sample of brilliance", CACM 30, 1987): one
    draw for each number, however full the row is. O(k.sum()) memory beside one flag per column and thread.
    """
    free, k = for_kernels(np.asarray(free, np.int64)), for_kernels(np.asarray(k, np.int64))
    _check_counts(k, free)
    begin = _starts(k)
    # The i-th number of a row that gets n of them is drawn from 0 .. free - n + i.
    bound = np.arange(1, begin[-1] + 1) + np.repeat(free - k - begin[:-1], k)
    drawn: Array = rng.integers(bound, dtype=np.int64)
    n_workers = max(1, min(worker_count(), len(drawn) // _MIN_PART))
    seen = np.zeros((n_workers, free.max(initial=0)), np.bool_)
    launch(_floyd, n_workers, cut_rows(begin, n_workers), begin, free, _starts(free), seen, drawn)
    drawn.sort()
    return drawn


def _check_counts(k: Array, most: Array) -> None:
    if np.any(k < 0) or np.any(k > most):
        row = int(np.argmax((k < 0) | (k > most)))
        raise ValueError(f"k must lie in [0, {max(most[row], 0)}] for row {row}, got {k[row]}")


def _starts(counts: Array) -> Array:
    """int64 (rows + 1,): where each row begins when rows of these lengths follow each other."""
    begin = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=begin[1:])
    return begin


def _top_shift(dtype: np.dtype[Any]) -> np.int64:
    shift: np.int64 = np.int64(dtype.itemsize * 8 - 8)
    return shift
