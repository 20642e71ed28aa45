"""Dense x dense sampled at the connections: ``dW[i, j] = sum_t DY[i, t] X[j, t]`` for live (i, j).

Loop order, from outside: workers, each with rectangles (rows x columns); tiles of tokens; blocks of
columns; segments. Per tile a rectangle packs its rows of DY and, block by block, its columns of X. In
registers: one tile row of DY, and up to `DOTS` dots at a time, each a tile row of X loaded and multiplied;
their lanes are summed together by a tree of shuffles. Of a tile with few tokens the first half is multiplied
alone. The sums over tiles stay in `out`, which has one writer per slot and one order of summation whatever
the number of threads.

The sums of DY over tokens, the gradient of a bias, are made from the packed rows, which saves a pass over DY.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparselab.kernels.arrays import NONE_OF, Array, address, index_dtype
from sparselab.kernels.cpu.csr.plan import Segments, gradient_rectangles
from sparselab.kernels.cpu.csr.skinny import Matrix, matrix
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.memory import aligned_zeros, scratch
from sparselab.kernels.cpu.runtime.program import Lent, Place, Program
from sparselab.kernels.cpu.runtime.target import TILE_BYTES, VECTOR_BYTES
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.dots import DOTS, SOME_DOTS, add_dots, add_last_dots, some_dots
from sparselab.kernels.cpu.simd.vectors import get, put, tile_width, view_at
from sparselab.kernels.cpu.tiles import add_tokens, pack

#: Items of scratch, on a cache line of their own, for the dots of an incomplete group.
_REST = 16


@jit
def _add_segments(indices, row, start, length, p, q, dy, row0, x, column0, is_half, rest, out):  # type: ignore[no-untyped-def]
    """Add the dots of segments p : q over one tile to `out`."""
    width = tile_width(x)
    group = min(DOTS, VECTOR_BYTES // x.itemsize)
    small = min(SOME_DOTS, VECTOR_BYTES // x.itemsize)
    for s in range(p, q):
        at = (np.int64(get(row, s)) - row0) * width
        slot = np.int64(get(start, s))
        end = slot + np.int64(get(length, s))
        while slot + group <= end:
            add_dots(dy, at, x, indices, slot, slot, column0, is_half, out)
            slot += group
        if slot < end and get(length, s) >= group:
            # The segment's last group: dots that were added before are computed again and left out.
            add_last_dots(dy, at, x, indices, end - group, slot, column0, is_half, out)
            continue
        while slot < end:
            some_dots(dy, at, x, indices, slot, end - 1, column0, is_half, rest)
            for k in range(min(small, end - slot)):
                out[slot + k] += get(rest, k)
            slot += small


@jit
def _sample_rectangles(  # type: ignore[no-untyped-def]
    worker, n_workers, indices, plan, rectangles, dy_at, dy_like, dy_strides, dy_tiled,
    x_at, x_like, x_strides, x_tiled, n_columns, n_tokens, work, out_at, partial, sums_at,
):  # fmt: skip
    """Compute the worker's rectangles, one after the other; those that begin a row also write its sum.

    A factor that lies in tiles already has `tiled` rows in each, else 0.
    """
    if spread(worker, n_workers):
        return
    memory = work[worker]
    width = tile_width(memory)
    rest = memory[:_REST]
    x_tile = memory[_REST : _REST + plan.block_columns * width]
    dy_tile = memory[_REST + plan.block_columns * width :]
    if x_tiled > 0:
        x_tile = view_at(x_at, memory)
    if dy_tiled > 0:
        dy_tile = view_at(dy_at, memory)
    x, dy = view_at(x_at, x_like), view_at(dy_at, dy_like)
    out, sums = view_at(out_at, memory), view_at(sums_at, memory)
    n = len(rectangles)
    for r in range(worker * n // n_workers, (worker + 1) * n // n_workers):
        chunk0, chunk1 = rectangles[r, 0], rectangles[r, 1]
        row0, row1 = plan.chunk_rows[chunk0], plan.chunk_rows[chunk1]
        wants_sums = sums_at != 0 and rectangles[r, 2] == 0
        for token0 in range(0, n_tokens, width):
            tokens = min(width, n_tokens - token0)
            row_origin = -(token0 // width) * dy_tiled
            if dy_tiled == 0:
                row_origin = row0
                first = row0 * dy_strides[0] + token0 * dy_strides[1]
                pack(dy, first, dy_strides[0], dy_strides[1], row1 - row0, tokens, dy_tile, width)
            if wants_sums:
                add_tokens(dy_tile, row0 - row_origin, row1 - row0, width, width, partial, row0)
            for b in range(rectangles[r, 2], rectangles[r, 3]):
                column0 = b * plan.block_columns
                columns = min(plan.block_columns, n_columns - column0)
                origin = -(token0 // width) * x_tiled
                if x_tiled == 0:
                    origin = column0
                    first = column0 * x_strides[0] + token0 * x_strides[1]
                    pack(x, first, x_strides[0], x_strides[1], columns, tokens, x_tile, width)
                for c in range(chunk0, chunk1):
                    p, q = plan.ptr[c, b], plan.ptr[c, b + 1]
                    _add_segments(
                        indices, plan.row, plan.start, plan.length, p, q,
                        dy_tile, row_origin, x_tile, origin, 2 * tokens <= width, rest, out,
                    )  # fmt: skip
        if wants_sums:
            for i in range(row0, row1):
                put(sums, i, partial[i * 8 : (i + 1) * 8].sum())


class GradientCut(NamedTuple):
    """How a gradient over so many tokens is cut, which depends on nothing else that a call brings.

    Attributes
    ----------
    rectangles : int64 array
        From `gradient_rectangles`.
    n_workers : int
        Workers.
    items : int
        Scratch of each worker.
    """

    rectangles: Array
    n_workers: int
    items: int


def cut_gradient(plan: Segments, shape: tuple[int, int], n_tokens: int, itemsize: int) -> GradientCut:
    """The cut of the gradient of a matrix of this shape over at least one token, for the threads of now."""
    width = TILE_BYTES // itemsize
    n_tiles = -(-n_tokens // width)
    workers = worker_count((plan.n_connections + sum(shape)) * n_tiles * width)
    rectangles = gradient_rectangles(plan, n_tiles, workers, itemsize + index_dtype(shape[1]).itemsize)
    most_rows = int((plan.chunk_rows[rectangles[:, 1]] - plan.chunk_rows[rectangles[:, 0]]).max())
    items = _REST + plan.block_columns * width + most_rows * width
    return GradientCut(rectangles, min(workers, len(rectangles)), items)


def sample(
    indices: Array, plan: Segments, DY: Array, X: Array, out: Array, sums: Array | None = None
) -> None:
    """``out[slot] = DY[i] . X[j]`` for the connection (i, j) of every live slot, 0 in spare slots.

    DY ``(rows, tokens)`` and X ``(columns, tokens)`` may have any strides and are not checked. If `sums`
    (rows,) is given, it becomes ``sum_t DY[:, t]``.
    """
    out.fill(0)
    if X.shape[1] == 0 or (plan.n_connections == 0 and sums is None):
        if sums is not None:
            sums.fill(0)
        return
    cut = cut_gradient(plan, (len(DY), len(X)), X.shape[1], out.itemsize)
    sums_at = 0 if sums is None else address(sums)
    sample_cut(indices, plan, matrix(DY), matrix(X), address(out), sums_at, out.dtype, cut)


def sample_cut(
    indices: Array, plan: Segments, DY: Matrix, X: Matrix, out_at: int, sums_at: int, dtype: np.dtype[Any],
    cut: GradientCut,
) -> None:  # fmt: skip
    """Add to zeros as `sample` does, for at least one token, with all matrices by their addresses.

    All are of `dtype`; or DY and X of bfloat16, by its bits in uint16, where that is float32. The address of
    the sums is 0 if there are to be none.
    """
    partials = aligned_zeros(DY[2][0] * 8 if sums_at else 0, dtype)
    add_products(indices, plan, DY, X, out_at, partials, sums_at, cut)


def add_products(
    indices: Array, plan: Segments, DY: Matrix, X: Matrix, out_at: int, partials: Array, sums_at: int,
    cut: GradientCut, dy_tiled: int = 0, x_tiled: int = 0,
) -> None:  # fmt: skip
    """Add what some tokens give to the entries and to the partials, of which the sums are made anew.

    The partials (8 * rows,), on a cache line, keep the sums of lanes from call to call; they are empty if
    there are to be none. A factor that lies in tiles already, and begins with one, has `tiled` rows in each.
    """
    work = scratch(cut.n_workers, cut.items, partials.dtype)
    launch(
        _sample_rectangles, cut.n_workers,
        *_of_rectangles(indices, plan, DY, X, out_at, partials, sums_at, cut, work, (dy_tiled, x_tiled)),
    )  # fmt: skip


def add_sample(
    program: Program, indices: Array, plan: Segments, DY: Matrix, X: Matrix, out: Lent, sums_at: Place,
    cut: GradientCut,
) -> None:  # fmt: skip
    """Let a program set the entries to 0 and do what `sample_cut` does."""
    dtype, (n_items,) = out.dtype, out.shape
    program.clear(out.at, n_items * dtype.itemsize)
    partials = program.zeros(DY[2][0] * 8, dtype) if sums_at else NONE_OF[dtype]
    work = program.work((cut.n_workers, cut.items), dtype)
    program.add(
        _sample_rectangles, cut.n_workers,
        *_of_rectangles(indices, plan, DY, X, out.at, partials, sums_at, cut, work),
    )  # fmt: skip


def _of_rectangles(
    indices: Array, plan: Segments, DY: Matrix, X: Matrix, out_at: Place, partials: Any, sums_at: Place,
    cut: GradientCut, work: Any, tiled: tuple[int, int] = (0, 0),
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of `_sample_rectangles` behind the workers."""
    return (
        indices, plan, cut.rectangles, DY[0], DY[3], DY[1], tiled[0], X[0], X[3], X[1], tiled[1], X[2][0],
        X[2][1], work, out_at, partials, sums_at,
    )  # fmt: skip
