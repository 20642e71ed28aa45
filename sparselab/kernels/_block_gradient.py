"""Gradient of the blocks: ``dM[i, j] = sum_t R[i, t] C[j, t]`` for every row and column of every block.

Loop order, from outside: shares of rectangles (block rows x panels of columns) on threads; runs of tokens;
panels; strips; three columns at a time. A run's tokens lie one after the other in memory, so that the lanes
of the 12 running sums of a strip and three columns are added up once a run. In registers: these sums, and
three vectors of the columns, each of which serves four multiply-adds. In first-level cache: the four rows of
the strip. In second-level cache: the panel. The rows of the run come from the third level, once a panel.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparselab.kernels._block_plan import Strips
from sparselab.kernels._block_vectors import (
    HEIGHT,
    add_sums,
    fma_parts,
    load_one,
    load_three,
    three_zeros,
)
from sparselab.kernels._intrinsics import get, view_at
from sparselab.kernels._jit import jit, launch, scratch, worker_count
from sparselab.kernels._plan import split_evenly
from sparselab.kernels._shares import first_not_below
from sparselab.kernels._target import VECTOR_BYTES
from sparselab.kernels._team import spread
from sparselab.kernels._tiles import pack
from sparselab.kernels.layout import Array, strides

#: Bytes of one row of a run, and most columns of a panel: 256 KiB together.
_RUN_BYTES = 512
_PANEL_COLUMNS = 512

#: Columns whose dots are made together.
_TOGETHER = 3


@jit
def _strip_dots(rows, at, panel, columns, k, last, column0, length, rest, out, place):  # type: ignore[no-untyped-def]
    """Add the dots of a strip's rows with the columns k : last of `columns` to `out`, from `place` on."""
    run = _RUN_BYTES // panel.itemsize
    lanes = VECTOR_BYTES // panel.itemsize
    while k < last:
        a = (np.int64(get(columns, k)) - column0) * run
        b = (np.int64(get(columns, min(k + 1, last - 1))) - column0) * run
        c = (np.int64(get(columns, min(k + 2, last - 1))) - column0) * run
        s0 = s1 = s2 = s3 = three_zeros(panel)
        for t in range(0, length, lanes):
            x = load_three(panel, a + t, b + t, c + t)
            s0 = fma_parts(load_one(rows, at + t), x, s0)
            s1 = fma_parts(load_one(rows, at + run + t), x, s1)
            s2 = fma_parts(load_one(rows, at + 2 * run + t), x, s2)
            s3 = fma_parts(load_one(rows, at + 3 * run + t), x, s3)
        if k + _TOGETHER <= last:
            add_sums(s0, s1, s2, s3, out, place)
        else:
            rest[:] = 0
            add_sums(s0, s1, s2, s3, rest, 0)
            for i in range((last - k) * HEIGHT):
                out[place + i] += get(rest, i)
        k += _TOGETHER
        place += _TOGETHER * HEIGHT


@jit
def _pack_rows(x, x_strides, token0, tokens, row0, row1, height, n_rows, target):  # type: ignore[no-untyped-def]
    """Pack a run of the rows of strips row0 : row1; a block row whose height is no multiple gets more."""
    run = _RUN_BYTES // target.itemsize
    padded = (height + HEIGHT - 1) // HEIGHT * HEIGHT
    together = row1 - row0 if padded == height else 1
    for r in range(row0, row1, together):
        first = r * height
        rows = min(first + together * height, n_rows) - first
        begin = (r - row0) * padded * run
        part = target[begin : begin + together * padded * run]
        pack(x, first * x_strides[0] + token0 * x_strides[1], x_strides[0], x_strides[1], rows, tokens, part, run)
        part[rows * run :] = 0


