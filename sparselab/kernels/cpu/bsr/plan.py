"""How kernels walk a matrix of dense blocks: block by block, or in micro-panels.

A *micro-panel* is `MR` rows of a block row, which have the same columns: a loaded row of tokens serves as
many multiply-adds. A product gathers along the micro-panels of its own matrix, or scatters along those of the
transpose, so that blocks which are high or wide have micro-panels without missing rows either way.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from sparselab.kernels.arrays import Array, index_dtype
from sparselab.kernels.cpu.bsr.panels import MR
from sparselab.kernels.cpu.csr.plan import split_evenly
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.program import Lent, Program
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.transpose import transpose4
from sparselab.kernels.cpu.simd.vectors import get, load_unaligned, put, store_unaligned, zeros4
from sparselab.kernels.layouts.block_csr import BlockTopology

_MIN_PART = 1 << 14


class BlockPlan(NamedTuple):
    """The blocks of M, which is W or its transpose: block row r has ``indptr[r] : indptr[r + 1]``.

    Block k is slot ``slots[k]`` of W, and its first column ``columns[k]``.
    """

    transposed: bool
    shape: tuple[int, int]
    height: int
    width: int
    indptr: Array
    slots: Array
    columns: Array

    @property
    def n_columns(self) -> int:
        """Columns of M with those that its last blocks have beyond it."""
        return -(-self.shape[1] // self.width) * self.width


def block_plan_key(transposed: bool) -> tuple[str, str, bool]:
    """Key of the `BlockPlan` of W, or of W^T, among the plans of a topology."""
    return "cpu", "blocks", transposed


def block_plan(topology: BlockTopology, transposed: bool) -> BlockPlan:
    """The plan of products with W, or with W^T."""
    return topology.plan(block_plan_key(transposed), partial(_make_block_plan, transposed=transposed))


def _make_block_plan(W: BlockTopology, transposed: bool) -> BlockPlan:
    M, slots = W.transposed() if transposed else (W, np.arange(W.nnz))
    height, width = M.block_shape
    columns = M.blocks.indices.astype(np.int64) * width
    return BlockPlan(
        transposed, M.shape, height, width, M.blocks.rows.indptr, slots.astype(index_dtype(W.nnz)),
        columns.astype(index_dtype(M.shape[1] + width)),
    )  # fmt: skip


class PanelPlan(NamedTuple):
    """Order in which kernels walk the blocks of W, or of W^T if `transposed`.

    The matrix walked, M, has the shape `shape` and blocks of `height` rows and `width` columns. Its block
    row r is ``indptr[r] : indptr[r + 1]``; block k is slot ``slots[k]`` of W, and its columns, each of them
    named, are ``columns[k * width : (k + 1) * width]``.

    The weights are packed in this order in each call. They are not kept: values may be written to at any
    time, and nothing tells that they were.
    """

    transposed: bool
    shape: tuple[int, int]
    height: int
    width: int
    indptr: Array
    slots: Array
    columns: Array

    @property
    def panels_per_row(self) -> int:
        """Micro-panels of a block row; the last one may have rows that do not exist."""
        return -(-self.height // MR)

    @property
    def packed_items(self) -> int:
        """Weights as packed: `MR` for each column of each micro-panel."""
        return len(self.columns) * self.panels_per_row * MR

    @property
    def is_packed(self) -> bool:
        """Whether blocks have the order of packed weights already."""
        return not self.transposed and (self.height, self.width) == (MR, 1)

    @property
    def n_columns(self) -> int:
        """Columns of M with those that its last blocks have beyond it."""
        return -(-self.shape[1] // self.width) * self.width

    def work(self, n_tokens: int) -> int:
        """Multiply-adds of a product with so many tokens, and the items that it moves."""
        return (len(self.slots) * self.height * self.width + sum(self.shape)) * n_tokens


def plan_key(along_transpose: bool) -> tuple[str, str, bool]:
    """Key of the plan of W, or of W^T, among those of a topology."""
    return "cpu", "panels", along_transpose


def panel_plan(topology: BlockTopology, transposed: bool) -> PanelPlan:
    """The plan of products with W, also of the gradient by its values, or of those with W^T."""
    along = wants_transpose(topology.block_shape, transposed)
    return topology.plan(plan_key(along), partial(_make_panel_plan, transposed=along))


def _make_panel_plan(W: BlockTopology, transposed: bool) -> PanelPlan:
    M, slots = W.transposed() if transposed else (W, np.arange(W.nnz))
    height, width = M.block_shape
    n_columns = -(-M.shape[1] // width) * width
    columns = (M.blocks.indices.astype(np.int64)[:, None] * width + np.arange(width)).reshape(-1)
    return PanelPlan(
        transposed, M.shape, height, width, M.blocks.rows.indptr, slots.astype(index_dtype(W.nnz)),
        columns.astype(index_dtype(n_columns)),
    )  # fmt: skip


def wants_transpose(block_shape: tuple[int, int], transposed: bool) -> bool:
    """Whether products with W, or with W^T if `transposed`, walk the micro-panels of W^T.

    To gather along those of its own matrix is faster for a product; but where its blocks have fewer than `MR`
    rows, and more in the transpose, it scatters along those.
    """
    height, width = block_shape[::-1] if transposed else block_shape
    gathers = height >= MR or height >= width
    return transposed == gathers


def cut_rectangles(plan: BlockPlan | PanelPlan, n_workers: int, most_columns: int) -> tuple[Array, int]:
    """Rectangles ``(block row 0, block row 1, panel 0, panel 1)``, one row each, and blocks across a panel.

    The parts of a gradient that workers compute: the longer side of the matrix is cut first. A panel has at
    most so many columns, if those of a block are no more.
    """
    rows, blocks = len(plan.indptr) - 1, max(plan.n_columns // plan.width, 1)
    if plan.shape[0] >= plan.shape[1]:
        row_parts = min(n_workers, rows)
        column_parts = min(-(-n_workers // row_parts), blocks)
    else:
        column_parts = min(n_workers, blocks)
        row_parts = min(-(-n_workers // column_parts), rows)
    wanted = max(-(-plan.n_columns // (column_parts * most_columns)), 1) * column_parts
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


@jit
def _move_panel(pack, values, first, row_step, column_step, width, packed, place):  # type: ignore[no-untyped-def]
    """Move columns of `MR` rows of a block by vectors, and return how many of them."""
    whole = 0
    if row_step == 1:
        whole, like = width, zeros4(packed)
        for j in range(width):
            inside = first + j * column_step
            if pack:
                store_unaligned(packed, place + j * MR, load_unaligned(values, inside, like))
            else:
                store_unaligned(values, inside, load_unaligned(packed, place + j * MR, like))
    elif column_step == 1:
        whole = width // MR * MR
        for j in range(0, whole, MR):
            if pack:
                transpose4(values, first + j, row_step, packed, place + j * MR, MR)
            else:
                transpose4(packed, place + j * MR, MR, values, first + j, row_step)
    return whole


@jit
def _move_squares(pack, values, slots, first, last, is_turned, packed):  # type: ignore[no-untyped-def]
    """Move the blocks first : last, which are MR x MR: one micro-panel each, in the order of its columns."""
    like, size = zeros4(packed), MR * MR
    for k in range(first, last):
        block, at = np.int64(get(slots, k)) * size, k * size
        if is_turned:
            for j in range(0, size, MR):
                if pack:
                    store_unaligned(packed, at + j, load_unaligned(values, block + j, like))
                else:
                    store_unaligned(values, block + j, load_unaligned(packed, at + j, like))
        elif pack:
            transpose4(values, block, MR, packed, at, MR)
        else:
            transpose4(packed, at, MR, values, block, MR)


@jit
def _move_blocks(  # type: ignore[no-untyped-def]
    worker, n_workers, pack, values, indptr, slots, height, width, row_step, column_step, packed
):
    """Copy the blocks of some block rows into the order of the micro-panels, or back."""
    if spread(worker, n_workers):
        return
    panels = (height + MR - 1) // MR
    n = len(indptr) - 1
    zero = packed.dtype.type(0)
    first_row, last_row = worker * n // n_workers, (worker + 1) * n // n_workers
    if height == MR and width == MR:
        _move_squares(pack, values, slots, indptr[first_row], indptr[last_row], row_step == 1, packed)
        return
    for r in range(first_row, last_row):
        count = (indptr[r + 1] - indptr[r]) * width * MR
        for k in range(indptr[r], indptr[r + 1]):
            block = np.int64(slots[k]) * height * width
            at = (indptr[r] * (panels - 1) + k) * width * MR
            for row in range(0, height, MR):
                rows = min(MR, height - row)
                done = 0
                if rows == MR:
                    done = _move_panel(
                        pack, values, block + row * row_step, row_step, column_step, width, packed, at
                    )
                for j in range(done, width):
                    inside = block + row * row_step + j * column_step
                    place = at + j * MR
                    if not pack:
                        for i in range(rows):
                            put(values, inside + i * row_step, get(packed, place + i))
                    elif rows == MR:
                        for i in range(MR):
                            put(packed, place + i, get(values, inside + i * row_step))
                    else:
                        for i in range(MR):
                            put(packed, place + i, get(values, inside + i * row_step) if i < rows else zero)
                at += count


def pack_weights(values: Array, plan: PanelPlan, packed: Array) -> None:
    """Bring the blocks (flat) into the order of the plan, with zeros in rows that they do not have."""
    _move(True, values, plan, packed)


def unpack_weights(packed: Array, plan: PanelPlan, values: Array) -> None:
    """Bring entries in the order of the plan back into blocks (flat)."""
    _move(False, values, plan, packed)


@jit
def _clear(worker, n_workers, places, entries):  # type: ignore[no-untyped-def]
    """Set some entries to 0."""
    if spread(worker, n_workers):
        return
    for k in range(len(places)):
        put(entries, get(places, k), entries.dtype.type(0))


def add_clear_outside(program: Program, topology: BlockTopology, entries: Lent) -> None:
    """Let a program set entries of blocks (flat) to 0 where blocks reach beyond the matrix."""
    places = topology.plan(("cpu", "outside"), _outside_places)
    if len(places):
        program.add(_clear, 1, places, entries)


def _outside_places(topology: BlockTopology) -> Array:
    slots, outside = topology.outside()
    places = np.flatnonzero(outside).astype(np.int64)
    size = topology.block_shape[0] * topology.block_shape[1]
    return slots.astype(np.int64)[places // size] * size + places % size


def add_pack(program: Program, weights: Lent, plan: PanelPlan) -> Lent:
    """Let a program do what `pack_weights` does, if that is needed; returns where the weights are then."""
    if plan.is_packed:
        return weights
    packed = program.lend((plan.packed_items,), weights.dtype)
    _add_move(program, True, weights, plan, packed)
    return packed


def add_unpack(program: Program, packed: Lent, plan: PanelPlan, entries: Lent) -> None:
    """Let a program do what `unpack_weights` does."""
    _add_move(program, False, entries, plan, packed)


def _add_move(program: Program, pack: bool, values: Lent, plan: PanelPlan, packed: Lent) -> None:
    program.add(_move_blocks, *_arguments(pack, values, plan, packed))


def _move(pack: bool, values: Array, plan: PanelPlan, packed: Array) -> None:
    launch(_move_blocks, *_arguments(pack, values, plan, packed))


def _arguments(pack: bool, values: Any, plan: PanelPlan, packed: Any) -> tuple[Any, ...]:
    n_workers = max(1, min(worker_count(), values.shape[0] // _MIN_PART))
    steps = (1, plan.height) if plan.transposed else (plan.width, 1)
    return n_workers, pack, values, plan.indptr, plan.slots, plan.height, plan.width, *steps, packed
