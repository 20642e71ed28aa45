"""Changing a topology, and saying where every connection went."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sparselab.kernels._jit import jit
from sparselab.kernels.layout import Array, PaddedCSR


class Rewrite(NamedTuple):
    """What `rewrite` returns.

    `topology` is the new matrix. ``source`` is an int64 array (new capacity,): for each new slot the old slot
    its connection came from, or -1 for a grown connection and for spare slots. Whatever lives per slot
    follows by ``new[slot] = old[source[slot]]``.
    """

    topology: PaddedCSR
    source: Array


@jit
def _merge(  # type: ignore[no-untyped-def]
    begin, row_nnz, indices, values, dropped, grow, n_columns, new_begin, new_indices, new_values, source
):
    """Merge kept and grown columns row by row. Returns a position that was grown twice or was live, or -1."""
    g = 0
    for i in range(len(row_nnz)):
        slot = begin[i]
        end = slot + row_nnz[i]
        at = new_begin[i]
        row_end = (i + 1) * n_columns
        while slot < end or (g < len(grow) and grow[g] < row_end):
            live = np.int64(indices[slot]) if slot < end else n_columns
            grown = grow[g] - i * n_columns if g < len(grow) and grow[g] < row_end else n_columns
            if grown < live:
                if g and grow[g - 1] == grow[g]:
                    return grow[g]
                new_indices[at] = grown
                new_values[at] = 0
                source[at] = -1
                at += 1
                g += 1
                continue
            if grown == live:
                if not dropped[slot]:
                    return grow[g]
                g += 1  # a second mention comes out as grown < live in the next round, and is refused there
            if grown == live or not dropped[slot]:
                new_indices[at] = live
                new_values[at] = values[slot]
                source[at] = slot
                at += 1
            slot += 1
    return np.int64(-1)


def rewrite_topology(W: PaddedCSR, drop: Array, grow: Array, compact: bool) -> Rewrite:
    """`sparselab.kernels.rewrite` after its checks: `grow` is sorted, `drop` holds distinct live slots."""
    rows, columns = W.shape
    dropped = np.zeros(W.capacity, np.bool_)
    dropped[drop] = True
    row_of_dropped = np.searchsorted(W.indptr, drop, side="right") - 1
    new_nnz = W.row_nnz - np.bincount(row_of_dropped, minlength=rows)
    new_nnz += np.bincount(grow // max(columns, 1), minlength=rows)
    indptr = _fit(W, new_nnz, compact)
    capacity = int(indptr[-1])
    indices = np.zeros(capacity, W.indices.dtype)
    values = np.zeros(capacity, W.values.dtype)
    source = np.full(capacity, -1, np.int64)
    twice = _merge(
        W.indptr, W.row_nnz, W.indices, W.values, dropped, grow, columns, indptr, indices, values, source
    )
    if twice >= 0:
        where = f"({twice // columns}, {twice % columns})"
        raise ValueError(f"grow must hold distinct positions that are free or dropped, got {where} otherwise")
    return Rewrite(PaddedCSR.unchecked(W.shape, indptr, new_nnz, indices, values), source)


def _fit(W: PaddedCSR, row_nnz: Array, compact: bool) -> Array:
    """Where the new rows begin: in place if all fit their room, else repacked into at least the capacity."""
    if not compact and np.all(row_nnz <= np.diff(W.indptr)):
        return W.indptr
    spare = 0 if compact else max(W.capacity - int(row_nnz.sum()), 0)
    share = np.arange(len(row_nnz) + 1) * spare // max(len(row_nnz), 1)
    indptr = np.zeros(len(row_nnz) + 1, np.int64)
    np.cumsum(row_nnz + np.diff(share), out=indptr[1:])
    return indptr