@jit
def _sample_share(  # type: ignore[no-untyped-def]
    share, n_shares, rectangles, panel_columns, columns, indptr, height, block_width, n_rows, n_columns,
    r_at, r_strides, c_at, c_strides, n_tokens, most_rows, work, out, row_sums, column_sums,
):  # fmt: skip
    if spread(share, n_shares):
        return
    memory = work[share]
    run = _RUN_BYTES // memory.itemsize
    lanes = VECTOR_BYTES // memory.itemsize
    rest = memory[: _TOGETHER * HEIGHT]
    panel = memory[lanes * HEIGHT : lanes * HEIGHT + panel_columns * run]
    rows = memory[lanes * HEIGHT + panel_columns * run :]
    partial = rows[most_rows * run :]
    y, x = view_at(r_at, memory), view_at(c_at, memory)
    strips = (height + HEIGHT - 1) // HEIGHT
    for rectangle in range(
        share * len(rectangles) // n_shares, (share + 1) * len(rectangles) // n_shares
    ):
        row0, row1, panel0, panel1 = rectangles[rectangle]
        for token0 in range(0, n_tokens, run):
            tokens = min(run, n_tokens - token0)
            length = (tokens + lanes - 1) // lanes * lanes
            _pack_rows(y, r_strides, token0, tokens, row0, row1, height, n_rows, rows)
            for p in range(panel0, panel1):
                column0 = p * panel_columns
                width = min(panel_columns, n_columns - column0)
                start = column0 * c_strides[0] + token0 * c_strides[1]
                pack(x, start, c_strides[0], c_strides[1], width, tokens, panel, run)
                panel[width * run :] = 0
                for r in range(row0, row1):
                    first, end = indptr[r] * block_width, indptr[r + 1] * block_width
                    k0 = first + first_not_below(columns[first:end], column0)
                    k1 = first + first_not_below(columns[first:end], column0 + panel_columns)
                    for s in range(strips):
                        place = (first * strips + s * (end - first) + k0 - first) * HEIGHT
                        at = ((r - row0) * strips + s) * HEIGHT * run
                        _strip_dots(rows, at, panel, columns, k0, k1, column0, length, rest, out, place)


def _rectangles(plan: Strips, panels: int, workers: int) -> Array:
    """Rows ``(row0, row1, panel0, panel1)``: block rows by panels, the longer side cut first."""
    n = len(plan.indptr) - 1
    if plan.shape[0] >= plan.shape[1]:
        row_parts = min(workers, n)
        column_parts = min(-(-workers // row_parts), panels)
    else:
        column_parts = min(workers, panels)
        row_parts = min(-(-workers // column_parts), n)
    rows, cuts = split_evenly(n, row_parts), split_evenly(panels, column_parts)
    return np.array(
        [(rows[i], rows[i + 1], cuts[j], cuts[j + 1]) for i in range(row_parts) for j in range(column_parts)],
        np.int64,
    )


def sample(
    plan: Strips, R: Array, C: Array, out: Array, row_sums: Array | None = None, column_sums: Array | None = None
) -> None:
    """Dots of the rows of M with its columns, in the order of the strips."""
    n_rows, n_columns = plan.shape
    n_tokens = R.shape[1]
    blocks = -(-n_columns // plan.width)
    panels = min(2 * -(-n_columns // (2 * _PANEL_COLUMNS)), blocks)
    panel_columns = -(-blocks // panels) * plan.width
    panels = -(-blocks * plan.width // panel_columns)
    rectangles = _rectangles(plan, panels, worker_count())
    run = _RUN_BYTES // out.itemsize
    lanes = VECTOR_BYTES // out.itemsize
    most_rows = int((rectangles[:, 1] - rectangles[:, 0]).max()) * plan.strips_per_row * HEIGHT
    n_shares = len(rectangles)
    work = scratch(n_shares, lanes * HEIGHT + (panel_columns + most_rows) * run, out.dtype)
    empty = np.empty(0, out.dtype)
    out.fill(0)
    launch(
        _sample_share, n_shares, rectangles, panel_columns, plan.columns, plan.indptr, plan.height, plan.width,
        n_rows, n_columns, R.__array_interface__["data"][0], strides(R), C.__array_interface__["data"][0],
        strides(C), n_tokens, most_rows, work, out, empty, empty,
    )  # fmt: skip
