"""Gradient of wide blocks, ``dW[i, j] = sum_t DY[i, t] X[j, t]``, with lanes along the columns of a block.

A row of a block is one or two vectors of sums; a token adds its inputs, times one number of its output's
gradient, to each of them. So no lanes are added up, and tokens need not be turned: they are copied block by
block, to where those of a block lie together.

Loop order, from outside: workers, each with rectangles (block rows x panels of columns); runs of `_RUN`
tokens; panels; block rows; blocks; groups of their rows. In registers: the sums of a group and a run, which
are added to the gradient at its end. In first-level cache: the block row's DY of the run. In second-level
cache: the panel's X. Per token and group: two vectors of X and the group's numbers of DY loaded for as many
multiply-adds of a vector as there are sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparselab.kernels.arrays import Array, address
from sparselab.kernels.cpu.bsr.plan import BlockPlan, cut_rectangles
from sparselab.kernels.cpu.csr.skinny import Matrix, matrix
from sparselab.kernels.cpu.partition import first_not_below
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.memory import scratch
from sparselab.kernels.cpu.runtime.program import Lent, Place, Program
from sparselab.kernels.cpu.runtime.target import TARGET, VECTOR_BYTES
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.bfloat16 import load_numbers
from sparselab.kernels.cpu.simd.vectors import (
    add,
    fma,
    get,
    lanes_of,
    load,
    load_unaligned,
    put,
    store,
    store_unaligned,
    view_at,
    weight,
    zero_registers,
    zeros_register,
)

#: Tokens of a run.
_RUN = 128

#: Rows of W whose DY is copied together.
_STRIP = 128

#: Rows of a block whose sums stay in registers: of two vectors each where there are 32 registers, else one.
_ROWS = 8
_row = zero_registers(1 if VECTOR_BYTES == 32 else 2)


def serves(block_shape: tuple[int, int], itemsize: int) -> bool:
    """Whether rows of blocks are whole vectors, and are whole groups."""
    height, width = block_shape
    return height % _ROWS == 0 and width * itemsize % VECTOR_BYTES == 0


@jit
def _add_group(dy, a, height, x, b, width, n_tokens, step, out, place, is_first, like):  # type: ignore[no-untyped-def]
    """Add what a run of tokens gives to `_ROWS` rows of a block, in the columns of `like`.

    The step from token to token is an argument, because LLVM would unroll a loop whose length it can tell.
    """
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = like
    t = 0
    while t < n_tokens:
        v = load(x, b, like)
        s0 = fma(get(dy, a), v, s0)
        s1 = fma(get(dy, a + 1), v, s1)
        s2 = fma(get(dy, a + 2), v, s2)
        s3 = fma(get(dy, a + 3), v, s3)
        s4 = fma(get(dy, a + 4), v, s4)
        s5 = fma(get(dy, a + 5), v, s5)
        s6 = fma(get(dy, a + 6), v, s6)
        s7 = fma(get(dy, a + 7), v, s7)
        a += height
        b += width
        t += step
    _put(out, place, s0, is_first)
    _put(out, place + width, s1, is_first)
    _put(out, place + 2 * width, s2, is_first)
    _put(out, place + 3 * width, s3, is_first)
    _put(out, place + 4 * width, s4, is_first)
    _put(out, place + 5 * width, s5, is_first)
    _put(out, place + 6 * width, s6, is_first)
    _put(out, place + 7 * width, s7, is_first)


@jit
def _put(out, place, total, is_first):  # type: ignore[no-untyped-def]
    if is_first:
        store_unaligned(out, place, total)
    else:
        store_unaligned(out, place, add(load_unaligned(out, place, total), total))


@jit
def _copy_blocks(source, start, step, n_tokens, first, last, size, n_features, copy, like):  # type: ignore[no-untyped-def]
    """Copy the features first : last of each token so that those of `size` lie together, for all tokens.

    Features that do not exist become zeros. Tokens are read along their features, for each lies in memory
    pages of its own.
    """
    lanes = lanes_of(like)
    complete = first
    if size % lanes == 0:
        complete += (min(last, n_features) - first) // size * size
    for t in range(n_tokens):
        token, place = start + t * step, t * size
        for c in range(first, complete, size):
            for j in range(0, size, lanes):
                store(copy, place + j, load_numbers(source, token + c + j, like))
            place += _RUN * size
        for c in range(complete, last, size):
            present = min(size, n_features - c)
            for j in range(present):
                put(copy, place + j, weight(source, token + c + j))
            copy[place + present : place + size] = 0
            place += _RUN * size


@jit
def _add_features(tokens, first, n_tokens, height, sums, row, n_rows, like):  # type: ignore[no-untyped-def]
    """Add the tokens' features of a block row to `sums`, four tokens at a time."""
    lanes, present = lanes_of(like), min(height, n_rows - row)
    whole, fours = present // lanes * lanes, n_tokens // 4 * 4
    for i in range(0, whole, lanes):
        a = b = c = d = like
        for t in range(0, fours, 4):
            at = first + t * height + i
            a = add(a, load_unaligned(tokens, at, like))
            b = add(b, load_unaligned(tokens, at + height, like))
            c = add(c, load_unaligned(tokens, at + 2 * height, like))
            d = add(d, load_unaligned(tokens, at + 3 * height, like))
        for t in range(fours, n_tokens):
            a = add(a, load_unaligned(tokens, first + t * height + i, like))
        total = add(add(a, b), add(c, d))
        store_unaligned(sums, row + i, add(load_unaligned(sums, row + i, like), total))
    for i in range(whole, present):
        for t in range(n_tokens):
            put(sums, row + i, get(sums, row + i) + get(tokens, first + t * height + i))


