"""Products of a matrix of blocks with tokens: by gathering along its micro-panels, or scattering along W^T's.

Loop order, from outside: (block rows, tile of tokens) in a dynamic schedule; groups of block rows;
micro-panels; their columns. To gather, the `MR` rows of sums stay in registers for the whole micro-panel, and
each column's row of tokens is loaded from the packed tile of X, once for four multiply-adds. To scatter, the
rows of operands stay in registers, and each column's row of sums is loaded, added to four times, and stored.
The tile lies in the second-level cache, the group's rows in the first. The weights come from the third
level, 16 + 2 bytes for four multiply-adds of a row, in the order in which they are needed: they are packed
so once a call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.bsr.panels import MR, NR, wide_row
from sparselab.kernels.cpu.bsr.plan import PanelPlan, add_pack, pack_weights
from sparselab.kernels.cpu.csr.skinny import Matrix, matrix
from sparselab.kernels.cpu.partition import cut_rows
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, new_counter, worker_count
from sparselab.kernels.cpu.runtime.memory import aligned_empty, scratch
from sparselab.kernels.cpu.runtime.program import COUNT, Lent, Program
from sparselab.kernels.cpu.runtime.target import VECTOR_BYTES
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.vectors import (
    fma,
    get,
    lanes_of,
    load,
    next_item,
    splat,
    store,
    view_at,
    zeros_register,
)
from sparselab.kernels.cpu.tiles import pack, unpack

#: Rows of the micro-panels whose tokens are packed or unpacked together.
_GROUP_ROWS = 64


@jit
def gather_panel(weights, at, columns, first, count, tile, bias, row, sums, sums_row, like):  # type: ignore[no-untyped-def]
    """Four rows of sums: the micro-panel's `count` columns, of which `columns` has the first at `first`."""
    width = lanes_of(like)
    s0 = splat(get(bias, row), like)
    s1 = splat(get(bias, row + 1), like)
    s2 = splat(get(bias, row + 2), like)
    s3 = splat(get(bias, row + 3), like)
    for k in range(first, first + count):
        x = load(tile, np.int64(get(columns, k)) * width, like)
        s0 = fma(get(weights, at), x, s0)
        s1 = fma(get(weights, at + 1), x, s1)
        s2 = fma(get(weights, at + 2), x, s2)
        s3 = fma(get(weights, at + 3), x, s3)
        at += MR
    store(sums, sums_row * width, s0)
    store(sums, (sums_row + 1) * width, s1)
    store(sums, (sums_row + 2) * width, s2)
    store(sums, (sums_row + 3) * width, s3)


@jit
def _scatter_panel(weights, at, columns, first, count, rows, row, tile, like):  # type: ignore[no-untyped-def]
    """Add four rows of tokens, times the weights, to the rows of the tile that the columns name."""
    width = lanes_of(like)
    x0 = load(rows, row * width, like)
    x1 = load(rows, (row + 1) * width, like)
    x2 = load(rows, (row + 2) * width, like)
    x3 = load(rows, (row + 3) * width, like)
    for k in range(first, first + count):
        place = np.int64(get(columns, k)) * width
        total = load(tile, place, like)
        total = fma(get(weights, at), x0, total)
        total = fma(get(weights, at + 1), x1, total)
        total = fma(get(weights, at + 2), x2, total)
        total = fma(get(weights, at + 3), x3, total)
        store(tile, place, total)
        at += MR


@jit
def _gather_tile(  # type: ignore[no-untyped-def]
    row0, row1, group, weights, columns, indptr, height, block_width, n_rows, n_columns, padded,
    x, x_strides, token0, n_tokens, bias, y, y_strides, memory, like,
):  # fmt: skip
    width = lanes_of(like)
    tile, sums = memory[: padded * width], memory[padded * width :]
    tokens = min(width, n_tokens - token0)
    pack(x, token0 * x_strides[1], x_strides[0], x_strides[1], n_columns, tokens, tile, width)
    tile[n_columns * width : padded * width] = 0
    panels = (height + MR - 1) // MR
    for r0 in range(row0, row1, group):
        r1 = min(r0 + group, row1)
        at = 0
        for r in range(r0, r1):
            first = indptr[r] * block_width
            count = (indptr[r + 1] - indptr[r]) * block_width
            for s in range(panels):
                gather_panel(
                    weights, (first * panels + s * count) * MR, columns, first, count, tile,
                    bias, (r * panels + s) * MR, sums, at, like,
                )  # fmt: skip
                at += MR
        first_row = r0 * height
        rows = min(r1 * height, n_rows) - first_row
        start = first_row * y_strides[0] + token0 * y_strides[1]
        unpack(sums, width, rows, tokens, y, start, y_strides[0], y_strides[1])


