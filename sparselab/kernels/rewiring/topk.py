"""The k largest of a dense matrix that is never held whole.

The matrix arrives as blocks of rows. All entries of a block are counted by the leading bits of their
magnitude; together with the counts of the candidates already held that gives a floor which at least k entries
reach, before any of them is stored. Only those above the floor are then appended, and workers know from the
counts where each of them writes. Where so many entries have one count that the buffer cannot take them
(equal entries, mostly), the block is taken in piece by piece instead, with an exact selection each time the
buffer fills.

Blocks arrive in ascending order and the buffer stays sorted by position. That makes ties exact at no cost: an
entry equal to the least of k candidates has a higher position than all of them, and may be refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sparselab.kernels.arrays import Array, Rows, for_kernels, slot_dtype
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.rewiring.select import select
from sparselab.kernels.rewiring.stream import BlockStream, float_bits

#: Entries tested together before any is looked at alone; short, because one hit costs a walk over them all.
_CHUNK = 16

#: Room beyond k for small k, so that the buffer is not compacted after every few entries.
_SLACK = 4096

#: Leading bits of a magnitude that entries are counted by.
_DIGIT = 12

#: Counters for entries that do not count. Several, since successive additions to one wait for each other.
_IDLE = 8

_MIN_PART = 1 << 17


def largest(scores: npt.NDArray[np.floating[Any]], k: int) -> Array:
    """Indices of the `k` largest scores, ascending; equal scores prefer the lower index.

    Parameters
    ----------
    scores : float32 or float64 array, (n,)
        Read only. NaN ranks below every number.
    k : int
        How many, ``0 <= k <= n``.

    Returns
    -------
    int32 or int64 array, (k,)
        Strictly ascending.

    Raises
    ------
    ValueError
        If `k` is outside ``[0, n]``.
    """
    return select(scores, k)


@jit
def _count_free(  # type: ignore[no-untyped-def]
    worker, n_workers, bits, mask, infinity, block, begin, row_nnz, live, origin, step, threshold, shift,
    live_scores, counts, finite,
):  # fmt: skip
    """Count the free entries above `threshold` by their leading bits, and read the live ones."""
    if spread(worker, n_workers):
        return
    n_rows, n_columns = bits.shape
    idle = counts.shape[1] - _IDLE
    mine = counts[worker]
    biggest = np.int64(0)
    for r in range(worker * n_rows // n_workers, (worker + 1) * n_rows // n_workers):
        row = bits[r]
        for j in range(n_columns):
            size = np.int64(row[j]) & mask
            biggest = max(biggest, size)
            mine[size >> shift if size > threshold else idle + (j & (_IDLE - 1))] += 1
        for slot in range(begin[r], begin[r] + row_nnz[r]):
            j = np.int64(live[slot]) - origin - r * step
            live_scores[slot] = abs(block[r, j])
            size = np.int64(row[j]) & mask
            if size > threshold:
                mine[size >> shift] -= 1
    finite[worker] = biggest < infinity


@jit
def _append_free(  # type: ignore[no-untyped-def]
    worker, n_workers, bits, mask, block, begin, row_nnz, live, origin, step, threshold, base, found, starts,
    scores, positions,
):  # fmt: skip
    """Write the free entries above `threshold` from ``starts[worker]`` on."""
    if spread(worker, n_workers):
        return
    n_rows, n_columns = bits.shape
    hits = found[worker]
    at = starts[worker]
    for r in range(worker * n_rows // n_workers, (worker + 1) * n_rows // n_workers):
        row = bits[r]
        n_hits = 0
        for j in range(n_columns):
            # Always stored and sometimes kept: a branch on the entry would be mispredicted.
            hits[n_hits] = j
            n_hits += (np.int64(row[j]) & mask) > threshold
        slot = begin[r]
        end = slot + row_nnz[r]
        for h in range(n_hits):
            j = np.int64(hits[h])
            while slot < end and np.int64(live[slot]) - origin - r * step < j:
                slot += 1
            if slot < end and np.int64(live[slot]) - origin - r * step == j:
                continue
            scores[at] = abs(block[r, j])
            positions[at] = base + r * n_columns + j
            at += 1


@jit
def _scan(  # type: ignore[no-untyped-def]
    bits, mask, block, first, begin, row_nnz, live, origin, step, threshold, base, scores, positions, count
):
    """Append the free entries above `threshold` from the linear index `first` on, until the buffer is full.

    Returns the index to go on from and the candidates held.
    """
    n_rows, n_columns = bits.shape
    i = first
    while i < n_rows * n_columns:
        r = i // n_columns
        row = bits[r]
        start = i - r * n_columns
        slot = begin[r]
        end = slot + row_nnz[r]
        for chunk in range(start, n_columns, _CHUNK):
            stop = min(chunk + _CHUNK, n_columns)
            hits = 0
            for j in range(chunk, stop):
                hits += (np.int64(row[j]) & mask) > threshold
            if hits == 0:
                continue
            if count + hits > len(scores):
                return r * n_columns + chunk, count
            for j in range(chunk, stop):
                if (np.int64(row[j]) & mask) <= threshold:
                    continue
                while slot < end and np.int64(live[slot]) - origin - r * step < j:
                    slot += 1
                if slot < end and np.int64(live[slot]) - origin - r * step == j:
                    continue
                scores[count] = abs(block[r, j])
                positions[count] = base + r * n_columns + j
                count += 1
        i = (r + 1) * n_columns
    return i, count


@jit
def _keep_above(bits, mask, threshold, scores, positions, count):  # type: ignore[no-untyped-def]
    """Remove the candidates that do not exceed `threshold`; returns how many are left."""
    kept = 0
    for i in range(count):
        above = (np.int64(bits[i]) & mask) > threshold
        scores[kept] = scores[i]
        positions[kept] = positions[i]
        kept += above
    return kept


class StreamedTopK(BlockStream):
    """The `k` largest ``|entry|`` of a matrix among the positions that are not live.

    The order is ``(|entry| descending, position ascending)``, so the result is exact, and the same however
    the rows are cut into blocks and for any number of threads.

    Parameters
    ----------
    k : int
        Entries to keep; fewer are returned when fewer positions are free.
    live : Rows or int64 array, (nnz,)
        The connections to leave out: compressed rows, or linear positions
        ``row * n_columns + column``, strictly ascending. Read only.
    n_columns : int
        Columns of the matrix.
    dtype : float32 or float64
        Type of the blocks.

    Attributes
    ----------
    finite : bool
        False once a NaN or an infinity was met, at a live position too; there is no result then.
    live_scores : float array, one entry per slot of `live`
        ``|entry|`` of the live positions seen so far, if k is not 0.

    Raises
    ------
    ValueError
        If `k` is negative.

    Notes
    -----
    Holds ``max(2 k, k + 4096)`` scores and positions, the latter as int32 where `live` is a matrix and they
    fit. Every entry is read once to be counted and once more to be compared.
    """

    def __init__(self, k: int, live: Rows | Array, n_columns: int, dtype: npt.DTypeLike) -> None:
        if k < 0:
            raise ValueError(f"k must be at least 0, got {k}")
        super().__init__(n_columns, dtype)
        self._k = k
        self._live = for_kernels(np.asarray(live, np.int64)) if isinstance(live, np.ndarray) else live.rows
        capacity = k + max(k, _SLACK)
        n_slots = int(live.indptr[-1]) if not isinstance(live, np.ndarray) else live.size
        size = live.shape[0] * n_columns if not isinstance(live, np.ndarray) else np.iinfo(np.int64).max
        self._scores = np.empty(capacity, dtype)
        self._positions = np.empty(capacity, slot_dtype(size))
        self._bits, self._mask, self._infinity = float_bits(self._scores)
        self._shift = np.int64(self._bits.itemsize * 8 - 1 - _DIGIT)
        self._counts = np.zeros(1 << _DIGIT, np.int64)
        self.live_scores = np.empty(n_slots if k else 0, dtype)
        self._count = 0
        self._threshold = np.int64(-1)

    def _take_in(self, first_row: int, block: Array) -> None:
        if self._k == 0:
            return
        bits = float_bits(block)[0]
        base = np.int64(first_row * self._n_columns)
        rows = self._live_rows(first_row, block.shape[0])
        n_workers = max(1, min(worker_count(), block.size // _MIN_PART, block.shape[0]))
        counts = np.zeros((n_workers, (1 << _DIGIT) + _IDLE), np.int64)
        finite = np.empty(n_workers, np.bool_)
        launch(
            _count_free, n_workers, bits, self._mask, self._infinity, block, *rows, self._threshold,
            self._shift, self.live_scores, counts, finite,
        )  # fmt: skip
        self.finite = bool(finite.all())
        if not self.finite:
            return
        counts = counts[:, : 1 << _DIGIT]
        together = self._counts + counts.sum(0)
        at_least = np.cumsum(together[::-1])[::-1]
        floor = max(int(np.count_nonzero(at_least >= self._k)) - 1, 0)
        threshold = max(self._threshold, (np.int64(floor) << self._shift) - 1)
        fresh = counts[:, floor:].sum(1)
        if self._count + fresh.sum() > len(self._scores):
            self._count = _keep_above(
                self._bits, self._mask, threshold, self._scores, self._positions, self._count
            )
        self._threshold = threshold
        if self._count + fresh.sum() > len(self._scores):
            self._take_in_pieces(bits, block, rows, base)
            return
        together[:floor] = 0
        self._counts = together
        starts = self._count + np.cumsum(fresh) - fresh
        found = np.empty((n_workers, self._n_columns + 1), slot_dtype(self._n_columns))
        launch(
            _append_free, n_workers, bits, self._mask, block, *rows, threshold, base, found, starts,
            self._scores, self._positions,
        )  # fmt: skip
        self._count += int(fresh.sum())

    def _live_rows(self, first_row: int, n_rows: int) -> tuple[Array, Array, Array, np.int64, np.int64]:
        """``(begin, row_nnz, live, origin, step)``; slot s has column ``live[s] - origin - row * step``."""
        W = self._live
        if not isinstance(W, np.ndarray):
            rows = slice(first_row, first_row + n_rows)
            return W.indptr[rows], W.row_nnz[rows], W.indices, np.int64(0), np.int64(0)
        origin = first_row * self._n_columns
        edges = np.searchsorted(W, origin + np.arange(n_rows + 1, dtype=np.int64) * self._n_columns)
        return edges[:-1], np.diff(edges), W, np.int64(origin), np.int64(self._n_columns)

    def _take_in_pieces(self, bits: Array, block: Array, rows: tuple[Any, ...], base: np.int64) -> None:
        at = 0
        while True:
            at, self._count = _scan(
                bits, self._mask, block, at, *rows, self._threshold, base, self._scores, self._positions,
                self._count,
            )  # fmt: skip
            if at >= block.size:
                break
            self._compact()
        held = (self._bits[: self._count].astype(np.int64) & self._mask) >> self._shift
        self._counts = np.bincount(held, minlength=1 << _DIGIT)

    def _compact(self) -> None:
        if self._count <= self._k:
            return
        kept = largest(self._scores[: self._count], self._k)
        self._scores[: self._k] = self._scores[kept]
        self._positions[: self._k] = self._positions[kept]
        self._count = self._k
        self._threshold = np.int64(self._bits[: self._k].min())

    def _winners(self) -> tuple[Array, npt.NDArray[np.floating[Any]]]:
        self._compact()
        return self._positions[: self._count].copy(), self._scores[: self._count].copy()