@jit
def _block(dy, first, height, x, at, width, n_tokens, step, out, place, is_first, wide, thin):  # type: ignore[no-untyped-def]
    """Add a run of tokens to a whole block."""
    columns = width // lanes_of(wide) * lanes_of(wide)
    for i in range(0, height, _ROWS):
        row = place + i * width
        for j in range(0, columns, lanes_of(wide)):
            _add_group(dy, first + i, height, x, at + j, width, n_tokens, step, out, row + j, is_first, wide)
        for j in range(columns, width, lanes_of(thin)):
            _add_group(dy, first + i, height, x, at + j, width, n_tokens, step, out, row + j, is_first, thin)


@jit
def _sample(  # type: ignore[no-untyped-def]
    worker, n_workers, rectangles, panel_columns, group, indptr, columns, height, width, n_rows, n_columns,
    dy_at, dy_like, dy_step, x_at, x_like, x_step, n_tokens, step, work, out_at, sums_at,
):  # fmt: skip
    """Compute the worker's rectangles; those that begin a row also add up its DY."""
    if spread(worker, n_workers):
        return
    memory = work[worker]
    dy_run, x_run = memory[: _RUN * group * height], memory[_RUN * group * height :]
    dy, x = view_at(dy_at, dy_like), view_at(x_at, x_like)
    out, sums = view_at(out_at, memory), view_at(sums_at, memory)
    wide, thin = _row(memory), zeros_register(memory)
    n = len(rectangles)
    for i in range(worker * n // n_workers, (worker + 1) * n // n_workers):
        row0, row1, panel0, panel1 = rectangles[i, 0], rectangles[i, 1], rectangles[i, 2], rectangles[i, 3]
        for token0 in range(0, n_tokens, _RUN):
            tokens = min(_RUN, n_tokens - token0)
            for p in range(panel0, panel1):
                column0, column1 = p * panel_columns, min((p + 1) * panel_columns, n_columns)
                _copy_blocks(
                    x, token0 * x_step, x_step, tokens, column0, column1, width, n_columns, x_run, thin
                )
                for r0 in range(row0, row1, group):
                    r1 = min(r0 + group, row1)
                    _copy_blocks(
                        dy, token0 * dy_step, dy_step, tokens, r0 * height, r1 * height, height, n_rows,
                        dy_run, thin,
                    )  # fmt: skip
                    for r in range(r0, r1):
                        first = (r - r0) * height * _RUN
                        if sums_at != 0 and p == 0:
                            _add_features(dy_run, first, tokens, height, sums, r * height, n_rows, thin)
                        k = indptr[r] + first_not_below(columns[indptr[r] : indptr[r + 1]], column0)
                        while k < indptr[r + 1] and np.int64(get(columns, k)) < column1:
                            at = (np.int64(get(columns, k)) - column0) * _RUN
                            place = k * height * width
                            _block(
                                dy_run, first, height, x_run, at, width, tokens, step, out, place,
                                token0 == 0, wide, thin,
                            )  # fmt: skip
                            k += 1


def sample_direct(plan: BlockPlan, DY: Array, X: Array, out: Array, sums: Array | None = None) -> None:
    """The gradient of every entry of every block of W, written to `out` (flat).

    DY ``(rows, tokens)`` and X ``(columns, tokens)`` are each of the dtype of `out`, or, beside float32, hold
    the bits of bfloat16 (uint16); the features of a token lie together. They are not checked, nor is whether
    the blocks suit (`serves`). If `sums` (rows,) is given, it becomes ``sum_t DY[:, t]``. Entries beyond the
    matrix are 0 times a number, which a NaN or infinity makes NaN.
    """
    n_tokens = X.shape[1]
    if sums is not None:
        sums.fill(0)
    if n_tokens == 0 or len(plan.indptr) == 1:
        out.fill(0)
        return
    cut = _cut(plan, n_tokens, len(out), out.itemsize)
    work = scratch(len(cut.rectangles), cut.items, out.dtype)
    sums_at = 0 if sums is None else address(sums)
    launch(
        _sample,
        len(cut.rectangles),
        *_arguments(plan, matrix(DY), matrix(X), address(out), sums_at, cut, work),
    )


def add_sample_direct(
    program: Program, plan: BlockPlan, DY: Matrix, X: Matrix, out: Lent, sums: Lent | None
) -> None:
    """Let a program do what `sample_direct` does, for at least one token and block row."""
    if sums is not None:
        program.clear(sums.at, sums.shape[0] * sums.dtype.itemsize)
    cut = _cut(plan, X[2][1], out.shape[0], out.dtype.itemsize)
    work = program.work((len(cut.rectangles), cut.items), out.dtype)
    sums_at = 0 if sums is None else sums.at
    program.add(_sample, len(cut.rectangles), *_arguments(plan, DY, X, out.at, sums_at, cut, work))


class _Cut(NamedTuple):
    """Rectangles, one for each worker, columns of a panel, block rows of a strip, and work memory of each."""

    rectangles: Array
    panel_columns: int
    group: int
    items: int


def _cut(plan: BlockPlan, n_tokens: int, n_entries: int, itemsize: int) -> _Cut:
    most_columns = max(TARGET.l2_bytes * 3 // 8 // (_RUN * itemsize), plan.width)
    work = (n_entries + sum(plan.shape)) * n_tokens
    rectangles, panel_blocks = cut_rectangles(plan, worker_count(work), most_columns)
    group, panel_columns = max(1, _STRIP // plan.height), panel_blocks * plan.width
    return _Cut(rectangles, panel_columns, group, _RUN * (group * plan.height + panel_columns))


def _arguments(
    plan: BlockPlan, DY: Matrix, X: Matrix, out_at: Place, sums_at: Place, cut: _Cut, work: Any
) -> tuple[Any, ...]:
    return (
        cut.rectangles, cut.panel_columns, cut.group, plan.indptr, plan.columns, plan.height, plan.width,
        *plan.shape, DY[0], DY[3], DY[1][1], X[0], X[3], X[1][1], X[2][1], 1, work, out_at, sums_at,
    )  # fmt: skip
