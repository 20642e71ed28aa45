"""``dW[i, j] = sum_t dY[t, i] X[t, j]`` in the blocks of W, in bfloat16 by the matrix unit, in float32 sums.

First both factors are brought into the order of the unit, once for all blocks: pairs of tokens side by side
as 32-bit words, and those of dY turned, so that each output has its tokens in a row. Then, from outside:
ranges of tokens, whose pairs of X stay in second-level cache; block rows, each with one worker; blocks, whose
32 x 32 sums are in tiles over all tokens of the range.
"""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array, address
from sparselab.kernels.cpu.amx.order import STEP, put_pairs
from sparselab.kernels.cpu.amx.tiles import (
    PANEL,
    STRIP,
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
)
from sparselab.kernels.cpu.bsr.plan import BlockPlan
from sparselab.kernels.cpu.partition import cut_rows
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.matrix_unit import require_matrix_unit
from sparselab.kernels.cpu.runtime.memory import scratch
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.matrix_tiles import configure, release
from sparselab.kernels.cpu.simd.transpose import transpose8
from sparselab.kernels.cpu.simd.vectors import get, view_at

#: Tokens of a range.
_RANGE = 512

#: Words beside a row of tokens, so that rows do not all lie in the same lines of a cache.
_GAP = 16

#: Outputs that are turned together, by way of a buffer.
_TURNED = 64


@jit
def _order_factors(  # type: ignore[no-untyped-def]
    worker, n_workers, x_at, x_step, n_columns, columns, dy_at, dy_step, n_rows, rows, n_tokens, n_steps,
    pairs, turned, turned_words, row_words, buffers, buffer_words, like,
):  # fmt: skip
    """Pairs of X, (words of tokens, columns), and of dY, (rows, words of tokens), of some steps of tokens."""
    if spread(worker, n_workers):
        return
    x, dy = view_at(x_at, like), view_at(dy_at, like)
    buffer, words = buffers[worker], buffer_words[worker]
    half = STEP // 2
    for s in range(worker * n_steps // n_workers, (worker + 1) * n_steps // n_workers):
        for pair in range(s * half, (s + 1) * half):
            put_pairs(x, x_step, n_tokens, 2 * pair, 0, n_columns, columns, pairs, 2 * pair * columns)
        for row in range(0, rows, _TURNED):
            width = min(_TURNED, rows - row)
            present = max(min(n_rows - row, width), 0)
            for pair in range(half):
                token = 2 * (s * half + pair)
                put_pairs(dy, dy_step, n_tokens, token, row, present, width, buffer, 2 * pair * _TURNED)
            for i in range(0, width, 8):
                for pair in range(0, half, 8):
                    target = (row + i) * row_words + s * half + pair
                    transpose8(words, pair * _TURNED + i, _TURNED, turned_words, target, row_words)


@jit
def _add_part(rows_at, row_step, pairs_at, pair_step, n_steps, size, sums_at, sums_step):  # type: ignore[no-untyped-def]
    """Add the products of some steps of tokens to the sums of a part of a block, 32 x 32 or 16 x 16."""
    four = size == PANEL
    load00(sums_at, sums_step)
    if four:
        load10(sums_at + 16 * sums_step, sums_step)
        load01(sums_at + 64, sums_step)
        load11(sums_at + 16 * sums_step + 64, sums_step)
    for _ in range(n_steps):
        rows0(rows_at, row_step)
        pairs0(pairs_at, pair_step)
        dot00()
        if four:
            rows1(rows_at + 16 * row_step, row_step)
            dot10()
            pairs1(pairs_at + 64, pair_step)
            dot01()
            dot11()
        rows_at += 64
        pairs_at += 16 * pair_step
    store00(sums_at, sums_step)
    if four:
        store10(sums_at + 16 * sums_step, sums_step)
        store01(sums_at + 64, sums_step)
        store11(sums_at + 16 * sums_step + 64, sums_step)


@jit
def _sample_blocks(  # type: ignore[no-untyped-def]
    worker, n_workers, told_at, edges, indptr, columns, height, width, pairs_at, pair_step, turned_at,
    row_step, n_steps, out_at,
):  # fmt: skip
    """Add up the blocks of the worker's block rows."""
    if spread(worker, n_workers):
        return
    configure(told_at)
    size = PANEL if height % PANEL == 0 and width % PANEL == 0 else STRIP
    for first in range(0, n_steps, _RANGE // STEP):
        steps = min(_RANGE // STEP, n_steps - first)
        for r in range(edges[worker], edges[worker + 1]):
            for k in range(indptr[r], indptr[r + 1]):
                rows_at = turned_at + r * height * row_step + first * 64
                inputs_at = pairs_at + first * 16 * pair_step + np.int64(get(columns, k)) * 4
                block_at = out_at + k * height * width * 4
                for i in range(0, height, size):
                    for j in range(0, width, size):
                        _add_part(
                            rows_at + i * row_step, row_step, inputs_at + 4 * j, pair_step, steps, size,
                            block_at + (i * width + j) * 4, 4 * width,
                        )  # fmt: skip
    release()


def sample_blocks(plan: BlockPlan, DY: Array, X: Array, out: Array) -> None:
    """``sum_t dY[t, i] X[t, j]`` for every entry of every block, written to `out`.

    Entries beyond the matrix are 0 times a number, which a NaN or infinity makes NaN.

    Parameters
    ----------
    plan : BlockPlan
        Of W.
    DY, X : uint16 arrays, (tokens, rows) and (tokens, columns)
        The bits of bfloat16. The features of a token lie together.
    out : float32 array, flat
        Overwritten; the blocks of W.

    Raises
    ------
    RuntimeError
        If this process may not use a matrix unit.
    """
    require_matrix_unit()
    n_tokens = len(X)
    out.fill(0)
    if n_tokens == 0 or out.size == 0:
        return
    n_steps = -(-n_tokens // STEP)
    rows, columns = (len(plan.indptr) - 1) * plan.height, plan.n_columns
    row_words = n_steps * STEP // 2 + _GAP
    like = np.empty(0, np.uint16)
    n_pairs = n_steps * STEP * columns
    ordered = scratch(1, n_pairs + rows * row_words * 2, like.dtype)[0]
    pairs, turned = ordered[:n_pairs], ordered[n_pairs : n_pairs + rows * row_words * 2]
    workers = worker_count(len(out) * n_tokens // 8 + pairs.size + turned.size)
    n_workers = min(workers, n_steps)
    buffers = np.empty((n_workers, STEP * _TURNED), np.uint16)
    launch(
        _order_factors, n_workers, address(X), X.strides[0] // 2, X.shape[1], columns, address(DY),
        DY.strides[0] // 2, DY.shape[1], rows, n_tokens, n_steps, pairs, turned, turned.view(np.float32),
        row_words, buffers, buffers.view(np.float32), like,
    )  # fmt: skip
    edges = cut_rows(plan.indptr, min(workers, len(plan.indptr) - 1))
    told = configuration(STEP)
    launch(
        _sample_blocks, len(edges) - 1, address(told), edges, plan.indptr, plan.columns, plan.height,
        plan.width, address(pairs), 4 * columns, address(turned), 4 * row_words, n_steps, address(out),
    )  # fmt: skip
