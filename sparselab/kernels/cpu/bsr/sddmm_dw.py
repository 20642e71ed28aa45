"""Gradient of the blocks: ``dM[i, j] = sum_t R[i, t] C[j, t]`` for the rows and columns of every block.

Loop order, from outside: shares of rectangles (block rows x panels of columns) on threads; runs of tokens;
panels; strips; three columns at a time. A run's tokens lie one after the other in memory, so that the lanes
of the 12 running sums of a strip and three columns are added up once a run. In registers: these sums, and
three vectors of the columns, each of which serves four multiply-adds. In first-level cache: the four rows of
the strip. In second-level cache: the panel. The rows of the run come from the third level, once a panel.
"""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array, strides
from sparselab.kernels.cpu.bsr.panels import (
    HEIGHT,
    TOGETHER,
    add_sums,
    fma_parts,
    load_one,
    load_three,
    three_zeros,
)
from sparselab.kernels.cpu.bsr.plan import Strips, unpack_weights
from sparselab.kernels.cpu.csr.plan import split_evenly
from sparselab.kernels.cpu.partition import first_not_below
from sparselab.kernels.cpu.runtime.jit import aligned_empty, jit, launch, scratch, worker_count
from sparselab.kernels.cpu.runtime.target import VECTOR_BYTES
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.vectors import get, view_at
from sparselab.kernels.cpu.tiles import add_tokens, pack

#: Bytes of the tokens of a run, and from one row of it to the next: rows at multiples of a power of two would
#: lie in the same banks of a cache.
_RUN_BYTES = 768
_STRIDE_BYTES = 832

#: Most columns of a panel, 312 KiB of the second-level cache.
_PANEL_COLUMNS = 384

#: Items of scratch, on cache lines of their own, for the dots of an incomplete group of columns.
_REST = 16


@jit
def _strip_dots(rows, at, panel, columns, k, last, column0, length, step, rest, out, place):  # type: ignore[no-untyped-def]
    """Add the dots of a strip's rows with the columns k : last of `columns` to `out`, from `place` on.

    The step from token to token is an argument, because LLVM would unroll a loop whose length it can tell,
    and then reload an address for every operand.
    """
    stride = _STRIDE_BYTES // panel.itemsize
    while k < last:
        a = (np.int64(get(columns, k)) - column0) * stride
        b = (np.int64(get(columns, min(k + 1, last - 1))) - column0) * stride
        c = (np.int64(get(columns, min(k + 2, last - 1))) - column0) * stride
        s0 = s1 = s2 = s3 = three_zeros(panel)
        t = 0
        while t < length:
            x = load_three(panel, a + t, b + t, c + t)
            s0 = fma_parts(load_one(rows, at + t), x, s0)
            s1 = fma_parts(load_one(rows, at + stride + t), x, s1)
            s2 = fma_parts(load_one(rows, at + 2 * stride + t), x, s2)
            s3 = fma_parts(load_one(rows, at + 3 * stride + t), x, s3)
            t += step
        if k + TOGETHER <= last:
            add_sums(s0, s1, s2, s3, out, place)
        else:
            rest[:] = 0
            add_sums(s0, s1, s2, s3, rest, 0)
            for i in range((last - k) * HEIGHT):
                out[place + i] += get(rest, i)
        k += TOGETHER
        place += TOGETHER * HEIGHT


@jit
def _pack_rows(x, x_strides, token0, tokens, row0, row1, height, n_rows, target):  # type: ignore[no-untyped-def]
    """Pack a run of the rows of strips, some of which do not exist if blocks are not of whole strips."""
    stride = _STRIDE_BYTES // target.itemsize
    padded = (height + HEIGHT - 1) // HEIGHT * HEIGHT
    together = row1 - row0 if padded == height else 1
    for r in range(row0, row1, together):
        first = r * height
        rows = min(first + together * height, n_rows) - first
        part = target[(r - row0) * padded * stride : (r - row0 + together) * padded * stride]
        start = first * x_strides[0] + token0 * x_strides[1]
        pack(x, start, x_strides[0], x_strides[1], rows, tokens, part, stride)
        part[rows * stride :] = 0


@jit
def _cut_columns(columns, indptr, block_width, panel_columns, rectangle):  # type: ignore[no-untyped-def]
    """Where in `columns` the panels of the rectangle begin and end, (block rows, panels + 1)."""
    row0, row1, panel0, panel1 = rectangle
    cuts = np.empty((row1 - row0, panel1 - panel0 + 1), np.int64)
    for r in range(row0, row1):
        first, end = indptr[r] * block_width, indptr[r + 1] * block_width
        for p in range(panel0, panel1 + 1):
            cuts[r - row0, p - panel0] = first + first_not_below(columns[first:end], p * panel_columns)
    return cuts


