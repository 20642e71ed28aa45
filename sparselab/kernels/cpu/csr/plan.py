"""Plans: in which order a kernel walks the connections.

A kernel walks *segments*: the connections of one row that fall into one block of columns. The tokens of a
block of columns then stay in a fast cache while all rows pass over it. Within a chunk of rows the segments of
a block are sorted by length, so the length of the inner loop is a branch that the CPU predicts.

A plan is made when it is first asked for and kept with the topology it belongs to. It says nothing about the
connections' values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparselab.kernels.arrays import Array, index_dtype, slot_dtype
from sparselab.kernels.cpu.csr.order import Order, slots_of, turn
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.memory import mapped_empty
from sparselab.kernels.cpu.runtime.target import TARGET, TILE_BYTES
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.layouts.padded_csr import RowTopology

#: Columns of one block in `sddmm_dw`, which gains nothing from first-level cache blocks: its dots are bound
#: by arithmetic, and the longer a segment the fewer of its dots fall outside full groups.
_GRADIENT_BLOCK_COLUMNS = 131072 // TILE_BYTES

#: A segment shorter than this pays more for its row of sums than for its connections.
_USEFUL_SEGMENT = 12

#: Planes of one block in `multiply_shifted`: what a tile's windows see of them fits a first-level cache.
_BLOCK_PLANES = 32

_CHUNK_BYTES = 128 * 1024
_MIN_CHUNKS = 16
_MIN_CHUNK_ROWS = 8
_MIN_PART = 1 << 15


#: Keys of the plans of a topology.
PRODUCT, PRODUCT_T, GRADIENT = ("cpu", "product"), ("cpu", "product_t"), ("cpu", "gradient")
SLOTS = "cpu", "slots of product_t"


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
    ``indices[k]`` (a row of W); `order` brings the values of W into their order.
    """

    indptr: Array
    indices: Array
    order: Order
    segments: Segments


def product_plan(topology: RowTopology) -> Segments:
    """Plan of ``Y = W X``."""
    return topology.plan(PRODUCT, _plan_product)


def transpose_plan(topology: RowTopology) -> TransposePlan:
    """Plan of ``DX = W^T DY``. Costs about 3 bytes per connection."""
    return topology.plan(PRODUCT_T, _plan_transpose)


def slots_in_order(topology: RowTopology, plan: TransposePlan) -> Array:
    """The slot of each connection of W^T. Costs 4 bytes per connection, and is for few tokens."""
    return topology.plan(SLOTS, lambda own: slots_of(own.rows, plan.order))


def gradient_plan(topology: RowTopology) -> Segments:
    """Plan of the gradient by the values."""
    return topology.plan(GRADIENT, _plan_gradient)


def _plan_product(topology: RowTopology) -> Segments:
    W = topology.rows
    return _segments(W.indptr, W.row_nnz, W.indices, W.shape, _product_block(W.nnz, W.shape))


def _plan_transpose(topology: RowTopology) -> TransposePlan:
    W = topology.rows
    rows, cols = W.shape
    indptr, indices, order = turn(W)
    block = _product_block(W.nnz, (cols, rows))
    segments = _segments(indptr[:-1], np.diff(indptr), indices, (cols, rows), block)
    return TransposePlan(indptr, indices, order, segments)


def _plan_gradient(topology: RowTopology) -> Segments:
    W = topology.rows
    return _segments(W.indptr, W.row_nnz, W.indices, W.shape, _gradient_block(W.shape[1]))


def plan_shifted(
    begin: Array, row_nnz: Array, indices: Array, shape: tuple[int, int], elements: int
) -> Segments:
    """Plan of `multiply_shifted`; so many columns, the elements of a kernel, read the same plane."""
    block = max(_BLOCK_PLANES * elements, _useful_block(len(indices), shape))
    return _segments(begin, row_nnz, indices, shape, block)


def _product_block(nnz: int, shape: tuple[int, int]) -> int:
    return int(min(max(_useful_block(nnz, shape), TARGET.block_columns), max(shape[1], 1)))


