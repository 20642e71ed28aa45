"""Products of wide blocks with tokens that are read and written where they are, as rows of a batch.

A vector holds outputs of one token here, not tokens of one output: a column of a block is two vectors, and
serves `TOKENS` tokens, whose numbers are spread to all lanes by their loads. Nothing is packed, and each
output is written once, by lines. Per column and group of tokens: 2 vectors of weights and `TOKENS` numbers
loaded for ``2 * TOKENS`` multiply-adds of a vector, so that these are the limit.

Loop order, from outside: (tokens, block rows) in a dynamic schedule; block rows; groups of tokens; blocks;
columns. In registers: all sums of a group. In first-level cache: the weights of a block row, which serve one
group after the other. In second-level cache: the tokens, and those of the next item, which are asked for
meanwhile. Sums begin with the bias and go along the columns, as in the other products, whose bits these have.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparselab.kernels.arrays import Array, address
from sparselab.kernels.cpu.bsr.plan import BlockPlan
from sparselab.kernels.cpu.csr.skinny import Matrix, matrix
from sparselab.kernels.cpu.partition import cut_rows
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, new_counter, worker_count
from sparselab.kernels.cpu.runtime.memory import aligned_empty, scratch
from sparselab.kernels.cpu.runtime.program import COUNT, Lent, Place, Program
from sparselab.kernels.cpu.runtime.target import VECTOR_BYTES
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.transpose import transpose8
from sparselab.kernels.cpu.simd.vectors import (
    fma,
    get,
    lanes_of,
    line_width,
    load_unaligned,
    next_item,
    prefetch_far,
    prefetch_to_write,
    put,
    store_unaligned,
    view_at,
    zero_registers,
)

#: Tokens of a group. Their sums, two vectors each, and all that a column needs fit 32 registers, in whatever
#: order a compiler puts the loads.
TOKENS = 8

#: Groups that are computed for one block row after the other.
_GROUPS = 4

#: ``_row(array)``: the outputs that are computed together, of the array's dtype.
_row = zero_registers(2)


def serves(height: int, itemsize: int, n_tokens: int) -> bool:
    """Whether block rows are whole rows of vectors, there are registers enough, and a group of tokens.

    And whole groups of eight rows, which are turned together.
    """
    return (
        VECTOR_BYTES != 32
        and height % 8 == 0
        and height * itemsize % (2 * VECTOR_BYTES) == 0
        and n_tokens >= TOKENS
    )


@jit
def _sums_of_group(  # type: ignore[no-untyped-def]
    x, at, step, weights, slots, columns, first, last, height, width, inside, n_columns, bias, row,
    y, y_at, y_step, one, like,
):  # fmt: skip
    """Two vectors of outputs of `TOKENS` tokens, from the blocks first : last, written to `y`.

    The step from column to column is an argument, `one`, because LLVM would unroll a loop whose length it can
    tell, and run out of registers.
    """
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = load_unaligned(bias, row, like)
    for k in range(first, last):
        place = np.int64(get(slots, k)) * height * width + inside
        column = np.int64(get(columns, k))
        count = min(width, n_columns - column)
        j = 0
        while j < count:
            w = load_unaligned(weights, place, like)
            a = at + column + j
            s0 = fma(get(x, a), w, s0)
            s1 = fma(get(x, a + step), w, s1)
            s2 = fma(get(x, a + 2 * step), w, s2)
            s3 = fma(get(x, a + 3 * step), w, s3)
            s4 = fma(get(x, a + 4 * step), w, s4)
            s5 = fma(get(x, a + 5 * step), w, s5)
            s6 = fma(get(x, a + 6 * step), w, s6)
            s7 = fma(get(x, a + 7 * step), w, s7)
            place += height
            j += one
    store_unaligned(y, y_at, s0)
    store_unaligned(y, y_at + y_step, s1)
    store_unaligned(y, y_at + 2 * y_step, s2)
    store_unaligned(y, y_at + 3 * y_step, s3)
    store_unaligned(y, y_at + 4 * y_step, s4)
    store_unaligned(y, y_at + 5 * y_step, s5)
    store_unaligned(y, y_at + 6 * y_step, s6)
    store_unaligned(y, y_at + 7 * y_step, s7)


@jit
def _block_row(  # type: ignore[no-untyped-def]
    r, token, keep, x, x_step, n_columns, weights, indptr, slots, columns, height, width, n_rows, bias,
    y, y_step, rest, one, like,
):  # fmt: skip
    """The outputs of a block row for the group of tokens from `token` on; the first `keep` are not written.

    Outputs of tokens that another group computes, and what a last block row has beyond W, go by way of
    `rest`, so that nobody else's memory is written to.
    """
    lanes = lanes_of(like)
    for inside in range(0, height, lanes):
        row = r * height + inside
        whole = keep == 0 and row + lanes <= n_rows
        for t in range(TOKENS):
            for i in range(0, lanes, line_width(rest)):
                prefetch_to_write(y, (token + t) * y_step + row + height + i)  # of the next block row
        if whole:
            _sums_of_group(
                x, token * x_step, x_step, weights, slots, columns, indptr[r], indptr[r + 1], height, width,
                inside, n_columns, bias, row, y, token * y_step + row, y_step, one, like,
            )  # fmt: skip
        elif row < n_rows:
            _sums_of_group(
                x, token * x_step, x_step, weights, slots, columns, indptr[r], indptr[r + 1], height, width,
                inside, n_columns, bias, row, rest, 0, lanes, one, like,
            )  # fmt: skip
            for t in range(keep, TOKENS):
                for i in range(min(lanes, n_rows - row)):
                    put(y, (token + t) * y_step + row + i, get(rest, t * lanes + i))


@jit
def _multiply(  # type: ignore[no-untyped-def]
    worker, n_workers, counter, parts, weights_at, indptr, slots, columns, height, width, n_rows, n_columns,
    x_at, x_step, n_tokens, bias_at, y_at, y_step, one, work,
):  # fmt: skip
    """Compute (groups of tokens, block rows) pairs in a dynamic schedule."""
    if spread(worker, n_workers):
        return
    rest, like = work[worker], _row(work[worker])
    weights, bias = view_at(weights_at, rest), view_at(bias_at, rest)
    x, y = view_at(x_at, rest), view_at(y_at, rest)
    together = TOKENS * _GROUPS
    n_parts = len(parts) - 1
    n_items = (n_tokens + together - 1) // together * n_parts
    line = line_width(rest)
    lines = (n_columns + line - 1) // line
    item = next_item(counter)
    while item < n_items:
        coming = next_item(counter)
        first = item // n_parts * together
        last = min(first + together, n_tokens)
        begin, end = parts[item % n_parts], parts[item % n_parts + 1]
        ahead = coming // n_parts * together
        n_ahead = (min(ahead + together, n_tokens) - ahead) * lines if coming < n_items else 0
        for r in range(begin, end):
            # The tokens of the next item: each lies in memory pages of its own, so the CPU foresees little.
            for k in range(
                (r - begin) * n_ahead // (end - begin), (r - begin + 1) * n_ahead // (end - begin)
            ):
                prefetch_far(x, (ahead + k // lines) * x_step + k % lines * line)
            for group in range(first, last, TOKENS):
                token = min(group, n_tokens - TOKENS)
                _block_row(
                    r, token, group - token, x, x_step, n_columns, weights, indptr, slots, columns, height,
                    width, n_rows, bias, y, y_step, rest, one, like,
                )  # fmt: skip
        item = coming


@jit
def _turn_blocks(worker, n_workers, values, height, width, turned):  # type: ignore[no-untyped-def]
    """Bring the blocks of some slots, height x width, into the order of their columns."""
    if spread(worker, n_workers):
        return
    size = height * width
    n = len(values) // size
    whole = width // 8 * 8
    for k in range(worker * n // n_workers, (worker + 1) * n // n_workers):
        for i in range(0, height, 8):
            for j in range(0, whole, 8):
                transpose8(values, k * size + i * width + j, width, turned, k * size + j * height + i, height)
            for j in range(whole, width):
                for row in range(i, i + 8):
                    put(turned, k * size + j * height + row, get(values, k * size + row * width + j))


def multiply_direct(values: Array, plan: BlockPlan, X: Array, Y: Array, bias: Array | None = None) -> None:
    """``Y = M X + b`` where M is W, or its transpose, with the blocks `values` of W (flat).

    X ``(columns, tokens)`` and Y ``(rows, tokens)`` are of the dtype of the values, and the features of a
    token lie together in both. They are not checked, nor is whether the plan suits (`serves`); Y is
    overwritten.
    """
    n_rows, n_tokens = Y.shape
    if Y.size == 0:
        return
    cut = _cut(plan, n_tokens, len(values), values.itemsize)
    weights = values
    if _must_turn(plan):
        weights = aligned_empty(len(values), values.dtype)
        launch(_turn_blocks, cut.most_workers, values, plan.height, plan.width, weights)
    offsets = np.zeros((len(plan.indptr) - 1) * plan.height, values.dtype)
    if bias is not None:
        offsets[:n_rows] = bias
    work = scratch(cut.n_workers, cut.items, values.dtype)
    launch(
        _multiply, cut.n_workers, new_counter(),
        *_arguments(plan, address(weights), matrix(X), matrix(Y), address(offsets), cut, work),
    )  # fmt: skip


def add_direct(program: Program, values: Lent, plan: BlockPlan, X: Matrix, Y: Matrix, bias_at: Place) -> None:
    """Let a program do what `multiply_direct` does, for at least one output.

    The bias has an entry for each row of the blocks.
    """
    (n_items,) = values.shape
    cut = _cut(plan, X[2][1], n_items, values.dtype.itemsize)
    weights = values
    if _must_turn(plan):
        weights = program.lend((n_items,), values.dtype)
        program.add(_turn_blocks, cut.most_workers, values, plan.height, plan.width, weights)
    counter, work = program.zeros(1, COUNT), program.work((cut.n_workers, cut.items), values.dtype)
    program.add(_multiply, cut.n_workers, counter, *_arguments(plan, weights.at, X, Y, bias_at, cut, work))


class _Cut(NamedTuple):
    """Parts of the block rows, workers at most and those there is work for, and work memory of each."""

    parts: Array
    most_workers: int
    n_workers: int
    items: int


def _cut(plan: BlockPlan, n_tokens: int, n_weights: int, itemsize: int) -> _Cut:
    workers = worker_count((n_weights + sum(plan.shape)) * n_tokens)
    n_items = -(-n_tokens // (TOKENS * _GROUPS))
    # Few tokens are computed by all workers, each for some of the block rows.
    parts = cut_rows(plan.indptr, 1 if n_items >= 4 * workers else min(2 * workers, len(plan.indptr) - 1))
    n_workers = min(workers, n_items * (len(parts) - 1))
    return _Cut(parts, workers, n_workers, TOKENS * 2 * (VECTOR_BYTES // itemsize))


def _must_turn(plan: BlockPlan) -> bool:
    """Whether the weights are not yet in the order of the columns of blocks."""
    return not plan.transposed and plan.width > 1


def _arguments(
    plan: BlockPlan, weights_at: Place, X: Matrix, Y: Matrix, bias_at: Place, cut: _Cut, work: Any
) -> tuple[Any, ...]:
    """The arguments of `_multiply` behind the counter."""
    return (
        cut.parts, weights_at, plan.indptr, plan.slots, plan.columns, plan.height, plan.width, *plan.shape,
        X[0], X[1][1], X[2][1], bias_at, Y[0], Y[1][1], 1, work,
    )  # fmt: skip
