"""Factors of a product over tokens in the order of the matrix unit: panels of 32 features, step by step.

A step is what one instruction sums over: 32 tokens, in pairs of 16-bit words side by side. In a panel of
*pairs* a step is 16 rows of 32 pairs, one pair for each feature; in a panel of *rows* it is the same turned,
32 rows of 16 pairs, one row for each feature. Either is 2 KiB in one piece, so that no two lines of a step
are in each other's way in a cache.
"""

from __future__ import annotations

from sparselab.kernels.cpu.amx.tiles import PANEL
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.bfloat16 import put_number
from sparselab.kernels.cpu.simd.matrix_tiles import interleave
from sparselab.kernels.cpu.simd.transpose import transpose8
from sparselab.kernels.cpu.simd.vectors import put, view_at, weight

#: Tokens of a step, and the 16-bit words that it has in a panel.
STEP = 32
STEP_WORDS = STEP * PANEL

#: 1 in bfloat16.
_ONE = 0x3F80


@jit
def put_pairs(x, x_step, n_tokens, token, first, n_columns, columns, pairs, at):  # type: ignore[no-untyped-def]
    """The pairs of two tokens, of so many columns from the first on; zeros where there is none."""
    whole = n_columns // 16 * 16
    a, b = token * x_step + first, (token + 1) * x_step + first
    if token + 1 < n_tokens:
        for j in range(0, whole, 16):
            interleave(x, a + j, b + j, pairs, at + 2 * j)
        for j in range(whole, n_columns):
            put_number(pairs, at + 2 * j, weight(x, a + j))
            put_number(pairs, at + 2 * j + 1, weight(x, b + j))
    else:
        pairs[at : at + 2 * columns] = 0
        if token < n_tokens:
            for j in range(n_columns):
                put_number(pairs, at + 2 * j, weight(x, a + j))
    pairs[at + 2 * n_columns : at + 2 * columns] = 0


@jit
def _order_step(x, x_step, n_tokens, token, first, n_columns, pairs, at):  # type: ignore[no-untyped-def]
    """One step of a panel of pairs."""
    for pair in range(STEP // 2):
        put_pairs(
            x, x_step, n_tokens, token + 2 * pair, first, n_columns, PANEL, pairs, at + 2 * pair * PANEL
        )


@jit
def order_pairs(  # type: ignore[no-untyped-def]
    worker, n_workers, n_tokens, n_steps, x_at, x_like, x_step, n_columns, pairs
):
    """Panels of pairs of X, with a column of ones behind its own, of the worker's steps."""
    if spread(worker, n_workers):
        return
    x = view_at(x_at, x_like)
    for step in range(worker * n_steps // n_workers, (worker + 1) * n_steps // n_workers):
        for column in range(0, n_columns + 1, PANEL):
            at = (column // PANEL * n_steps + step) * STEP_WORDS
            present = min(PANEL, n_columns - column)
            _order_step(x, x_step, n_tokens, step * STEP, column, present, pairs, at)
            if present < PANEL:
                for pair in range(STEP // 2):
                    put(pairs, at + 2 * (pair * PANEL + present), _ONE)
                    put(pairs, at + 2 * (pair * PANEL + present) + 1, _ONE)


@jit
def order_rows(dy, dy_step, n_tokens, n_steps, row0, row1, n_rows, rows, bits, words):  # type: ignore[no-untyped-def]
    """Panels of rows of dY, from row0 to row1.

    By way of a buffer for one step, seen as `bits` and as `words` of float32, which `rows` are too.
    """
    half = STEP // 2
    for step in range(n_steps):
        for row in range(row0, row1, PANEL):
            at = ((row - row0) // PANEL * n_steps + step) * (STEP_WORDS // 2)
            _order_step(dy, dy_step, n_tokens, step * STEP, row, min(PANEL, n_rows - row), bits, 0)
            for i in range(0, PANEL, 8):
                for pair in range(0, half, 8):
                    transpose8(words, pair * PANEL + i, PANEL, rows, at + i * half + pair, half)
