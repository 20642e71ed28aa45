"""The order of the transpose: its connections column by column of W, and numbers brought into it and back.

Connections are counted by column in ranges of rows. Where the first one of each range and column goes is all
that is kept; the next one goes behind it, so walking the rows of a range tells every place: 4 bytes of number
and 2 of column read in order, 4 written at random, and a counter that stays in a near cache. An array of
slots saves the counting and costs 4 bytes per connection, a seventh of what training holds of it, so there is
one only where few tokens make the counting a good part of a product (`slots_of`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparselab.kernels.arrays import Array, Rows, index_dtype, slot_dtype
from sparselab.kernels.cpu.partition import cut_rows
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.memory import mapped_empty, scratch, scratch_of_values
from sparselab.kernels.cpu.runtime.program import Lent, Place, Program
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.vectors import get, put, view_at, weight

#: Ranges have at least so many connections, and so many for each column, so that few places are kept.
_MIN_RANGE, _PER_COLUMN = 1 << 15, 16
_MOST_RANGES = 64

_MIN_PART = 16384


class Order(NamedTuple):
    """Where the connections of W go.

    Attributes
    ----------
    edges : int64 array, (ranges + 1,)
        Ranges of rows.
    first : int32 or int64 array, (ranges, columns)
        The place of the first connection of each column in each range; the next ones follow it.
    """

    edges: Array
    first: Array


def turn(W: Rows) -> tuple[Array, Array, Order]:
    """The transpose of W in compressed rows: where they begin, the row of W of each connection, its order.

    Within a row of the transpose the rows of W ascend.
    """
    rows, columns = W.shape
    n_ranges = max(1, min(W.nnz // max(_MIN_RANGE, _PER_COLUMN * columns), _MOST_RANGES))
    edges = cut_rows(W.indptr, n_ranges)
    n_workers = min(worker_count(), n_ranges)
    counts = np.zeros((n_ranges, columns), slot_dtype(W.nnz))
    launch(_count, n_workers, edges, W.indptr, W.row_nnz, W.indices, counts)
    indptr = np.zeros(columns + 1, np.int64)
    np.cumsum(counts.sum(0, dtype=np.int64), out=indptr[1:])
    # A column's connections of one range follow those of the ranges before it, so that rows ascend.
    first = np.zeros_like(counts)
    np.cumsum(counts[:-1], axis=0, out=first[1:])
    first += indptr[:-1].astype(first.dtype)
    indices = mapped_empty(W.nnz, index_dtype(rows))
    work = scratch(n_workers, columns, first.dtype)
    launch(_turn, n_workers, edges, W.indptr, W.row_nnz, W.indices, first, work, indices)
    return indptr, indices, Order(edges, first)


def slots_of(W: Rows, order: Order) -> Array:
    """The slot that each place takes its number from; `into_order` finds that anew each time."""
    slots = mapped_empty(W.nnz, slot_dtype(int(W.indptr[-1])))
    _walk(_note_slots, W, order, slots)
    return slots


def into_order(
    values_at: int, bits: Array, W: Rows, order: Order, dtype: np.dtype[Any], out: Array | None = None
) -> Array:
    """The values at an address, of the dtype of `bits`, in the order of the transpose; and what lies behind.

    bfloat16 is given as its bits in uint16. The array, unless it is given, is lent until the next call in the
    same thread.
    """
    ordered = scratch_of_values(W.nnz, dtype) if out is None else out
    _walk(_into, W, order, values_at, bits, ordered)
    return ordered


def add_order(
    program: Program, values_at: Place, bits: Array, W: Rows, order: Order, like: Array,
    slots: Array | None = None,
) -> Lent:  # fmt: skip
    """Let a program bring values into the order of the transpose; returns where they are then.

    By a list of their slots (`slots_of`), if that is given, in a tenth to a third of the time.
    """
    ordered, n_threads = program.lend((W.nnz,), like.dtype), worker_count()
    if slots is not None:
        n_workers = min(n_threads, 1 + W.nnz // _MIN_PART)
        program.add(_take, n_workers, slots, values_at, bits, ordered)
    else:
        n_workers = 1 if W.nnz < 2 * _MIN_PART else min(n_threads, len(order.first))
        work = program.work((n_workers, order.first.shape[1]), order.first.dtype)
        program.add(
            _into, n_workers, order.edges, W.indptr, W.row_nnz, W.indices, order.first, work, values_at, bits,
            ordered,
        )  # fmt: skip
    return ordered


def out_of_order(ordered: Array, W: Rows, order: Order, out: Array) -> None:
    """Write numbers in the order of the transpose to the slots of W; spare ones are left as they are."""
    _walk(_out, W, order, ordered, out)


def _walk(kernel: Any, W: Rows, order: Order, *operands: Any) -> None:
    n_workers = 1 if W.nnz < 2 * _MIN_PART else min(worker_count(), len(order.first))
    work = scratch(n_workers, order.first.shape[1], order.first.dtype)
    launch(kernel, n_workers, order.edges, W.indptr, W.row_nnz, W.indices, order.first, work, *operands)


@jit
def _count(worker, n_workers, edges, begin, row_nnz, indices, counts):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    n = len(counts)
    for r in range(worker * n // n_workers, (worker + 1) * n // n_workers):
        mine = counts[r]
        for i in range(edges[r], edges[r + 1]):
            for slot in range(begin[i], begin[i] + row_nnz[i]):
                mine[np.int64(indices[slot])] += 1


@jit
def _start(place, first):  # type: ignore[no-untyped-def]
    for j in range(len(first)):
        put(place, j, get(first, j))


@jit
def _next(place, j):  # type: ignore[no-untyped-def]
    """The place of the next connection of column j."""
    at = np.int64(get(place, j))
    put(place, j, at + 1)
    return at


@jit
def _turn(worker, n_workers, edges, begin, row_nnz, indices, first, work, rows):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    n, place = len(first), work[worker]
    for r in range(worker * n // n_workers, (worker + 1) * n // n_workers):
        _start(place, first[r])
        for i in range(edges[r], edges[r + 1]):
            for slot in range(begin[i], begin[i] + row_nnz[i]):
                put(rows, _next(place, np.int64(get(indices, slot))), i)


@jit
def _note_slots(worker, n_workers, edges, begin, row_nnz, indices, first, work, slots):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    n, place = len(first), work[worker]
    for r in range(worker * n // n_workers, (worker + 1) * n // n_workers):
        _start(place, first[r])
        for i in range(edges[r], edges[r + 1]):
            for slot in range(begin[i], begin[i] + row_nnz[i]):
                put(slots, _next(place, np.int64(get(indices, slot))), slot)


@jit
def _into(worker, n_workers, edges, begin, row_nnz, indices, first, work, values_at, bits, ordered):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    n, place, values = len(first), work[worker], view_at(values_at, bits)
    for r in range(worker * n // n_workers, (worker + 1) * n // n_workers):
        _start(place, first[r])
        for i in range(edges[r], edges[r + 1]):
            for slot in range(begin[i], begin[i] + row_nnz[i]):
                put(ordered, _next(place, np.int64(get(indices, slot))), weight(values, slot))


@jit
def _take(worker, n_workers, slots, values_at, bits, ordered):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    values, n = view_at(values_at, bits), len(slots)
    for k in range(worker * n // n_workers, (worker + 1) * n // n_workers):
        put(ordered, k, weight(values, np.int64(get(slots, k))))


@jit
def _out(worker, n_workers, edges, begin, row_nnz, indices, first, work, ordered, out):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    n, place = len(first), work[worker]
    for r in range(worker * n // n_workers, (worker + 1) * n // n_workers):
        _start(place, first[r])
        for i in range(edges[r], edges[r + 1]):
            for slot in range(begin[i], begin[i] + row_nnz[i]):
                put(out, slot, get(ordered, _next(place, np.int64(get(indices, slot)))))
