"""``dW[i, j] = sum_t dY[t, i] X[t, j]`` at connections and small blocks, in bfloat16 by the matrix unit.

The unit multiplies 32 rows with 32 columns in the time that vectors take for some 50 connections of these
1024, so such parts of the dense gradient are computed, and what belongs to connections is taken from them
while they are in the first-level cache; the rest is never stored.

Loop order, from outside: runs of `_RUN` tokens, in which X is put in order; groups of panels of rows, whose
dY is put in order; groups of panels of columns; panels of rows; chunks of tokens; panels of columns. In
tiles: the 32 x 32 sums of a part. In first-level cache: a chunk of a panel of rows, and the sums of a panel
of rows with all columns of a group. In second-level cache: both groups. Per step of 32 tokens and part: 2 KiB
of either factor loaded for 32,768 multiply-adds, which take 64 cycles. The sums of dY are those with one more
column, of ones. Each output has one writer and one order of summation.
"""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import NONE_OF, Array, address
from sparselab.kernels.cpu.amx.order import STEP, STEP_WORDS, order_pairs, order_rows
from sparselab.kernels.cpu.amx.tiles import (
    PANEL,
    configuration,
    dot00,
    dot01,
    dot10,
    dot11,
    load00,
    load01,
    load10,
    load11,
    pairs0,
    pairs1,
    rows0,
    rows1,
    store00,
    store01,
    store10,
    store11,
    zero00,
    zero01,
    zero10,
    zero11,
)
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.matrix_unit import require_matrix_unit
from sparselab.kernels.cpu.runtime.memory import scratch
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.matrix_tiles import configure, release
from sparselab.kernels.cpu.simd.vectors import get, put, view_at

#: Tokens of a run.
_RUN = 1024

#: Panels of rows and of columns that are in second-level cache together.
_ROW_PANELS, _COLUMN_PANELS = 8, 8

#: Steps of the rows and the pairs of a part that are in first-level cache together.
_CHUNK = 8

#: Columns of a row of sums, and the numbers from row to row.
_WIDTH = _COLUMN_PANELS * PANEL
_PITCH = _WIDTH + 16

_STEP_BYTES = 2 * STEP_WORDS


def serves(block_shape: tuple[int, int]) -> bool:
    """Whether parts are made of whole blocks of this shape; (1, 1) are single connections."""
    height, width = block_shape
    return PANEL % height == 0 and _WIDTH % width == 0


@jit
def _add_part(rows_at, pairs_at, n_steps, sums_at, sums_step, is_first):  # type: ignore[no-untyped-def]
    """Add the product of some steps of a panel of rows and one of pairs to the 32 x 32 sums at `sums_at`."""
    if is_first:
        zero00()
        zero10()
        zero01()
        zero11()
    else:
        load00(sums_at, sums_step)
        load10(sums_at + 16 * sums_step, sums_step)
        load01(sums_at + 64, sums_step)
        load11(sums_at + 16 * sums_step + 64, sums_step)
    for _ in range(n_steps):
        rows0(rows_at, 64)
        pairs0(pairs_at, 128)
        dot00()
        rows1(rows_at + 1024, 64)
        dot10()
        pairs1(pairs_at + 64, 128)
        dot01()
        dot11()
        rows_at += _STEP_BYTES
        pairs_at += _STEP_BYTES
    store00(sums_at, sums_step)
    store10(sums_at + 16 * sums_step, sums_step)
    store01(sums_at + 64, sums_step)
    store11(sums_at + 16 * sums_step + 64, sums_step)


@jit
def _take_blocks(sums, row0, n_rows, column0, indices, begin, end, places, place0, height, width, out):  # type: ignore[no-untyped-def]
    """Add what the columns of `sums` have to the slots of block rows; `places` says how far each is."""
    column1 = column0 + _WIDTH
    for row in range(row0, row0 + n_rows):
        place = place0 + row - row0
        slot, last = places[place], np.int64(get(end, row))
        at = (row - row0) * height * _PITCH - column0
        if height * width == 1:
            while slot < last and np.int64(get(indices, slot)) < column1:
                put(out, slot, get(out, slot) + get(sums, at + np.int64(get(indices, slot))))
                slot += 1
        else:
            while slot < last and np.int64(get(indices, slot)) * width < column1:
                first = at + np.int64(get(indices, slot)) * width
                for i in range(height):
                    for j in range(width):
                        entry = (slot * height + i) * width + j
                        put(out, entry, get(out, entry) + get(sums, first + i * _PITCH + j))
                slot += 1
        places[place] = slot