@jit
def _scatter_tile(  # type: ignore[no-untyped-def]
    group, weights, columns, indptr, height, block_width, n_rows, n_columns, padded,
    x, x_strides, token0, n_tokens, bias, y, y_strides, memory, like,
):  # fmt: skip
    width = lanes_of(like)
    tile, rows = memory[: padded * width], memory[padded * width :]
    tokens = min(width, n_tokens - token0)
    for j in range(n_columns):
        store(tile, j * width, splat(get(bias, j), like))
    tile[n_columns * width :] = 0
    panels = (height + MR - 1) // MR
    n = len(indptr) - 1
    for r0 in range(0, n, group):
        r1 = min(r0 + group, n)
        first_row = r0 * height
        present = min(r1 * height, n_rows) - first_row
        start = first_row * x_strides[0] + token0 * x_strides[1]
        pack(x, start, x_strides[0], x_strides[1], present, tokens, rows, width)
        rows[present * width : (r1 - r0) * panels * MR * width] = 0
        at = 0
        for r in range(r0, r1):
            first = indptr[r] * block_width
            count = (indptr[r + 1] - indptr[r]) * block_width
            for s in range(panels):
                place = (first * panels + s * count) * MR
                _scatter_panel(weights, place, columns, first, count, rows, at, tile, like)
                at += MR
    unpack(tile, width, n_columns, tokens, y, token0 * y_strides[1], y_strides[0], y_strides[1])


