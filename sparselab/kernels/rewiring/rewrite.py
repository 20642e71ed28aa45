"""Changing a topology, and saying where every connection went."""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array, Rows, for_kernels, index_dtype, slot_dtype
from sparselab.kernels.cpu.partition import first_not_below, split_rows
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.vectors import get

_MIN_PART = 1 << 14


@jit
def _count_rows(worker, n_workers, edges, begin, row_nnz, drop, grow, n_columns, new_nnz, not_live, twice):  # type: ignore[no-untyped-def]
    """Lengths of the new rows; and the first dropped slot of these rows that is spare, and one twice."""
    if spread(worker, n_workers):
        return
    row0 = edges[worker]
    d = first_not_below(drop, begin[row0])
    g = first_not_below(grow, row0 * n_columns)
    for i in range(row0, edges[worker + 1]):
        n = row_nnz[i]
        end = begin[i] + n
        while d < len(drop) and drop[d] < begin[i + 1]:
            if drop[d] >= end and not_live[worker] < 0:
                not_live[worker] = drop[d]
            if d > 0 and drop[d] == drop[d - 1]:
                twice[worker] = drop[d]
            n -= 1
            d += 1
        while g < len(grow) and grow[g] < (i + 1) * n_columns:
            n += 1
            g += 1
        new_nnz[i] = n


@jit
def _merge(  # type: ignore[no-untyped-def]
    worker, n_workers, edges, begin, row_nnz, indices, drop, grow, n_columns, new_begin, new_indices,
    source, wrong,
):  # fmt: skip
    """Merge kept and grown columns row by row. Notes a position that was grown twice or was live."""
    if spread(worker, n_workers):
        return
    row0 = edges[worker]
    d = first_not_below(drop, begin[row0])
    g = first_not_below(grow, row0 * n_columns)
    for i in range(row0, edges[worker + 1]):
        slot = begin[i]
        end = slot + row_nnz[i]
        at = new_begin[i]
        row_start = i * n_columns
        row_end = row_start + n_columns
        while True:
            # Up to the next dropped slot and the next grown column, connections keep their order.
            gone = np.int64(drop[d]) if d < len(drop) and drop[d] < end else end
            grown = np.int64(grow[g]) - row_start if g < len(grow) and grow[g] < row_end else n_columns
            while slot < gone and np.int64(indices[slot]) < grown:
                new_indices[at] = indices[slot]
                source[at] = slot
                at += 1
                slot += 1
            if slot == end and grown == n_columns:
                break
            live = np.int64(indices[slot]) if slot < end else n_columns
            if grown < live:
                if g > 0 and grow[g - 1] == grow[g]:
                    wrong[worker] = grow[g]
                    return
                new_indices[at] = grown
                source[at] = -1
                at += 1
                g += 1
                continue
            if grown == live:
                if slot != gone:
                    wrong[worker] = grow[g]
                    return
                new_indices[at] = live
                source[at] = slot
                at += 1
                g += 1  # a second mention comes out as grown < live in the next round, and is refused there
            d += 1
            slot += 1


def rewrite_rows(W: Rows, drop: Array, grow: Array, compact: bool) -> tuple[Array, Array, Array, Array]:
    """Compressed rows without the connections in some slots and with those at some positions.

    Parameters
    ----------
    W : Rows
    drop : int array, (n,)
        Live slots, ascending.
    grow : int array, (m,)
        Positions ``row * columns + column``, ascending.
    compact : bool
        Leave no spare slots.

    Returns
    -------
    indptr, row_nnz, indices : arrays
        As of W.
    source : int64 array, (new slots,)
        The old slot of each new one, or -1 where it was grown or is spare.

    Raises
    ------
    ValueError
        If a dropped slot is not live or named twice, or a grown position is out of range, live, or named
        twice.
    """
    columns = W.shape[1]
    size = W.shape[0] * columns
    if len(grow) and (grow[0] < 0 or grow[-1] >= size):
        wrong_one = grow[0] if grow[0] < 0 else grow[-1]
        raise ValueError(f"grow must hold positions of 0..{size - 1}, got {wrong_one}")
    drop, grow = narrow(drop, int(W.indptr[-1])), narrow(grow, size)
    edges = split_rows(W)
    n_workers = len(edges) - 1
    new_nnz = np.empty(W.shape[0], np.int64)
    not_live, twice, wrong = np.full((3, n_workers), -1, np.int64)
    begin, row_nnz = W.indptr, W.row_nnz
    launch(_count_rows, n_workers, edges, begin, row_nnz, drop, grow, columns, new_nnz, not_live, twice)
    _refuse_wrong_slots(W, drop, not_live, twice)
    indptr = _fit(W, new_nnz, compact)
    capacity = int(indptr[-1])
    # Without spare slots every entry is about to be written.
    dtype = index_dtype(columns)
    tight = capacity == int(new_nnz.sum())
    indices = np.empty(capacity, dtype) if tight else np.zeros(capacity, dtype)
    source = np.empty(capacity, np.int64) if tight else np.full(capacity, -1, np.int64)
    launch(
        _merge, n_workers, edges, begin, row_nnz, W.indices, drop, grow, columns, indptr, indices, source,
        wrong,
    )  # fmt: skip
    if np.any(found := wrong >= 0):
        position = int(wrong[int(np.argmax(found))])
        where = f"({position // columns}, {position % columns})"
        raise ValueError(f"grow must hold distinct positions that are free or dropped, got {where} otherwise")
    return indptr, new_nnz, indices, source


