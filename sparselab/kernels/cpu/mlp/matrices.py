"""Matrices as products of whole tiles walk them: groups of rows, whose sums stay in a fast cache.

A product takes a tile with all columns of the matrix, which are the rows of another one or packed tokens, and
makes the rows of one group. So a product can go on where the one before has left its result, in the
second-level cache, and what is done to the sums of a group is done while they are in the first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import extending

from sparselab.kernels.arrays import Array, address
from sparselab.kernels.cpu.bsr.panels import MR, NR, wide_row
from sparselab.kernels.cpu.bsr.plan import PanelPlan, pack_weights, panel_plan
from sparselab.kernels.cpu.bsr.spmm import by_micro_panel, gather_panel, panel_group
from sparselab.kernels.cpu.csr.order import into_order
from sparselab.kernels.cpu.csr.plan import product_plan, transpose_plan
from sparselab.kernels.cpu.csr.spmm import add_segments
from sparselab.kernels.cpu.runtime.target import TILE_BYTES, VECTOR_BYTES
from sparselab.kernels.cpu.simd.vectors import zeros_tile
from sparselab.kernels.layouts.block_csr import BlockTopology
from sparselab.kernels.layouts.padded_csr import RowTopology

#: Numba's types do not export it.
_overload: Any = extending.overload  # type: ignore[attr-defined]

#: Rows that a product may write behind those of its group: of a micro-panel that has fewer.
SPARE_ROWS = MR


class PanelMatrix(NamedTuple):
    """A matrix of blocks in micro-panels; group g is the rows ``rows[g] : rows[g + 1]``.

    `columns` are those that the matrix has, `padded` those that its blocks have.
    """

    weights: Array
    bias: Array
    places: Array
    indptr: Array
    height: int
    block_width: int
    group: int
    rows: Array
    columns: int
    padded: int


class SegmentMatrix(NamedTuple):
    """A matrix of single connections in segments; group g is the rows ``rows[g] : rows[g + 1]``."""

    weights: Array
    bias: Array
    indices: Array
    ptr: Array
    row: Array
    start: Array
    length: Array
    chunks: Array
    rows: Array
    columns: int
    padded: int


Matrix = PanelMatrix | SegmentMatrix


def tokens_of_tile(is_blocks: bool) -> int:
    """Tokens of a tile, in float32."""
    return VECTOR_BYTES // 4 * NR if is_blocks else TILE_BYTES // 4


def tile_width(matrix: Matrix) -> int:
    """Tokens of a tile that this is multiplied with, in float32."""
    return tokens_of_tile(isinstance(matrix, PanelMatrix))


def most_rows(matrix: Matrix) -> int:
    """Rows of the largest group, with those that may be written behind it."""
    if isinstance(matrix, PanelMatrix):
        return matrix.group * matrix.height + SPARE_ROWS  # also of a block that reaches beyond the matrix
    return int(np.diff(matrix.rows).max(initial=0)) + SPARE_ROWS


def row_of(matrix: Any, array: Any) -> Any:
    """A row of the tiles that a matrix is multiplied with, of zeros."""
    raise NotImplementedError("only in compiled code")


def multiply_rows(matrix: Any, g: Any, tile: Any, sums: Any, place: Any) -> Any:
    """Write the product's rows of group `g` to the rows of `sums` from `place` on."""
    raise NotImplementedError("only in compiled code")


@_overload(row_of)
def _row_of(matrix, array):  # type: ignore[no-untyped-def]
    if matrix.instance_class is PanelMatrix:
        return lambda matrix, array: wide_row(array)
    return lambda matrix, array: zeros_tile(array)


@_overload(multiply_rows)
def _multiply_rows(matrix, g, tile, sums, place):  # type: ignore[no-untyped-def]
    return _multiply_panels if matrix.instance_class is PanelMatrix else _multiply_segments


def _multiply_panels(matrix, g, tile, sums, place):  # type: ignore[no-untyped-def]
    like = wide_row(tile)
    height, panels = matrix.height, (matrix.height + MR - 1) // MR
    r0 = g * matrix.group
    for r in range(r0, min(r0 + matrix.group, len(matrix.indptr) - 1)):
        first = matrix.indptr[r] * matrix.block_width
        count = (matrix.indptr[r + 1] - matrix.indptr[r]) * matrix.block_width
        for s in range(panels):
            # Rows that the last panel of a block does not have are written by the next block once more.
            gather_panel(
                matrix.weights, (first * panels + s * count) * MR, matrix.places, first, count, tile,
                matrix.bias, (r * panels + s) * MR, sums, place + (r - r0) * height + s * MR, like,
            )  # fmt: skip


def _multiply_segments(matrix, g, tile, sums, place):  # type: ignore[no-untyped-def]
    row0 = matrix.rows[g] - place
    for b in range(matrix.ptr.shape[1] - 1):
        for c in range(matrix.chunks[g], matrix.chunks[g + 1]):
            add_segments(
                matrix.weights, matrix.indices, matrix.row, matrix.start, matrix.length, matrix.ptr[c, b],
                matrix.ptr[c, b + 1], tile, 0, sums, row0, matrix.bias, b == 0,
            )  # fmt: skip


def ordered_items(topology: Any, transposed: bool) -> int:
    """How many items `matrix_of` needs, at most, for weights in the order of a plan."""
    if isinstance(topology, BlockTopology):
        return panel_plan(topology, transposed).packed_items
    return int(topology.capacity)


def matrix_of(
    topology: Any, transposed: bool, values: Array, memory: Array, bias: Array | None = None
) -> Matrix:
    """W, or W^T if `transposed`, with the weights `values` (flat) and a bias, to multiply tiles with.

    It is as long of use as `memory`, of `ordered_items` on a cache line, where weights are put in order.
    """
    rows = topology.shape[int(transposed)]
    offsets = np.zeros(rows, values.dtype) if bias is None else bias
    if isinstance(topology, BlockTopology):
        return _of_blocks(panel_plan(topology, transposed), values, memory, offsets)
    return _of_rows(topology, transposed, values, memory, offsets)


def _of_blocks(plan: PanelPlan, values: Array, memory: Array, bias: Array) -> PanelMatrix:
    packed = values
    if not plan.is_packed:
        packed = memory[: plan.packed_items]
        pack_weights(values, plan, packed)
    group, _ = panel_group(plan)
    n = len(plan.indptr) - 1
    rows = np.minimum(np.append(np.arange(0, n, group), n) * plan.height, plan.shape[0])
    return PanelMatrix(
        packed, by_micro_panel(bias, plan), plan.columns, plan.indptr, plan.height, plan.width, group, rows,
        plan.shape[1], plan.n_columns,
    )  # fmt: skip


def _of_rows(
    topology: RowTopology, transposed: bool, values: Array, memory: Array, bias: Array
) -> SegmentMatrix:
    if transposed:
        plan = transpose_plan(topology)
        weights, indices, segments = memory[: len(plan.indices)], plan.indices, plan.segments
        into_order(address(values), values, topology.rows, plan.order, values.dtype, weights)
    else:
        weights, indices, segments = values, topology.rows.indices, product_plan(topology)
    columns = topology.shape[int(not transposed)]
    chunks = np.arange(len(segments.chunk_rows))
    return SegmentMatrix(
        weights, bias, indices, segments.ptr, segments.row, segments.start, segments.length, chunks,
        segments.chunk_rows[chunks], columns, columns,
    )  # fmt: skip
