"""Paths of length three in the bipartite graph of a topology, drawn in proportion to what they are worth.

Rows i and l meet in the columns that both have. From i by way of a common column to l, and on to one of l's
other columns j, is a path of length three that ends where i has no connection yet. Each such l is worth
``(shared + 1) / other`` to every j of its `other` columns outside row i, so all of them together are worth
``shared + 1``: an integer, whatever the j. Hence nothing is ever scored column by column. Such an l holds
``shared + 1`` *tickets*, which are drawn by their number (integers do not depend on an order of summation),
and only those that are drawn are followed to a column.

Row i costs the sum of the degrees of its columns, in increments of a counter per row that stays in cache (8
bytes x rows); all rows together ``sum over columns of degree^2``. A ticket costs the degrees of i and l.
"""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array, Rows, for_kernels
from sparselab.kernels.cpu.partition import first_not_below, split_rows
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch
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
def _count_tickets(worker, n_workers, edges, indptr, indices, t_indptr, t_indices, shared, met, tickets):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    counts, rows = shared[worker], met[worker]
    for i in range(edges[worker], edges[worker + 1]):
        total = 0
        for m in range(_meet(i, indptr, indices, t_indptr, t_indices, counts, rows)):
            row = rows[m]
            if indptr[row + 1] - indptr[row] > counts[row]:
                total += counts[row] + 1
            counts[row] = 0
        tickets[i] = total


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
def _follow(  # type: ignore[no-untyped-def]
    worker, n_workers, edges, indptr, indices, t_indptr, t_indices, shared, met, before, tickets, picks,
    out_rows, out_columns,
):  # fmt: skip
    if spread(worker, n_workers):
        return
    counts, rows = shared[worker], met[worker]
    t = first_not_below(tickets, before[edges[worker]])
    t_end = first_not_below(tickets, before[edges[worker + 1]])
    i = edges[worker]
    while t < t_end:
        while before[i + 1] <= tickets[t]:
            i += 1
        end = before[i]
        for m in range(_meet(i, indptr, indices, t_indptr, t_indices, counts, rows)):
            row = rows[m]
            n_outside = indptr[row + 1] - indptr[row] - counts[row]
            if n_outside > 0:
                end += counts[row] + 1
            counts[row] = 0
            while t < t_end and tickets[t] < end:
                out_rows[t] = i
                out_columns[t] = _column_outside(row, i, np.int64(picks[t] * n_outside), indptr, indices)
                t += 1


class TwoHops:
    """The tickets of a topology's rows, and where each of them leads.

    Parameters
    ----------
    W : Rows
        Without spare slots.
    transposed : Rows
        Those of W^T; with the two in exchanged places the tickets are those of the columns.

    Attributes
    ----------
    n_tickets : int
        Tickets of all rows together.
    """

    def __init__(self, W: Rows, transposed: Rows) -> None:
        W, transposed = W.rows, transposed.rows
        self._edges = split_rows(W)
        n_workers = len(self._edges) - 1
        self._graph = W.indptr, W.indices, transposed.indptr, transposed.indices
        self._scratch = (
            np.zeros((n_workers, W.shape[0]), np.int64),
            np.empty((n_workers, W.shape[0]), np.int64),
        )
        tickets = np.empty(W.shape[0], np.int64)
        launch(_count_tickets, n_workers, self._edges, *self._graph, *self._scratch, tickets)
        self._before = np.concatenate([np.zeros(1, np.int64), np.cumsum(tickets)])
        self.n_tickets = int(self._before[-1])

    def follow(self, tickets: Array, picks: Array) -> tuple[Array, Array]:
        """Where some tickets lead: never to a connection that is there.

        Parameters
        ----------
        tickets : int64 array, (n,)
            Ascending, each in ``range(n_tickets)``; not checked.
        picks : float64 array, (n,)
            In [0, 1): which of the columns that a ticket may lead to, all of them equally wide.

        Returns
        -------
        (int64 array, int64 array), both (n,)
            Rows and columns.
        """
        rows, columns = np.empty((2, len(tickets)), np.int64)
        launch(
            _follow, len(self._edges) - 1, self._edges, *self._graph, *self._scratch,
            self._before, for_kernels(tickets), for_kernels(picks), rows, columns,
        )  # fmt: skip
        return rows, columns