def narrow(ascending: Array, bound: int) -> Array:
    """In the one type for integers below `bound`, if they all are: every other type compiles kernels anew."""
    inside = len(ascending) == 0 or (ascending[0] >= 0 and ascending[-1] < bound)
    return ascending.astype(slot_dtype(bound), copy=False) if inside else ascending


def _refuse_wrong_slots(W: Rows, drop: Array, not_live: Array, twice: Array) -> None:
    if len(drop) == 0:
        return
    outside = drop[(drop < W.indptr[0]) | (drop >= W.indptr[-1])] if _leaves(W, drop) else drop[:0]
    inside = not_live[not_live >= 0]
    if len(outside) or len(inside):
        raise ValueError(f"drop must hold live slots, got {min([*outside[:1], *inside[:1]])}")
    if np.any(twice >= 0):
        raise ValueError("drop must name each slot once, got a slot twice")


def _leaves(W: Rows, drop: Array) -> bool:
    return bool(drop[0] < W.indptr[0] or drop[-1] >= W.indptr[-1])


def _fit(W: Rows, row_nnz: Array, compact: bool) -> Array:
    """Where the new rows begin: in place if all fit their room, else repacked into at least the capacity."""
    if not compact and np.all(row_nnz <= np.diff(W.indptr)):
        return W.indptr
    spare = 0 if compact else max(int(W.indptr[-1]) - int(row_nnz.sum()), 0)
    extra = np.arange(len(row_nnz) + 1) * spare // max(len(row_nnz), 1)
    indptr = np.zeros(len(row_nnz) + 1, np.int64)
    np.cumsum(row_nnz + np.diff(extra), out=indptr[1:])
    return indptr


@jit
def _move(worker, n_workers, entries, source, moved, wrong):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    n = len(source)
    first, last = worker * n // n_workers, (worker + 1) * n // n_workers
    out_of_range = 0
    for i in range(first, last):
        out_of_range += (source[i] >= len(entries)) | (source[i] < -1)
    wrong[worker] = out_of_range > 0
    if out_of_range > 0:
        return
    for i in range(first, last):
        # Multiplied, because a branch on which slot was grown would be mispredicted.
        kept = np.int64(source[i] >= 0)
        moved[i] = get(entries, source[i] * kept) * kept


def move_entries(entries: Array, source: Array) -> Array:
    """What lives per slot, after a rewrite: ``new[i] = old[source[i]]``, and 0 where ``source[i] == -1``.

    Parameters
    ----------
    entries : int array, (n,)
        Read only. Floats are moved as the integers of their width.
    source : int64 array, (m,)

    Returns
    -------
    int array, (m,)

    Raises
    ------
    IndexError
        If a source is neither a slot nor -1.
    """
    n_workers = max(1, min(worker_count(), len(source) // _MIN_PART))
    moved = np.empty(len(source), entries.dtype)
    wrong = np.zeros(n_workers, np.bool_)
    if len(entries):
        launch(_move, n_workers, for_kernels(entries), for_kernels(source), moved, wrong)
    else:
        moved[:] = 0
    if wrong.any() or (len(entries) == 0 and np.any(source != -1)):
        raise IndexError(f"source must hold -1 or slots of 0..{len(entries) - 1}, got others")
    return moved