@jit
def _sample_share(  # type: ignore[no-untyped-def]
    share, n_shares, rectangles, panel_columns, columns, indptr, height, block_width, n_rows, n_columns,
    r_at, r_strides, c_at, c_strides, n_tokens, step, most_rows, work, out, sums,
):  # fmt: skip
    """Compute the share's rectangles, one after the other; those that begin a row also write its sum."""
    if spread(share, n_shares):
        return
    memory = work[share]
    stride, run = _STRIDE_BYTES // memory.itemsize, _RUN_BYTES // memory.itemsize
    rest = memory[: TOGETHER * HEIGHT]
    panel = memory[_REST : _REST + panel_columns * stride]
    rows = memory[_REST + panel_columns * stride : _REST + (panel_columns + most_rows) * stride]
    partial = memory[_REST + (panel_columns + most_rows) * stride :]
    y, x = view_at(r_at, memory), view_at(c_at, memory)
    strips = (height + HEIGHT - 1) // HEIGHT
    n = len(rectangles)
    for i in range(share * n // n_shares, (share + 1) * n // n_shares):
        row0, row1, panel0, panel1 = rectangles[i, 0], rectangles[i, 1], rectangles[i, 2], rectangles[i, 3]
        wants_sums = len(sums) > 0 and panel0 == 0
        strip_rows = (row1 - row0) * strips * HEIGHT
        partial[: strip_rows * 8] = 0
        cuts = _cut_columns(columns, indptr, block_width, panel_columns, rectangles[i])
        for token0 in range(0, n_tokens, run):
            tokens = min(run, n_tokens - token0)
            length = (tokens + step - 1) // step * step
            _pack_rows(y, r_strides, token0, tokens, row0, row1, height, n_rows, rows)
            if wants_sums:
                add_tokens(rows, strip_rows, stride, partial)
            for p in range(panel0, panel1):
                column0 = p * panel_columns
                width = min(panel_columns, n_columns - column0)
                start = column0 * c_strides[0] + token0 * c_strides[1]
                pack(x, start, c_strides[0], c_strides[1], width, tokens, panel, stride)
                panel[width * stride :] = 0
                for r in range(row0, row1):
                    first, end = indptr[r] * block_width, indptr[r + 1] * block_width
                    k0, k1 = cuts[r - row0, p - panel0], cuts[r - row0, p + 1 - panel0]
                    for s in range(strips):
                        place = (first * strips + s * (end - first) + k0 - first) * HEIGHT
                        at = ((r - row0) * strips + s) * HEIGHT * stride
                        _strip_dots(rows, at, panel, columns, k0, k1, column0, length, step, rest, out, place)
        if wants_sums:
            for row in range(row0 * height, min(row1 * height, n_rows)):
                at = (row // height - row0) * strips * HEIGHT + row % height
                sums[row] = partial[at * 8 : at * 8 + 8].sum()


def _cut(plan: Strips, n_workers: int) -> tuple[Array, int]:
    """Rectangles ``(block row 0, block row 1, panel 0, panel 1)``, one row each, and blocks across a panel.

    The longer side of the matrix is cut first.
    """
    rows, blocks = len(plan.indptr) - 1, max(plan.n_columns // plan.width, 1)
    if plan.shape[0] >= plan.shape[1]:
        row_parts = min(n_workers, rows)
        column_parts = min(-(-n_workers // row_parts), blocks)
    else:
        column_parts = min(n_workers, blocks)
        row_parts = min(-(-n_workers // column_parts), rows)
    wanted = max(-(-plan.n_columns // (column_parts * _PANEL_COLUMNS)), 1) * column_parts
    panel_blocks = -(-blocks // wanted)
    panels = -(-blocks // panel_blocks)
    column_parts = min(column_parts, panels)
    row_edges, panel_edges = split_evenly(rows, row_parts), split_evenly(panels, column_parts)
    rectangles = [
        (row_edges[i], row_edges[i + 1], panel_edges[j], panel_edges[j + 1])
        for i in range(row_parts)
        for j in range(column_parts)
    ]
    return np.array(rectangles, np.int64), panel_blocks


def sample(plan: Strips, R: Array, C: Array, out: Array, sums: Array | None = None) -> None:
    """The dots of rows of `R` with rows of `C` for every entry of every block, written to `out` (flat).

    R ``(rows, tokens)`` and C ``(columns, tokens)``, of the matrix M that the strips walk, may have any
    strides and are not checked. If `sums` (rows,) is given, it becomes ``sum_t R[:, t]``. Entries of `out`
    beyond the matrix are 0 times a number, which a NaN or infinity makes NaN.
    """
    sums = np.empty(0, out.dtype) if sums is None else sums
    n_rows, n_columns = plan.shape
    n_tokens = R.shape[1]
    if n_tokens == 0 or (len(plan.slots) == 0 and sums.size == 0):
        out.fill(0)
        sums.fill(0)
        return
    rectangles, panel_blocks = _cut(plan, worker_count(plan.work(n_tokens)))
    most_rows = int((rectangles[:, 1] - rectangles[:, 0]).max()) * plan.strips_per_row * HEIGHT
    panel_columns = panel_blocks * plan.width
    items = _REST + (panel_columns + most_rows) * (_STRIDE_BYTES // out.itemsize) + most_rows * 8
    work = scratch(len(rectangles), items, out.dtype)
    packed = out if plan.is_packed else aligned_empty(plan.packed_items, out.dtype)
    packed.fill(0)
    launch(
        _sample_share, len(rectangles), rectangles, panel_columns, plan.columns, plan.indptr, plan.height,
        plan.width, n_rows, n_columns, R.__array_interface__["data"][0], strides(R),
        C.__array_interface__["data"][0], strides(C), n_tokens, VECTOR_BYTES // out.itemsize, most_rows, work,
        packed, sums,
    )  # fmt: skip
    if not plan.is_packed:
        unpack_weights(packed, plan, out)
