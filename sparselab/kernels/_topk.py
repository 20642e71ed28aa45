"""The k largest of a dense matrix that is never held whole.

The matrix arrives as blocks of rows. A bounded buffer holds the candidates: it is twice as long as needed,
and when it is full the better half is kept (a linear-time partition), which also raises the threshold that
every later entry must pass. Most entries fail that test, so the scan costs little more than reading.

Blocks arrive in ascending order and compaction keeps the order, so the buffer is always sorted by position.
That makes ties exact at no cost: an entry equal to the threshold has a higher position than every candidate
already held, and may be refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sparselab.kernels._jit import jit

#: Entries tested together before any is looked at alone; short, because one hit costs a walk over them all.
_CHUNK = 16

#: Room beyond k for small k, so that the buffer is not compacted after every few entries.
_SLACK = 4096


def largest(scores: npt.NDArray[np.floating[Any]], k: int) -> npt.NDArray[np.intp]:
    """Indices of the `k` largest scores, ascending; equal scores prefer the lower index.

    Parameters
    ----------
    scores : float array, (n,)
        Read only. NaN ranks below every number.
    k : int
        How many, ``0 <= k <= n``.

    Returns
    -------
    intp array, (k,)
        Strictly ascending.

    Raises
    ------
    ValueError
        If `k` is outside ``[0, n]``.

    Notes
    -----
    Linear time. A threshold alone would return too many or too few on ties; here everything above it is
    taken, and then the first ones equal to it until there are `k`.
    """
    n = scores.size
    if not 0 <= k <= n:
        raise ValueError(f"k must lie in [0, {n}], the number of scores; got {k}")
    if k == 0:
        return np.empty(0, np.intp)
    if k == n:
        return np.arange(n, dtype=np.intp)
    ranked = np.where(np.isnan(scores), -np.inf, scores)
    threshold = np.partition(ranked, n - k)[n - k]
    chosen = ranked > threshold
    missing = k - np.count_nonzero(chosen)
    chosen[np.flatnonzero(ranked == threshold)[:missing]] = True
    return np.flatnonzero(chosen)


@jit
def _scan(block, start, base, live, cursor, threshold, scores, positions, count):  # type: ignore[no-untyped-def]
    """Append the entries of `block` from `start` on that beat `threshold` and are not live.

    Stops early when the buffer may not take another chunk, or at a value that is not finite. Returns
    ``(next entry, cursor into live, candidates held, everything finite so far)``.
    """
    n = block.size
    i = start
    while i < n:
        stop = min(i + _CHUNK, n)
        hits = 0
        for j in range(i, stop):
            # Written so that NaN counts as a hit and is looked at.
            hits += not (abs(block[j]) <= threshold)
        if hits > 0:
            if count + (stop - i) > scores.size:
                return i, cursor, count, True
            for j in range(i, stop):
                score = abs(block[j])
                if score <= threshold:
                    continue
                if not score < np.inf:
                    return j, cursor, count, False
                position = base + j
                while cursor < live.size and live[cursor] < position:
                    cursor += 1
                if cursor < live.size and live[cursor] == position:
                    continue
                scores[count] = score
                positions[count] = position
                count += 1
        i = stop
    return i, cursor, count, True


class StreamedTopK:
    """The `k` largest ``|entry|`` of a matrix among the positions that are not live.

    The order is ``(|entry| descending, position ascending)``, so the result is exact, and the same however
    the rows are cut into blocks.

    Parameters
    ----------
    k : int
        Entries to keep; fewer are returned when fewer positions are free.
    live : int64 array, (nnz,)
        Linear positions ``row * n_columns + column`` to leave out, strictly ascending. Read only.
    n_columns : int
        Columns of the matrix.
    dtype : float32 or float64
        Type of the blocks.

    Attributes
    ----------
    finite : bool
        False once a NaN or an infinity was met, at a live position too; there is no result then.

    Raises
    ------
    ValueError
        If `k` is negative.

    Notes
    -----
    Holds ``max(2 k, k + 4096)`` scores and positions. One comparison per entry, and a partition of the buffer
    each time it fills: about ``log(free / k)`` times on data in no particular order.
    """

    def __init__(self, k: int, live: npt.NDArray[np.int64], n_columns: int, dtype: npt.DTypeLike) -> None:
        if k < 0:
            raise ValueError(f"k must not be negative; got {k}")
        self._k = k
        self._live = np.ascontiguousarray(live, np.int64)
        self._n_columns = n_columns
        capacity = k + max(k, _SLACK)
        self._scores = np.empty(capacity, dtype)
        self._positions = np.empty(capacity, np.int64)
        self._count = 0
        self._threshold = self._scores.dtype.type(-1)
        self._cursor = 0
        self._next_row = 0
        self.finite = True

    def push(self, first_row: int, block: npt.NDArray[np.floating[Any]]) -> None:
        """Take in the rows from `first_row` on.

        Parameters
        ----------
        first_row : int
            The row of the matrix that ``block[0]`` is; must follow the rows already seen.
        block : float array, (n_rows, n_columns)
            C-contiguous, of the declared type. Read only, not kept.

        Raises
        ------
        ValueError
            If the block is of another width, type or memory order, or comes out of order.
        """
        if block.ndim != 2 or block.shape[1] != self._n_columns or block.dtype != self._scores.dtype:
            raise ValueError(
                f"block must be {self._scores.dtype} of shape (n, {self._n_columns}); "
                f"got {block.dtype} of shape {block.shape}"
            )
        if not block.flags.c_contiguous:
            raise ValueError("block must be C-contiguous; pass np.ascontiguousarray(block)")
        if first_row < self._next_row:
            raise ValueError(
                f"blocks must arrive in ascending order of rows; got row {first_row} "
                f"after row {self._next_row - 1}"
            )
        self._next_row = first_row + block.shape[0]
        if self._k == 0 or not self.finite:
            return
        flat = block.reshape(-1)
        start, base = 0, first_row * self._n_columns
        while True:
            start, self._cursor, self._count, self.finite = _scan(
                flat,
                start,
                base,
                self._live,
                self._cursor,
                self._threshold,
                self._scores,
                self._positions,
                self._count,
            )
            if start >= flat.size or not self.finite:
                return
            self._compact()

    def _compact(self) -> None:
        if self._count <= self._k:
            return
        kept = largest(self._scores[: self._count], self._k)
        self._scores[: self._k] = self._scores[kept]
        self._positions[: self._k] = self._positions[kept]
        self._count = self._k
        self._threshold = self._scores[: self._k].min()

    def result(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.floating[Any]]]:
        """Positions, strictly ascending, and scores ``|entry|`` of the winners.

        Raises
        ------
        ValueError
            If a value was not finite: the entries have no order then.
        """
        if not self.finite:
            raise ValueError("the matrix has entries that are not finite, so its largest are not defined")
        self._compact()
        return self._positions[: self._count].copy(), self._scores[: self._count].copy()
