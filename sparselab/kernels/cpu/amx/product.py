"""``Y = X M^T + b`` in bfloat16, where M is W or its transpose: blocks by the matrix unit.

Loop order, from outside: (32 tokens, some block rows) in a dynamic schedule; panels; blocks; their steps.
Tokens are rows, as in torch, and are read where they are. In tiles: the sums of 32 tokens and 32 rows of a
panel, two tiles of tokens and two of weights, each of which serves two instructions. In second-level cache:
the tokens and the packed weights.
"""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array, address
from sparselab.kernels.cpu.amx.plan import pack_blocks, step_depth
from sparselab.kernels.cpu.amx.tiles import (
    PANEL,
    STRIP,
    configuration,
    dot00,
    dot01,
    dot10,
    dot11,
    pairs0,
    pairs1,
    rows0,
    rows1,
    store00,
    store01,
    store10,
    store11,
    zero00,
    zero01,
    zero10,
    zero11,
)
from sparselab.kernels.cpu.bsr.plan import BlockPlan
from sparselab.kernels.cpu.partition import cut_rows
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, new_counter, worker_count
from sparselab.kernels.cpu.runtime.matrix_unit import require_matrix_unit
from sparselab.kernels.cpu.runtime.memory import scratch
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.matrix_tiles import configure, release, store_rounded
from sparselab.kernels.cpu.simd.vectors import get, next_item, put, view_at

#: Tokens that are computed together.
TOKENS = 32


@jit
def _panel_sums(x_at, x_step, weights_at, block_bytes, columns, first, last, width, depth, strips, sums_at):  # type: ignore[no-untyped-def]
    """The sums of 32 tokens and one or two strips of 16 rows, (32, 32) or its first half, at `sums_at`."""
    two = strips == 2
    zero00()
    zero10()
    zero01()
    zero11()
    for k in range(first, last):
        x = x_at + np.int64(get(columns, k)) * 2
        weights = weights_at + k * block_bytes
        for _ in range(0, width, depth):
            rows0(x, x_step)
            pairs0(weights, 64)
            dot00()
            rows1(x + 16 * x_step, x_step)
            dot10()
            if two:
                pairs1(weights + 32 * depth, 64)
                dot01()
                dot11()
            x += 2 * depth
            weights += 32 * depth * strips
    store00(sums_at, 128)
    store10(sums_at + 16 * 128, 128)
    store01(sums_at + 64, 128)
    store11(sums_at + 16 * 128 + 64, 128)


@jit
def _copy_tokens(x, x_start, x_step, n_tokens, n_columns, copy, columns):  # type: ignore[no-untyped-def]
    """Copy tokens to rows of so many columns, with zeros for those that do not exist."""
    for t in range(TOKENS):
        at = t * columns
        if t < n_tokens:
            first = x_start + t * x_step
            for j in range(n_columns):
                put(copy, at + j, get(x, first + j))
            copy[at + n_columns : at + columns] = 0
        else:
            copy[at : at + columns] = 0


@jit
def _put_sums(sums, bias, row, rows, y, y_start, y_step, n_tokens, line):  # type: ignore[no-untyped-def]
    """Round the sums of some rows of a panel, with the bias, into the tokens of y."""
    for t in range(n_tokens):
        for i in range(0, rows, STRIP):
            at = y_start + t * y_step + i
            if i + STRIP <= rows:
                store_rounded(sums, t * PANEL + i, bias, row + i, y, at)
            else:
                store_rounded(sums, t * PANEL + i, bias, row + i, line, 0)
                for k in range(rows - i):
                    put(y, at + k, get(line, k))


@jit
def _multiply_blocks(  # type: ignore[no-untyped-def]
    worker, n_workers, counter, told_at, weights_at, parts, indptr, columns, height, width, depth, n_rows,
    n_columns, x_at, x_step, n_tokens, copies, bias, y_at, y_step, work, line, work_sums,
):  # fmt: skip
    """Compute (tokens, block rows) pairs in a dynamic schedule; `copies` where tokens end within a block."""
    if spread(worker, n_workers):
        return
    configure(told_at)
    copy, sums, narrow = work[worker], work_sums[worker], line[worker]
    sums_at, copy_at = sums.ctypes.data, copy.ctypes.data
    x, y = view_at(x_at, copy), view_at(y_at, copy)
    n_parts = len(parts) - 1
    n_items = (n_tokens + TOKENS - 1) // TOKENS * n_parts
    block_bytes = 2 * height * width
    padded = (n_columns + width - 1) // width * width
    item = next_item(counter)
    while item < n_items:
        token0 = item // n_parts * TOKENS
        tokens = min(TOKENS, n_tokens - token0)
        at, step = x_at + 2 * token0 * x_step, 2 * x_step
        if copies or tokens < TOKENS:
            _copy_tokens(x, token0 * x_step, x_step, tokens, n_columns, copy, padded)
            at, step = copy_at, 2 * padded
        for r in range(parts[item % n_parts], parts[item % n_parts + 1]):
            for inside in range(0, height, PANEL):
                row = r * height + inside
                rows = min(PANEL, height - inside, n_rows - row)
                if rows <= 0:
                    continue
                weights = weights_at + 2 * inside * width
                strips = min(2, (height - inside) // STRIP)
                _panel_sums(
                    at, step, weights, block_bytes, columns, indptr[r], indptr[r + 1], width, depth, strips,
                    sums_at,
                )  # fmt: skip
                _put_sums(sums, bias, row, rows, y, token0 * y_step + row, y_step, tokens, narrow)
        item = next_item(counter)
    release()


def multiply_blocks(values: Array, plan: BlockPlan, X: Array, Y: Array, bias: Array | None = None) -> None:
    """``Y = X M^T + b`` with float32 sums; bfloat16 as its bits in uint16.

    Parameters
    ----------
    values : array, flat
        The blocks of W.
    plan : BlockPlan
        Of M.
    X : array, (tokens, columns)
        The columns of a token lie together.
    Y : array, (tokens, rows)
        Overwritten; likewise.
    bias : float32 array, (rows,), optional

    Raises
    ------
    RuntimeError
        If this process may not use a matrix unit.
    """
    require_matrix_unit()
    n_tokens, n_rows = Y.shape
    if Y.size == 0:
        return
    groups = -(-n_tokens // TOKENS)
    work = len(values) * n_tokens // 8
    workers = worker_count(work)
    n_parts = min(len(plan.indptr) - 1, max(1, 4 * workers // groups if workers > 1 else 1))
    parts = cut_rows(plan.indptr, n_parts)
    n_workers = min(workers, groups * n_parts)
    offsets = np.zeros(-(-n_rows // PANEL) * PANEL + PANEL, np.float32)
    if bias is not None:
        offsets[:n_rows] = bias
    packed = pack_blocks(values, plan)
    depth = step_depth(plan.width)
    told = configuration(depth)
    copies = plan.n_columns != X.shape[1]
    columns = plan.n_columns if copies or n_tokens % TOKENS else 1
    sums = np.empty((n_workers, TOKENS * PANEL), np.float32)
    lines = np.empty((n_workers, STRIP), np.uint16)
    launch(
        _multiply_blocks, n_workers, new_counter(), address(told), address(packed), parts, plan.indptr,
        plan.columns, plan.height, plan.width, depth, n_rows, X.shape[1], address(X),
        X.strides[0] // 2, n_tokens, copies, offsets, address(Y), Y.strides[0] // 2,
        scratch(n_workers, TOKENS * columns, np.dtype(np.uint16)), lines, sums,
    )  # fmt: skip
