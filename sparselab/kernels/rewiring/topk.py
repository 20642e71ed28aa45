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

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from sparselab.kernels.arrays import Array, Rows, for_kernels, slot_dtype
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.compare import COMPARED, above, lowest_bit
from sparselab.kernels.cpu.simd.vectors import get, put
from sparselab.kernels.rewiring.select import select
from sparselab.kernels.rewiring.stream import BlockStream, float_bits

#: Entries tested together before any is looked at alone; short, because one hit costs a walk over them all.
_CHUNK = 16

#: Room beyond k for small k, so that the buffer is not compacted after every few entries.
_SLACK = 4096

#: Leading bits of a magnitude that entries are counted by.
_DIGIT = 12

#: Entries from which a threshold is guessed, and how many times the entries that are wanted it should leave.
_SAMPLE = 8192
_GENEROUS = 2

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
def _mark_live(live, first, last, origin, marks):  # type: ignore[no-untyped-def]
    """Set the bits of a row's connections, `COMPARED` columns a word."""
    for slot in range(first, last):
        j = np.int64(get(live, slot)) - origin
        put(marks, j // COMPARED, get(marks, j // COMPARED) | (1 << (j % COMPARED)))


@jit
def _free_above(row, mask, threshold, marks, where, words):  # type: ignore[no-untyped-def]
    """Find the entries of a row that exceed `threshold` and are not marked; takes the marks off.

    Writes the chunks of `COMPARED` columns that have some, and a bit for each of these; returns how many.
    Nothing depends on where they are but what is kept: a branch would be mispredicted.
    """
    n = len(row)
    whole = n // COMPARED
    count = np.int64(0)
    for chunk in range(whole):
        hits = above(row, chunk * COMPARED, mask, threshold) & ~get(marks, chunk)
        put(marks, chunk, np.int64(0))
        put(where, count, chunk)
        put(words, count, hits)
        count += hits != 0
    if whole * COMPARED < n:
        hits = np.int64(0)
        for j in range(whole * COMPARED, n):
            hits |= np.int64((np.int64(get(row, j)) & mask) > threshold) << (j - whole * COMPARED)
        put(words, count, hits & ~get(marks, whole))
        put(marks, whole, np.int64(0))
        put(where, count, whole)
        count += get(words, count) != 0
    return count


@jit
def _is_finite(row, mask, infinity):  # type: ignore[no-untyped-def]
    """Whether no entry is a NaN or an infinity."""
    n = len(row)
    whole = n // COMPARED * COMPARED
    wrong = np.int64(0)
    for chunk in range(0, whole, COMPARED):
        wrong |= above(row, chunk, mask, infinity - 1)
    for j in range(whole, n):
        wrong |= np.int64((np.int64(get(row, j)) & mask) >= infinity)
    return wrong == 0


@jit
def _count_free(  # type: ignore[no-untyped-def]
    worker, n_workers, bits, mask, infinity, block, begin, row_nnz, live, origin, step, threshold, shift,
    work, live_scores, counts, finite,
):  # fmt: skip
    """Count the free entries above `threshold` by their leading bits, and read the live ones."""
    if spread(worker, n_workers):
        return
    n_rows = len(bits)
    mine = counts[worker]
    marks, where, words = work[worker, 0], work[worker, 1], work[worker, 2]
    right = True
    for r in range(worker * n_rows // n_workers, (worker + 1) * n_rows // n_workers):
        row, entries = bits[r], block[r]
        right &= _is_finite(row, mask, infinity)
        slot, end = begin[r], begin[r] + row_nnz[r]
        before = origin + r * step
        for s in range(slot, end):
            put(live_scores, s, abs(get(entries, np.int64(get(live, s)) - before)))
        _mark_live(live, slot, end, before, marks)
        for c in range(_free_above(row, mask, threshold, marks, where, words)):
            start, hits = get(where, c) * COMPARED, get(words, c)
            while hits != 0:
                digit = (np.int64(get(row, start + lowest_bit(hits))) & mask) >> shift
                put(mine, digit, get(mine, digit) + 1)
                hits &= hits - 1
    finite[worker] = right


@jit
def _append_free(  # type: ignore[no-untyped-def]
    worker, n_workers, bits, mask, block, begin, row_nnz, live, origin, step, threshold, base, work, starts,
    scores, positions,
):  # fmt: skip
    """Write the free entries above `threshold` from ``starts[worker]`` on."""
    if spread(worker, n_workers):
        return
    n_rows, n_columns = bits.shape
    marks, where, words = work[worker, 0], work[worker, 1], work[worker, 2]
    at = starts[worker]
    for r in range(worker * n_rows // n_workers, (worker + 1) * n_rows // n_workers):
        entries = block[r]
        _mark_live(live, begin[r], begin[r] + row_nnz[r], origin + r * step, marks)
        for c in range(_free_above(bits[r], mask, threshold, marks, where, words)):
            start, hits = get(where, c) * COMPARED, get(words, c)
            while hits != 0:
                j = start + lowest_bit(hits)
                scores[at] = abs(get(entries, j))
                positions[at] = base + r * n_columns + j
                at += 1
                hits &= hits - 1


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
        If `k` is negative, or `live` a matrix of another width.

    Notes
    -----
    Holds ``max(2 k, k + 4096)`` scores and positions, the latter as int32 where `live` is a matrix and they
    fit. Every entry is read to be counted, again if a threshold was guessed too high, and to be compared.
    """

    def __init__(self, k: int, live: Rows | Array, n_columns: int, dtype: npt.DTypeLike) -> None:
        if k < 0:
            raise ValueError(f"k must be at least 0, got {k}")
        if not isinstance(live, np.ndarray) and live.shape[1] != n_columns:
            raise ValueError(f"live must have {n_columns} columns, got a matrix of shape {live.shape}")
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
        if not isinstance(self._live, np.ndarray) and self._next_row > self._live.shape[0]:
            raise ValueError(
                f"blocks must end with row {self._live.shape[0]} of live, got row {self._next_row - 1}"
            )
        bits = float_bits(block)[0]
        base = np.int64(first_row * self._n_columns)
        rows = self._live_rows(first_row, block.shape[0])
        n_workers = max(1, min(worker_count(), block.size // _MIN_PART, block.shape[0]))
        counts = np.empty((n_workers, 1 << _DIGIT), np.int64)
        finite = np.empty(n_workers, np.bool_)
        # Marks, of which none are set, and where hits are and which; one more of them is written than kept.
        work = np.zeros((n_workers, 3, self._n_columns // COMPARED + 2), np.int64)
        for threshold in self._thresholds(bits):
            counts[:] = 0
            launch(
                _count_free, n_workers, bits, self._mask, self._infinity, block, *rows, threshold,
                self._shift, work, self.live_scores, counts, finite,
            )  # fmt: skip
            self.finite = bool(finite.all())
            if not self.finite:
                return
            together = self._counts + counts.sum(0)
            at_least = np.cumsum(together[::-1])[::-1]
            if threshold < 0 or at_least[(threshold + 1) >> self._shift] >= self._k:
                break
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
        launch(
            _append_free, n_workers, bits, self._mask, block, *rows, threshold, base, work, starts,
            self._scores, self._positions,
        )  # fmt: skip
        self._count += int(fresh.sum())

    def _thresholds(self, bits: Array) -> Iterator[np.int64]:
        """Above which entries to count: a guess, if one may spare most of them, and what is surely enough.

        While fewer than k entries are held, any may be among the largest. A sample tells about where those of
        this block are; the count shows whether the guess left k of them.
        """
        stride = bits.size // _SAMPLE
        if self._threshold < 0 and self._k * _GENEROUS * 2 < bits.size and stride:
            sizes = bits.reshape(-1)[:: stride | 1] & self._mask
            rank = len(sizes) - 1 - self._k * _GENEROUS * len(sizes) // bits.size
            # Counted are whole digits.
            yield (np.int64(np.partition(sizes, rank)[rank]) >> self._shift << self._shift) - 1
        yield self._threshold

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
