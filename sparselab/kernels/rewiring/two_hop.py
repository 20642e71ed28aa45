"""Paths of length three in the bipartite graph of a topology, drawn in proportion to what they are worth.

Rows i and l meet in the columns they share. From i by way of a shared column to l, and on to one of l's other
columns j, is a path of length three that ends where i has no connection yet. Each such l is worth
``(shared + 1) / other`` to every j of its `other` columns outside row i, so all of them together are worth
``shared + 1``: an integer, whatever the j. Hence nothing is ever scored column by column. Lots are dealt by
whole numbers, which do not depend on an order of summation, and a lot is followed to its column only if it is
drawn.

Row i costs the sum of the degrees of its columns, in increments of a counter per row that stays in cache (8
bytes x rows); all rows together ``sum over columns of degree^2``. A lot costs the degrees of i and l.
"""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array, Rows
from sparselab.kernels.cpu.partition import first_not_below, share_rows
from sparselab.kernels.cpu.runtime.jit import jit, launch
from sparselab.kernels.cpu.runtime.team import spread


@jit
def _meet(i, indptr, indices, t_indptr, t_indices, shared, met):  # type: ignore[no-untyped-def]
    """List the rows that share a column with row i, and count how many they share; returns their number."""
    n_met = 0
    for slot in range(indptr[i], indptr[i + 1]):
        column = np.int64(indices[slot])
        for other in range(t_indptr[column], t_indptr[column + 1]):
            row = np.int64(t_indices[other])
            if shared[row] == 0:
                met[n_met] = row
                n_met += 1
            shared[row] += 1
    return n_met


@jit
def _count_share(share, n_shares, edges, indptr, indices, t_indptr, t_indices, shared, met, lots):  # type: ignore[no-untyped-def]
    if spread(share, n_shares):
        return
    counts, rows = shared[share], met[share]
    for i in range(edges[share], edges[share + 1]):
        total = 0
        for m in range(_meet(i, indptr, indices, t_indptr, t_indices, counts, rows)):
            row = rows[m]
            if indptr[row + 1] - indptr[row] > counts[row]:
                total += counts[row] + 1
            counts[row] = 0
        lots[i] = total


@jit
def _column_outside(row, i, rank, indptr, indices):  # type: ignore[no-untyped-def]
    """The column number `rank` of those that a row has and row i has not."""
    mine = indptr[i]
    for slot in range(indptr[row], indptr[row + 1]):
        column = np.int64(indices[slot])
        while mine < indptr[i + 1] and np.int64(indices[mine]) < column:
            mine += 1
        if mine < indptr[i + 1] and np.int64(indices[mine]) == column:
            continue
        if rank == 0:
            return column
        rank -= 1
    return np.int64(-1)


@jit
def _follow_share(  # type: ignore[no-untyped-def]
    share, n_shares, edges, indptr, indices, t_indptr, t_indices, shared, met, before, lots, picks, out_rows,
    out_columns,
):  # fmt: skip
    if spread(share, n_shares):
        return
    counts, rows = shared[share], met[share]
    t = first_not_below(lots, before[edges[share]])
    t_end = first_not_below(lots, before[edges[share + 1]])
    i = edges[share]
    while t < t_end:
        while before[i + 1] <= lots[t]:
            i += 1
        end = before[i]
        for m in range(_meet(i, indptr, indices, t_indptr, t_indices, counts, rows)):
            row = rows[m]
            n_outside = indptr[row + 1] - indptr[row] - counts[row]
            if n_outside > 0:
                end += counts[row] + 1
            counts[row] = 0
            while t < t_end and lots[t] < end:
                out_rows[t] = i
                out_columns[t] = _column_outside(row, i, np.int64(picks[t] * n_outside), indptr, indices)
                t += 1


class TwoHops:
    """The lots of a topology's rows, and where each of them leads.

    Parameters
    ----------
    W : Rows
        Without spare slots.
    transposed : Rows
        Those of W^T; with the two in exchanged places the lots are those of the columns.

    Attributes
    ----------
    n_lots : int
        Lots of all rows together.
    """

    def __init__(self, W: Rows, transposed: Rows) -> None:
        W, transposed = W.rows, transposed.rows
        self._edges = share_rows(W)
        n_shares = len(self._edges) - 1
        self._graph = W.indptr, W.indices, transposed.indptr, transposed.indices
        self._scratch = np.zeros((n_shares, W.shape[0]), np.int64), np.empty((n_shares, W.shape[0]), np.int64)
        lots = np.empty(W.shape[0], np.int64)
        launch(_count_share, n_shares, self._edges, *self._graph, *self._scratch, lots)
        self._before = np.concatenate([np.zeros(1, np.int64), np.cumsum(lots)])
        self.n_lots = int(self._before[-1])

    def follow(self, lots: Array, picks: Array) -> tuple[Array, Array]:
        """Where some lots lead: never to a connection that is there.

        Parameters
        ----------
        lots : int64 array, (n,)
            Ascending, each in ``range(n_lots)``; not checked.
        picks : float64 array, (n,)
            In [0, 1): which of the columns that a lot may lead to, all of them equally wide.

        Returns
        -------
        (int64 array, int64 array), both (n,)
            Rows and columns.
        """
        rows, columns = np.empty((2, len(lots)), np.int64)
        launch(
            _follow_share, len(self._edges) - 1, self._edges, *self._graph, *self._scratch,
            self._before, lots, picks, rows, columns,
        )  # fmt: skip
        return rows, columns