@jit
def _gather_tiles(  # type: ignore[no-untyped-def]
    worker, n_workers, counter, edges, narrow, group, weights, columns, indptr, height, block_width, n_rows,
    n_columns, padded, x_at, x_like, x_strides, n_tokens, bias, y_at, y_like, y_strides, work,
):  # fmt: skip
    if spread(worker, n_workers):
        return
    memory = work[worker]
    x, y = view_at(x_at, x_like), view_at(y_at, y_like)
    wide, thin = wide_row(memory), zeros_register(memory)
    width = lanes_of(thin) if narrow else lanes_of(wide)
    n_tiles = (n_tokens + width - 1) // width
    n_pairs = (len(edges) - 1) * n_tiles
    pair = next_item(counter)
    while pair < n_pairs:
        row0, row1 = edges[pair // n_tiles], edges[pair // n_tiles + 1]
        token0 = pair % n_tiles * width
        if narrow:
            _gather_tile(
                row0, row1, group, weights, columns, indptr, height, block_width, n_rows, n_columns, padded,
                x, x_strides, token0, n_tokens, bias, y, y_strides, memory, thin,
            )  # fmt: skip
        else:
            _gather_tile(
                row0, row1, group, weights, columns, indptr, height, block_width, n_rows, n_columns, padded,
                x, x_strides, token0, n_tokens, bias, y, y_strides, memory, wide,
            )  # fmt: skip
        pair = next_item(counter)


@jit
def _scatter_tiles(  # type: ignore[no-untyped-def]
    worker, n_workers, counter, group, weights, columns, indptr, height, block_width, n_rows, n_columns,
    padded, x_at, x_like, x_strides, n_tokens, bias, y_at, y_like, y_strides, work,
):  # fmt: skip
    if spread(worker, n_workers):
        return
    memory = work[worker]
    x, y = view_at(x_at, x_like), view_at(y_at, y_like)
    like = wide_row(memory)
    width = lanes_of(like)
    n_tiles = (n_tokens + width - 1) // width
    tile = next_item(counter)
    while tile < n_tiles:
        _scatter_tile(
            group, weights, columns, indptr, height, block_width, n_rows, n_columns, padded,
            x, x_strides, tile * width, n_tokens, bias, y, y_strides, memory, like,
        )  # fmt: skip
        tile = next_item(counter)


def multiply(
    values: Array, plan: PanelPlan, transposed: bool, X: Array, Y: Array, bias: Array | None = None
) -> None:
    """``Y = S X + b`` where S is W, or W^T if `transposed`, with the blocks `values` (flat).

    X ``(columns, tokens)`` and Y ``(rows, tokens)`` may have any strides and are not checked; Y is
    overwritten. Either has the dtype of the values, or, beside float32, holds the bits of bfloat16 (uint16).
    """
    if Y.size == 0:
        return
    offsets = np.zeros(Y.shape[0], values.dtype) if bias is None else bias
    packed = values
    if not plan.is_packed:
        packed = aligned_empty(plan.packed_items, values.dtype)
        pack_weights(values, plan, packed)
    if gathers(plan, transposed):
        _gather(packed, plan, X, Y, offsets)
    else:
        _scatter(packed, plan, X, Y, offsets)


def add_multiply(
    program: Program, values: Lent, plan: PanelPlan, transposed: bool, X: Matrix, Y: Matrix, bias: Lent
) -> None:
    """Let a program do what `multiply` does, for at least one output.

    The bias has an entry for each row of the micro-panels, if the product is gathered (`gathers`).
    """
    packed = add_pack(program, values, plan)
    if gathers(plan, transposed):
        cut = _cut_to_gather(plan, X[2][1], values.dtype)
        kernel, arguments = _gather_tiles, _to_gather
    else:
        cut = _cut_to_scatter(plan, X[2][1], values.dtype)
        kernel, arguments = _scatter_tiles, _to_scatter
    counter, work = program.zeros(1, COUNT), program.work((cut.n_workers, cut.items), values.dtype)
    program.add(kernel, cut.n_workers, counter, *arguments(packed, plan, X, Y, bias, cut, work))


def gathers(plan: PanelPlan, transposed: bool) -> bool:
    """Whether a product with W, or with W^T if `transposed`, is gathered along the micro-panels."""
    return plan.transposed == transposed


class _Cut(NamedTuple):
    """Workers, work memory of each, parts of the rows, block rows that are packed together, narrow tiles."""

    n_workers: int
    items: int
    edges: Array
    group: int
    narrow: bool


def _cut_to_gather(plan: PanelPlan, n_tokens: int, dtype: np.dtype[Any]) -> _Cut:
    lanes = VECTOR_BYTES // dtype.itemsize
    narrow = n_tokens <= lanes
    width = lanes if narrow else lanes * NR
    n_tiles = -(-n_tokens // width)
    # A tile takes as long however few tokens fill it.
    workers = worker_count(plan.work(n_tiles * width))
    # Each part of the rows packs the tokens again: no more of them than keep all workers busy.
    n_parts = 1
    while n_parts * n_tiles < 4 * workers and n_parts * n_tiles % workers:
        n_parts += 1
    edges = cut_rows(plan.indptr, n_parts)
    n_workers = min(workers, n_tiles * (len(edges) - 1))
    group, panel_rows = panel_group(plan)
    return _Cut(n_workers, (plan.n_columns + panel_rows) * width, edges, group, narrow)


def _cut_to_scatter(plan: PanelPlan, n_tokens: int, dtype: np.dtype[Any]) -> _Cut:
    width = VECTOR_BYTES // dtype.itemsize * NR
    n_tiles = -(-n_tokens // width)
    n_workers = min(worker_count(plan.work(n_tiles * width)), n_tiles)
    group, panel_rows = panel_group(plan)
    return _Cut(n_workers, (plan.n_columns + panel_rows) * width, plan.indptr, group, False)


def _gather(weights: Array, plan: PanelPlan, X: Array, Y: Array, bias: Array) -> None:
    cut = _cut_to_gather(plan, X.shape[1], weights.dtype)
    work, rows = scratch(cut.n_workers, cut.items, weights.dtype), by_micro_panel(bias, plan)
    arguments = _to_gather(weights, plan, matrix(X), matrix(Y), rows, cut, work)
    launch(_gather_tiles, cut.n_workers, new_counter(), *arguments)


def _scatter(weights: Array, plan: PanelPlan, X: Array, Y: Array, bias: Array) -> None:
    cut = _cut_to_scatter(plan, X.shape[1], weights.dtype)
    work = scratch(cut.n_workers, cut.items, weights.dtype)
    arguments = _to_scatter(weights, plan, matrix(X), matrix(Y), bias, cut, work)
    launch(_scatter_tiles, cut.n_workers, new_counter(), *arguments)


def _to_gather(
    weights: Any, plan: PanelPlan, X: Matrix, Y: Matrix, bias: Any, cut: _Cut, work: Any
) -> tuple[Any, ...]:
    """The arguments of `_gather_tiles` behind the counter."""
    return (
        cut.edges, int(cut.narrow), cut.group, weights, plan.columns, plan.indptr, plan.height, plan.width,
        *plan.shape, plan.n_columns, X[0], X[3], X[1], X[2][1], bias, Y[0], Y[3], Y[1], work,
    )  # fmt: skip


def _to_scatter(
    weights: Any, plan: PanelPlan, X: Matrix, Y: Matrix, bias: Any, cut: _Cut, work: Any
) -> tuple[Any, ...]:
    """The arguments of `_scatter_tiles` behind the counter."""
    return (
        cut.group, weights, plan.columns, plan.indptr, plan.height, plan.width, *plan.shape, plan.n_columns,
        X[0], X[3], X[1], X[2][1], bias, Y[0], Y[3], Y[1], work,
    )  # fmt: skip


def panel_group(plan: PanelPlan) -> tuple[int, int]:
    """Block rows that are packed or unpacked together, and their rows in panels."""
    group = max(1, _GROUP_ROWS // plan.height) if plan.height % MR == 0 else 1
    return group, group * plan.panels_per_row * MR


def by_micro_panel(bias: Array, plan: PanelPlan) -> Array:
    """The bias of each row of the panels, 0 for those that do not exist."""
    n = len(plan.indptr) - 1
    rows = np.zeros((n, plan.panels_per_row * MR), bias.dtype)
    whole = np.zeros(n * plan.height, bias.dtype)
    whole[: len(bias)] = bias
    rows[:, : plan.height] = whole.reshape(n, plan.height)
    return rows.reshape(-1)
