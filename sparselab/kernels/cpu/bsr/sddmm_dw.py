"""Gradient of the blocks: ``dM[i, j] = sum_t R[i, t] C[j, t]`` for the rows and columns of every block.

Loop order, from outside: workers, each with rectangles (block rows x panels of columns); KC blocks of tokens;
panels; micro-panels; `DOT_COLUMNS` columns at a time. The tokens of a KC block lie one after the other in
memory, so that the lanes of the 12 sums of a micro-panel and three columns are added up once a KC block. In
registers: these sums, and three vectors of the columns, each of which serves four multiply-adds. In
first-level cache: the rows of the micro-panel. In second-level cache: the panel. The rows of the KC block
come from the third level, once a panel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparselab.kernels.arrays import NONE_OF, Array, address, strides
from sparselab.kernels.cpu.bsr.panels import DOT_COLUMNS, MR
from sparselab.kernels.cpu.bsr.plan import PanelPlan, add_unpack, cut_rectangles, unpack_weights
from sparselab.kernels.cpu.partition import first_not_below
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.memory import aligned_empty, aligned_zeros, scratch
from sparselab.kernels.cpu.runtime.program import COUNT, Lent, Place, Program
from sparselab.kernels.cpu.runtime.target import VECTOR_BYTES
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.dots import add_sums
from sparselab.kernels.cpu.simd.vectors import fma, get, load, view_at, zeros_register
from sparselab.kernels.cpu.tiles import add_tokens, pack

#: Bytes of the tokens of a KC block, and from one row of it to the next: rows at multiples of a power of two
#: would lie in the same banks of a cache.
KC_BYTES = 768
STRIDE_BYTES = 832

#: Most columns of a panel, 312 KiB of the second-level cache.
_PANEL_COLUMNS = 384


@jit
def _panel_dots(rows, at, panel, columns, k, last, column0, length, step, out, place):  # type: ignore[no-untyped-def]
    """Add the dots of a micro-panel's rows with the columns k : last to `out`, from `place` on.

    The step from token to token is an argument, because LLVM would unroll a loop whose length it can tell,
    and then reload an address for every operand.
    """
    stride = STRIDE_BYTES // panel.itemsize
    zero = zeros_register(panel)
    end = place + (last - k) * MR
    while k < last:
        a = (np.int64(get(columns, k)) - column0) * stride
        b = (np.int64(get(columns, min(k + 1, last - 1))) - column0) * stride
        c = (np.int64(get(columns, min(k + 2, last - 1))) - column0) * stride
        s0 = s1 = s2 = s3 = (zero, zero, zero)
        t = 0
        while t < length:
            x = load(panel, a + t, zero), load(panel, b + t, zero), load(panel, c + t, zero)
            s0 = fma(load(rows, at + t, zero), x, s0)
            s1 = fma(load(rows, at + stride + t, zero), x, s1)
            s2 = fma(load(rows, at + 2 * stride + t, zero), x, s2)
            s3 = fma(load(rows, at + 3 * stride + t, zero), x, s3)
            t += step
        by_column = s0[0], s1[0], s2[0], s3[0], s0[1], s1[1], s2[1], s3[1], s0[2], s1[2], s2[2], s3[2]
        add_sums(out, place, end, by_column)
        k += DOT_COLUMNS
        place += DOT_COLUMNS * MR


@jit
def _pack_rows(x, x_strides, token0, tokens, row0, row1, height, n_rows, target):  # type: ignore[no-untyped-def]
    """Pack the rows of micro-panels; those that blocks do not have, and missing tokens, become zeros."""
    stride = STRIDE_BYTES // target.itemsize
    padded = (height + MR - 1) // MR * MR
    together = row1 - row0 if padded == height else 1
    for r in range(row0, row1, together):
        first = r * height
        rows = min(first + together * height, n_rows) - first
        part = target[(r - row0) * padded * stride : (r - row0 + together) * padded * stride]
        start = first * x_strides[0] + token0 * x_strides[1]
        pack(x, start, x_strides[0], x_strides[1], rows, tokens, part, stride)
        part[rows * stride :] = 0


@jit
def _cut_columns(columns, indptr, block_width, panel_columns, rectangle, cuts):  # type: ignore[no-untyped-def]
    """Write where in `columns` the panels of the rectangle begin and end, (block rows, panels + 1)."""
    row0, row1, panel0, panel1 = rectangle
    for r in range(row0, row1):
        first, end = indptr[r] * block_width, indptr[r + 1] * block_width
        for p in range(panel0, panel1 + 1):
            cuts[r - row0, p - panel0] = first + first_not_below(columns[first:end], p * panel_columns)


@jit
def _sample_blocks(  # type: ignore[no-untyped-def]
    worker, n_workers, rectangles, panel_columns, columns, indptr, height, block_width, n_rows, n_columns,
    r_at, r_like, r_strides, r_tiled, c_at, c_like, c_strides, c_tiled, n_tokens, step, work, cut_places, out,
    partial, sums,
):  # fmt: skip
    """Compute the worker's rectangles, one after the other; those that begin a row also write its sum.

    A factor that lies in KC blocks already has `tiled` rows in each, else 0.
    """
    if spread(worker, n_workers):
        return
    memory, cuts = work[worker], cut_places[worker]
    stride, kc = STRIDE_BYTES // memory.itemsize, KC_BYTES // memory.itemsize
    panel, rows = memory[: panel_columns * stride], memory[panel_columns * stride :]
    y, x = view_at(r_at, r_like), view_at(c_at, c_like)
    panels = (height + MR - 1) // MR
    each = panels * MR
    if r_tiled > 0:
        rows, each = view_at(r_at, memory), height
    if c_tiled > 0:
        panel = view_at(c_at, memory)
    n = len(rectangles)
    for i in range(worker * n // n_workers, (worker + 1) * n // n_workers):
        row0, row1, panel0, panel1 = rectangles[i, 0], rectangles[i, 1], rectangles[i, 2], rectangles[i, 3]
        wants_sums = len(sums) > 0 and panel0 == 0
        panel_rows = (row1 - row0) * each
        _cut_columns(columns, indptr, block_width, panel_columns, rectangles[i], cuts)
        for token0 in range(0, n_tokens, kc):
            tokens = min(kc, n_tokens - token0)
            length = (tokens + step - 1) // step * step
            first_row = token0 // kc * r_tiled + row0 * height
            if r_tiled == 0:
                first_row = 0
                _pack_rows(y, r_strides, token0, tokens, row0, row1, height, n_rows, rows)
            if wants_sums:
                add_tokens(rows, first_row, panel_rows, stride, length, partial, row0 * each)
            for p in range(panel0, panel1):
                column0 = p * panel_columns
                width = min(panel_columns, n_columns - column0)
                origin = -(token0 // kc) * c_tiled
                if c_tiled == 0:
                    origin = column0
                    start = column0 * c_strides[0] + token0 * c_strides[1]
                    pack(x, start, c_strides[0], c_strides[1], width, tokens, panel, stride)
                    panel[width * stride :] = 0
                for r in range(row0, row1):
                    first, end = indptr[r] * block_width, indptr[r + 1] * block_width
                    k0, k1 = cuts[r - row0, p - panel0], cuts[r - row0, p + 1 - panel0]
                    for s in range(panels):
                        place = (first * panels + s * (end - first) + k0 - first) * MR
                        at = (first_row + (r - row0) * each + s * MR) * stride
                        _panel_dots(rows, at, panel, columns, k0, k1, origin, length, step, out, place)
        if wants_sums:
            for row in range(row0 * height, min(row1 * height, n_rows)):
                at = row // height * each + row % height
                sums[row] = partial[at * 8 : at * 8 + 8].sum()


def sample(plan: PanelPlan, R: Array, C: Array, out: Array, sums: Array | None = None) -> None:
    """The dots of rows of `R` with rows of `C` for every entry of every block, written to `out` (flat).

    R ``(rows, tokens)`` and C ``(columns, tokens)``, of the matrix M that the plan walks, may have any
    strides and are not checked; each has the dtype of `out`, or, beside float32, holds the bits of bfloat16
    (uint16). If `sums` (rows,) is given, it becomes ``sum_t R[:, t]``. Entries of `out`
    beyond the matrix are 0 times a number, which a NaN or infinity makes NaN.
    """
    sums = np.empty(0, out.dtype) if sums is None else sums
    n_tokens = R.shape[1]
    if n_tokens == 0 or (len(plan.slots) == 0 and sums.size == 0):
        out.fill(0)
        sums.fill(0)
        return
    packed = out if plan.is_packed else aligned_empty(plan.packed_items, out.dtype)
    packed.fill(0)
    add_products(plan, factor(R), factor(C), n_tokens, packed, zero_partials(plan, sums), sums)
    if not plan.is_packed:
        unpack_weights(packed, plan, out)


class Factor(NamedTuple):
    """A matrix by its address, and how many rows it has in each KC block; 0 if it must be packed."""

    at: Place
    like: Array
    strides: tuple[int, int]
    tiled: int


def factor(matrix: Array) -> Factor:
    """A matrix of any strides."""
    return Factor(address(matrix), NONE_OF[matrix.dtype], strides(matrix), 0)


def zero_partials(plan: PanelPlan, sums: Array) -> Array:
    """Where `add_products` keeps the sums of lanes from call to call, if there are to be any."""
    return aligned_zeros(_partial_items(plan) if sums.size else 0, sums.dtype)


def _partial_items(plan: PanelPlan) -> int:
    return (len(plan.indptr) - 1) * plan.panels_per_row * MR * 8


def add_products(
    plan: PanelPlan, R: Factor, C: Factor, n_tokens: int, packed: Array, partials: Array, sums: Array
) -> None:
    """Add what so many tokens give to the entries, in the order of the plan, and to the partials.

    `sums`, unless it is empty, becomes what is in the partials then.
    """
    cut = _cut(plan, n_tokens, packed.itemsize)
    work = scratch(len(cut.rectangles), cut.items, packed.dtype)
    cuts = np.empty(cut.places, np.int64)
    launch(
        _sample_blocks, len(cut.rectangles),
        *_arguments(plan, R, C, n_tokens, packed, partials, sums, cut, work, cuts),
    )  # fmt: skip


def add_sample(
    program: Program, plan: PanelPlan, R: Factor, C: Factor, n_tokens: int, out: Lent, sums: Lent | Array
) -> None:
    """Let a program do what `sample` does, for at least one token; empty sums are not made."""
    packed = out if plan.is_packed else program.lend((plan.packed_items,), out.dtype)
    program.clear(packed.at, packed.shape[0] * out.dtype.itemsize)
    cut = _cut(plan, n_tokens, out.dtype.itemsize)
    partials = program.zeros(_partial_items(plan), out.dtype) if sums.shape[0] else sums
    work = program.work((len(cut.rectangles), cut.items), out.dtype)
    cuts = program.work(cut.places, COUNT)
    program.add(
        _sample_blocks, len(cut.rectangles),
        *_arguments(plan, R, C, n_tokens, packed, partials, sums, cut, work, cuts),
    )  # fmt: skip
    if not plan.is_packed:
        add_unpack(program, packed, plan, out)


class _Cut(NamedTuple):
    """Rectangles, one for each worker, columns of a panel, work memory of each, and the shape of the cuts."""

    rectangles: Array
    panel_columns: int
    items: int
    places: tuple[int, int, int]


def _cut(plan: PanelPlan, n_tokens: int, itemsize: int) -> _Cut:
    lanes = VECTOR_BYTES // itemsize
    workers = worker_count(plan.work(-(-n_tokens // lanes) * lanes))
    rectangles, panel_blocks = cut_rectangles(plan, workers, _PANEL_COLUMNS)
    most_rows = int((rectangles[:, 1] - rectangles[:, 0]).max()) * plan.panels_per_row * MR
    panel_columns = panel_blocks * plan.width
    items = (panel_columns + most_rows) * (STRIDE_BYTES // itemsize)
    n_rows, n_panels = (rectangles[:, 1::2] - rectangles[:, ::2]).max(0).tolist()
    return _Cut(rectangles, panel_columns, items, (len(rectangles), n_rows, n_panels + 1))


def _arguments(
    plan: PanelPlan, R: Factor, C: Factor, n_tokens: int, packed: Any, partials: Any, sums: Any, cut: _Cut,
    work: Any, cuts: Any,
) -> tuple[Any, ...]:  # fmt: skip
    step = VECTOR_BYTES // packed.dtype.itemsize
    return (
        cut.rectangles, cut.panel_columns, plan.columns, plan.indptr, plan.height, plan.width, *plan.shape,
        *R, *C, n_tokens, step, work, cuts, packed, partials, sums,
    )  # fmt: skip