def _useful_block(nnz: int, shape: tuple[int, int]) -> int:
    """Columns in which a row has so many connections that they repay its sums."""
    return _USEFUL_SEGMENT * shape[0] * shape[1] // nnz if nnz else shape[1]


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
    n_chunks = len(chunk_rows) - 1
    n_workers = max(1, min(worker_count(), n_chunks, len(indices) // _MIN_PART))
    ptr = np.zeros((n_chunks, n_blocks + 1), np.int64)
    longest = np.zeros(n_workers, np.int64)
    launch(
        _count_segments, n_workers, begin, row_nnz, indices, block_columns, chunk_rows,
        ptr, longest,
    )  # fmt: skip
    sizes = ptr[:, 1:]
    ends = np.cumsum(sizes).reshape(sizes.shape)
    ptr[:, 1:] = ends
    ptr[1:, 0] = ends[:-1, -1]
    n_segments = int(ptr[-1, -1]) if ptr.size else 0
    row = mapped_empty(n_segments, index_dtype(n_rows))
    start = mapped_empty(n_segments, slot_dtype(int(begin[-1]) + int(row_nnz[-1]) if n_rows else 0))
    length = mapped_empty(n_segments, index_dtype(block_columns + 1))
    places = np.empty((n_workers, n_blocks, int(longest.max()) + 2), np.int64)
    launch(
        _fill_segments, n_workers, begin, row_nnz, indices, block_columns, chunk_rows, ptr,
        places, row, start, length,
    )  # fmt: skip
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
def _count_segments(  # type: ignore[no-untyped-def]
    worker, n_workers, begin, row_nnz, indices, block, chunk_rows, ptr, longest
):
    """``ptr[c, b + 1]`` becomes the number of segments of chunk c in block b."""
    if spread(worker, n_workers):
        return
    n_chunks = len(chunk_rows) - 1
    most = np.int64(0)
    for c in range(worker * n_chunks // n_workers, (worker + 1) * n_chunks // n_workers):
        for i in range(chunk_rows[c], chunk_rows[c + 1]):
            ptr[c, 1] += 1
            first = begin[i]
            limit = block
            for slot in range(begin[i], begin[i] + row_nnz[i]):
                j = np.int64(indices[slot])
                if j >= limit:
                    b = j // block
                    ptr[c, b + 1] += 1
                    most = max(most, slot - first)
                    first = slot
                    limit = (b + 1) * block
            most = max(most, begin[i] + row_nnz[i] - first)
    longest[worker] = most


@jit
def _fill_segments(  # type: ignore[no-untyped-def]
    worker, n_workers, begin, row_nnz, indices, block, chunk_rows, ptr, places, row, start, length
):
    """Write the segments of a worker's chunks, those of each chunk and block sorted by length (stable)."""
    if spread(worker, n_workers):
        return
    n_chunks, n_blocks = ptr.shape[0], ptr.shape[1] - 1
    first_chunk, last_chunk = worker * n_chunks // n_workers, (worker + 1) * n_chunks // n_workers
    # For each block, first how many segments of each length there are, then where the next one goes.
    place = places[worker]
    for c in range(first_chunk, last_chunk):
        place[:] = 0
        for write in range(2):
            for i in range(chunk_rows[c], chunk_rows[c + 1]):
                slot = begin[i]
                end = begin[i] + row_nnz[i]
                b = np.int64(0)
                while b == 0 or slot < end:
                    first = slot
                    limit = (b + 1) * block
                    while slot < end and np.int64(indices[slot]) < limit:
                        slot += 1
                    n = slot - first
                    if write:
                        at = place[b, n]
                        row[at] = i
                        start[at] = first
                        length[at] = n
                        place[b, n] = at + 1
                    else:
                        place[b, n + 1] += 1
                    b = np.int64(indices[slot]) // block if slot < end else n_blocks
            if not write:
                for b in range(n_blocks):
                    place[b, 0] = ptr[c, b]
                    for n in range(1, place.shape[1]):
                        place[b, n] += place[b, n - 1]


def split_evenly(n_items: int, n_parts: int) -> Array:
    """Boundaries of `n_parts` contiguous parts of almost equal size."""
    return np.arange(n_parts + 1, dtype=np.int64) * n_items // n_parts


def _n_groups(plan: Segments, tile_bytes: int, n_tiles: int, connection_bytes: int) -> int:
    """How many groups to cut the rows into, each of which packs the tokens for itself.

    As many as it takes for a group's connections and its rows of a tile (`tile_bytes` for all groups
    together) to stay in the cache from tile to tile; only for the latter where packing that often moves more
    bytes than reading the connections again for every tile, as in a layer of many more inputs than outputs.
    """
    kept, streamed = (
        max(1, -(-size // TARGET.cache_budget_bytes)) for size in (connection_bytes + tile_bytes, tile_bytes)
    )
    tokens = (plan.ptr.shape[1] - 1) * plan.block_columns * TILE_BYTES * n_tiles
    return streamed if tokens * (kept - streamed) > connection_bytes * (n_tiles - 1) else kept


def product_groups(plan: Segments, n_tiles: int, n_workers: int, bytes_per_connection: int) -> Array:
    """Chunk boundaries of the row groups that one worker passes over one tile of tokens.

    Groups are such as `_n_groups` wants, or smaller where that is needed to keep all workers busy.
    """
    n_chunks = len(plan.chunk_rows) - 1
    # The sums count twice, since they are read and written.
    sums = 2 * int(plan.chunk_rows[-1]) * TILE_BYTES
    n_groups = min(_n_groups(plan, sums, n_tiles, plan.n_connections * bytes_per_connection), n_chunks)
    while n_groups < n_chunks and n_groups * n_tiles < 8 * n_workers and n_groups * n_tiles % n_workers:
        n_groups += 1
    return split_evenly(n_chunks, n_groups)


def gradient_rectangles(plan: Segments, n_tiles: int, n_workers: int, bytes_per_connection: int) -> Array:
    """Rectangles of chunks x blocks, one row ``(chunk0, chunk1, block0, block1)`` each.

    Each connection lies in one rectangle, so each gradient has one writer. Rows are split first: workers on
    different columns of the same rows write to the same cache lines, and ran at half the speed. Columns are
    split only where there are fewer chunks of rows than workers.
    """
    n_chunks, n_blocks = plan.ptr.shape[0], plan.ptr.shape[1] - 1
    # Half of the budget is left to the tokens that pass through.
    dy, connections = int(plan.chunk_rows[-1]) * TILE_BYTES, plan.n_connections * bytes_per_connection
    rounds = -(-_n_groups(plan, 2 * dy, n_tiles, 2 * connections) // n_workers)
    row_parts = min(rounds * n_workers, n_chunks)
    column_parts = min(-(-n_workers // row_parts), n_blocks)
    chunk_edges, block_edges = split_evenly(n_chunks, row_parts), split_evenly(n_blocks, column_parts)
    rectangles: list[Any] = [
        (chunk_edges[i], chunk_edges[i + 1], block_edges[j], block_edges[j + 1])
        for i in range(row_parts)
        for j in range(column_parts)
    ]
    return np.array(rectangles, np.int64)
