"""Plans: in which order a kernel walks the connections.

A kernel walks *segments*: the connections of one row that fall into one block of columns. The tokens of a
block of columns then stay in a fast cache while all rows pass over it. Within a chunk of rows the segments of
a block are sorted by length, so the length of the inner loop is a branch that the CPU predicts.

A plan is a value that the caller holds. It belongs to one topology, says nothing about the connections'
values, and is worth keeping for as long as the topology lives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparselab.kernels._jit import jit, mapped_empty
from sparselab.kernels._target import BLOCK_COLUMNS, CACHE_BUDGET_BYTES, TILE_BYTES
from sparselab.kernels.layout import Array, PaddedCSR, index_dtype, slot_dtype

#: Columns of one block in `sddmm_dw`, which gains nothing from first-level cache blocks: its dots are bound
#: by arithmetic, and the longer a segment the fewer of its dots fall outside full groups.
_GRADIENT_BLOCK_COLUMNS = 131072 // TILE_BYTES

#: A segment shorter than this pays more for its row of sums than for its connections.
_USEFUL_SEGMENT = 12

_CHUNK_BYTES = 128 * 1024
_MIN_CHUNKS = 16
_MIN_CHUNK_ROWS = 8


class Segments(NamedTuple):
    """Segments of a matrix with ``n_rows`` rows, cut at every `block_columns` columns.

    ``ptr[c, b] : ptr[c, b + 1]`` are the segments of row chunk c in column block b. Chunk c is rows
    ``chunk_rows[c] : chunk_rows[c + 1]``, all chunks of about equal work. Segment p is the `length[p]`
    connections of row ``row[p]`` from slot ``start[p]`` on. Every row has a segment in block 0, if need be an
    empty one, so that block 0 can begin the row's sum.
    """

    n_connections: int
    block_columns: int
    chunk_rows: Array
    ptr: Array
    row: Array
    start: Array
    length: Array


class TransposePlan(NamedTuple):
    """The order of `spmm_t`: the transpose's connections, row by row, and its segments.

    Row j of the transpose is the connections ``indptr[j] : indptr[j + 1]``. Connection k has column
    ``indices[k]`` (a row of W) and the value in slot ``slots[k]``.
    """

    indptr: Array
    indices: Array
    slots: Array
    segments: Segments


def plan_spmm(W: PaddedCSR) -> Segments:
    """Plan of `spmm` for the topology of W (values are not read)."""
    return _segments(W.indptr, W.row_nnz, W.indices, W.shape, _product_block(W.nnz, W.shape))


def plan_spmm_t(W: PaddedCSR) -> TransposePlan:
    """Plan of `spmm_t` for the topology of W (values are not read). Costs about 7 bytes per connection."""
    rows, cols = W.shape
    indptr = np.zeros(cols + 1, np.int64)
    indices = mapped_empty(W.nnz, index_dtype(rows))
    slots = mapped_empty(W.nnz, slot_dtype(W.capacity))
    _transpose(W.indptr, W.row_nnz, W.indices, indptr, indices, slots)
    block = _product_block(W.nnz, (cols, rows))
    segments = _segments(indptr[:-1], np.diff(indptr), indices, (cols, rows), block)
    return TransposePlan(indptr, indices, slots, segments)


def plan_sddmm_dw(W: PaddedCSR) -> Segments:
    """Plan of `sddmm_dw` for the topology of W (values are not read)."""
    return _segments(W.indptr, W.row_nnz, W.indices, W.shape, _gradient_block(W.shape[1]))


def _product_block(nnz: int, shape: tuple[int, int]) -> int:
    per_column = nnz / max(shape[0] * shape[1], 1)
    wanted = _USEFUL_SEGMENT / per_column if per_column else shape[1]
    return int(min(max(wanted, BLOCK_COLUMNS), max(shape[1], 1)))


def _gradient_block(n_columns: int) -> int:
    n_blocks = max(-(-n_columns // _GRADIENT_BLOCK_COLUMNS), 1)
    return -(-n_columns // n_blocks) + 7 & ~7


def _segments(
    begin: Array, row_nnz: Array, indices: Array, shape: tuple[int, int], block_columns: int
) -> Segments:
    n_rows, n_columns = shape
    block_columns = max(1, min(block_columns, n_columns))
    chunk_rows = _chunks(row_nnz)
    n_blocks = max(-(-n_columns // block_columns), 1)
    ptr = np.zeros((len(chunk_rows) - 1, n_blocks + 1), np.int64)
    _count_segments(begin, row_nnz, indices, block_columns, chunk_rows, ptr)
    n_segments = int(ptr[-1, -1]) if ptr.size else 0
    row = mapped_empty(n_segments, slot_dtype(n_rows))
    start = mapped_empty(n_segments, slot_dtype(int(begin[-1]) + int(row_nnz[-1]) if n_rows else 0))
    length = mapped_empty(n_segments, slot_dtype(block_columns))
    _fill_segments(begin, row_nnz, indices, block_columns, chunk_rows, ptr, row, start, length)
    return Segments(int(row_nnz.sum()), block_columns, chunk_rows, ptr, row, start, length)


def _chunks(row_nnz: Array) -> Array:
    """Boundaries of row chunks of about equal work; all but the last hold a multiple of 8 rows."""
    n_rows = len(row_nnz)
    work = np.zeros(n_rows + 1, np.int64)
    np.cumsum(row_nnz + 4, out=work[1:])  # a row costs about four connections before its first one
    n_chunks = max(int(work[-1]) * 6 // _CHUNK_BYTES, _MIN_CHUNKS)
    n_chunks = max(min(n_chunks, n_rows // _MIN_CHUNK_ROWS), 1)
    targets = np.arange(1, n_chunks) * (work[-1] / n_chunks)
    inner = (np.searchsorted(work, targets) + 4) // 8 * 8
    return np.unique(np.concatenate([[0], inner[inner < n_rows], [n_rows]])).astype(np.int64)


@jit
def _transpose(begin, row_nnz, indices, indptr, rows, slots):  # type: ignore[no-untyped-def]
    """Counting sort of the connections by column; within a column rows ascend."""
    for i in range(len(row_nnz)):
        for slot in range(begin[i], begin[i] + row_nnz[i]):
            indptr[np.int64(indices[slot]) + 1] += 1
    for j in range(1, len(indptr)):
        indptr[j] += indptr[j - 1]
    fill = indptr[:-1].copy()
    for i in range(len(row_nnz)):
        for slot in range(begin[i], begin[i] + row_nnz[i]):
            j = np.int64(indices[slot])
            rows[fill[j]] = i
            slots[fill[j]] = slot
            fill[j] += 1


@jit
def _count_segments(begin, row_nnz, indices, block, chunk_rows, ptr):  # type: ignore[no-untyped-def]
    for c in range(len(chunk_rows) - 1):
        for i in range(chunk_rows[c], chunk_rows[c + 1]):
            previous = np.int64(0)
            ptr[c, 1] += 1
            for slot in range(begin[i], begin[i] + row_nnz[i]):
                b = np.int64(indices[slot]) // block
                if b != previous:
                    ptr[c, b + 1] += 1
                    previous = b
    total = np.int64(0)
    for c in range(ptr.shape[0]):
        ptr[c, 0] = total
        for b in range(1, ptr.shape[1]):
            total += ptr[c, b]
            ptr[c, b] = total


@jit
def _fill_segments(  # type: ignore[no-untyped-def]
    begin, row_nnz, indices, block, chunk_rows, ptr, row, start, length
):
    """Write the segments in row order, then sort those of each chunk and block by length (stable)."""
    n_blocks = ptr.shape[1] - 1
    fill = np.empty(n_blocks, np.int64)
    for c in range(ptr.shape[0]):
        fill[:] = ptr[c, :-1]
        for i in range(chunk_rows[c], chunk_rows[c + 1]):
            slot = begin[i]
            end = begin[i] + row_nnz[i]
            b = np.int64(0)
            while b == 0 or slot < end:
                first = slot
                limit = (b + 1) * block
                while slot < end and np.int64(indices[slot]) < limit:
                    slot += 1
                row[fill[b]] = i
                start[fill[b]] = first
                length[fill[b]] = slot - first
                fill[b] += 1
                b = np.int64(indices[slot]) // block if slot < end else n_blocks
        for b in range(n_blocks):
            p, q = ptr[c, b], ptr[c, b + 1]
            order = np.argsort(length[p:q], kind="mergesort")
            row[p:q] = row[p:q][order]
            start[p:q] = start[p:q][order]
            length[p:q] = length[p:q][order]


def split_evenly(n_items: int, n_parts: int) -> Array:
    """Boundaries of `n_parts` contiguous parts of almost equal size."""
    return np.arange(n_parts + 1, dtype=np.int64) * n_items // n_parts


def product_groups(plan: Segments, n_tiles: int, n_workers: int, bytes_per_connection: int) -> Array:
    """Chunk boundaries of the row groups that one worker passes over one tile of tokens.

    A group is as large as the second-level cache allows (its connections and its tile of sums stay there from
    tile to tile), because every group packs the tokens again; it is smaller where that is needed to keep all
    workers busy.
    """
    n_chunks = len(plan.chunk_rows) - 1
    # The sums count twice, since they are read and written.
    footprint = plan.n_connections * bytes_per_connection + 2 * int(plan.chunk_rows[-1]) * TILE_BYTES
    n_groups = min(max(1, -(-footprint // CACHE_BUDGET_BYTES)), n_chunks)
    while n_groups < n_chunks and n_groups * n_tiles < 8 * n_workers and n_groups * n_tiles % n_workers:
        n_groups += 1
    return split_evenly(n_chunks, n_groups)


def gradient_shares(plan: Segments, n_workers: int, bytes_per_connection: int) -> Array:
    """Rectangles of chunks x blocks, one row ``(chunk0, chunk1, block0, block1)`` each.

    Each connection lies in one rectangle, so each gradient has one writer. Rows are split first: workers on
    different columns of the same rows write to the same cache lines, and ran at half the speed. Columns are
    split only where there are fewer chunks of rows than workers.
    """
    n_chunks, n_blocks = plan.ptr.shape[0], plan.ptr.shape[1] - 1
    # Half of the budget is left to the tokens that pass through.
    footprint = 2 * (plan.n_connections * bytes_per_connection + int(plan.chunk_rows[-1]) * TILE_BYTES)
    turns = -(-max(1, -(-footprint // CACHE_BUDGET_BYTES)) // n_workers)
    row_parts = min(turns * n_workers, n_chunks)
    column_parts = min(-(-n_workers // row_parts), n_blocks)
    chunk_edges, block_edges = split_evenly(n_chunks, row_parts), split_evenly(n_blocks, column_parts)
    rectangles: list[Any] = [
        (chunk_edges[i], chunk_edges[i + 1], block_edges[j], block_edges[j + 1])
        for i in range(row_parts)
        for j in range(column_parts)
    ]
    return np.array(rectangles, np.int64)