@jit
def _sample_parts(  # type: ignore[no-untyped-def]
    worker, n_workers, told_at, edges, n_tokens, n_steps, dy_at, dy_like, dy_step, pairs_at, n_rows,
    n_columns, indices, begin, end, height, width, work, buffers, buffers_as_words, all_places, all_sums,
    out_at, out_sums_at,
):  # fmt: skip
    """Compute the worker's groups of panels of rows."""
    if spread(worker, n_workers):
        return
    configure(told_at)
    places, sums, rows = all_places[worker], all_sums[worker], work[worker]
    sums_at, rows_at = sums.ctypes.data, rows.ctypes.data
    dy, out, out_sums = view_at(dy_at, dy_like), view_at(out_at, sums), view_at(out_sums_at, sums)
    panel_bytes = n_steps * _STEP_BYTES
    n_blocks = len(begin)
    n_columns_of_sums = n_columns + 1 if out_sums_at != 0 else n_columns
    n_groups = len(edges) - 1
    for group in range(worker * n_groups // n_workers, (worker + 1) * n_groups // n_workers):
        row0, row1 = edges[group] * PANEL, min(edges[group + 1] * PANEL, n_rows)
        order_rows(
            dy,
            dy_step,
            n_tokens,
            n_steps,
            row0,
            row1,
            n_rows,
            rows,
            buffers[worker],
            buffers_as_words[worker],
        )
        block0 = row0 // height
        for block in range(block0, min((row1 + height - 1) // height, n_blocks)):
            places[block - block0] = get(begin, block)
        for column0 in range(0, n_columns_of_sums, _WIDTH):
            column1 = min(column0 + _WIDTH, n_columns_of_sums)
            for row in range(row0, row1, PANEL):
                for step in range(0, n_steps, _CHUNK):
                    steps = min(_CHUNK, n_steps - step)
                    part_at = rows_at + (row - row0) // PANEL * panel_bytes + step * _STEP_BYTES
                    for column in range(column0, column1, PANEL):
                        _add_part(
                            part_at, pairs_at + column // PANEL * panel_bytes + step * _STEP_BYTES, steps,
                            sums_at + 4 * (column - column0), 4 * _PITCH, step == 0,
                        )  # fmt: skip
                block = row // height
                present = min(PANEL // height, n_blocks - block)
                _take_blocks(
                    sums, block, present, column0, indices, begin, end, places, block - block0, height,
                    width, out,
                )  # fmt: skip
                if out_sums_at != 0 and n_columns < column0 + _WIDTH:
                    for i in range(row, min(row + PANEL, row1)):
                        total = get(sums, (i - row) * _PITCH + n_columns - column0)
                        put(out_sums, i, get(out_sums, i) + total)
    release()


def sample_connections(
    shape: tuple[int, int], block_shape: tuple[int, int], indices: Array, begin: Array, end: Array,
    DY: Array, X: Array, out: Array, sums: Array | None = None,
) -> None:  # fmt: skip
    """Add ``sum_t dY[t, i] X[t, j]`` to every entry of `out`, and ``sum_t dY[t]`` to `sums`.

    Products are exact and sums float32, in another order than those of vectors. Subnormal numbers count as
    0, as do sums that are.

    Parameters
    ----------
    shape, block_shape : (int, int)
        Of W, and of its blocks; see `serves`.
    indices, begin, end : integer arrays
        Block row r has the slots ``begin[r] : end[r]``, whose block columns, ascending, are in `indices`.
    DY, X : arrays, (tokens, rows) and (tokens, columns)
        The bits of bfloat16 (uint16), or float32, which is rounded. The features of a token lie together.
    out : float32 array, flat
        The blocks of W by their slots. What is added to entries of blocks beyond the matrix means nothing.
    sums : float32 array, (rows,), optional

    Raises
    ------
    RuntimeError
        If this process may not use a matrix unit.
    """
    require_matrix_unit()
    (n_rows, n_columns), n_tokens = shape, len(X)
    if n_tokens == 0 or n_rows == 0:
        return
    panels, column_panels = -(-n_rows // PANEL), n_columns // PANEL + 1
    run_items = -(-min(n_tokens, _RUN) // STEP) * STEP_WORDS
    workers = worker_count(panels * column_panels * -(-n_tokens // STEP) * STEP_WORDS)
    n_groups = -(-panels // _ROW_PANELS)
    n_groups = min(-(-n_groups // workers) * workers, panels)
    n_workers = min(workers, n_groups)
    edges = np.arange(n_groups + 1) * panels // n_groups
    # One block of scratch: the pairs, and the rows of each worker.
    most_panels = int(np.diff(edges).max())
    pair_words, row_words = (n * run_items // 2 for n in (column_panels, most_panels))
    memory = scratch(1, pair_words + n_workers * row_words, np.dtype(np.float32))[0]
    pairs = memory[:pair_words].view(np.uint16)
    work = memory[pair_words : pair_words + n_workers * row_words].reshape(n_workers, row_words)
    buffers = np.empty((n_workers, STEP_WORDS), np.uint16)
    places = np.empty((n_workers, most_panels * PANEL // block_shape[0]), np.int64)
    all_sums = np.empty((n_workers, PANEL * _PITCH), np.float32)
    told = configuration(STEP)
    for token0 in range(0, n_tokens, _RUN):
        x, dy = X[token0 : token0 + _RUN], DY[token0 : token0 + _RUN]
        steps = -(-len(x) // STEP)
        launch(
            order_pairs, min(workers, steps), len(x), steps, address(x), NONE_OF[x.dtype],
            x.strides[0] // x.itemsize, n_columns, pairs,
        )  # fmt: skip
        launch(
            _sample_parts, n_workers, address(told), edges, len(x), steps, address(dy), NONE_OF[dy.dtype],
            dy.strides[0] // dy.itemsize, address(pairs), n_rows, n_columns, indices, begin, end,
            *block_shape, work, buffers, buffers.view(np.float32), places, all_sums, address(out),
            0 if sums is None else address(sums),
        )  # fmt: skip
