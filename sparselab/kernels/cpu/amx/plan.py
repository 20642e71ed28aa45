"""The weights of a matrix of dense blocks in the order in which the matrix unit walks it.

The matrix walked, M, is W or its transpose. A *strip* is 16 rows of a block row, as many as a tile of sums
has; two strips make a *panel*, which is computed together, and a last strip may be alone. Along a panel the
columns of a block are cut into steps, the entries of one instruction.
"""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.amx.tiles import PANEL, STRIP
from sparselab.kernels.cpu.bsr.plan import BlockPlan
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.memory import aligned_empty
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.vectors import get, put

_MIN_PART = 1 << 14


def fits(block_shape: tuple[int, int]) -> bool:
    """Whether blocks of this shape, and of its transpose, are whole tiles."""
    return all(size % STRIP == 0 for size in block_shape)


def step_depth(width: int) -> int:
    """Entries of one instruction: two for each of 16 or 8 rows of pairs."""
    return 32 if width % 32 == 0 else 16


@jit
def _pack_blocks(  # type: ignore[no-untyped-def]
    worker, n_workers, values, slots, height, width, depth, row_step, column_step, packed
):
    if spread(worker, n_workers):
        return
    n = len(slots)
    for k in range(worker * n // n_workers, (worker + 1) * n // n_workers):
        block = np.int64(get(slots, k)) * height * width
        at = k * height * width
        for row in range(0, height, PANEL):
            for column in range(0, width, depth):
                for strip in range(row, min(row + PANEL, height), STRIP):
                    first = block + strip * row_step + column * column_step
                    for pair in range(depth // 2):
                        for o in range(STRIP):
                            inside = first + o * row_step + 2 * pair * column_step
                            put(packed, at, get(values, inside))
                            put(packed, at + 1, get(values, inside + column_step))
                            at += 2


def pack_blocks(values: Array, plan: BlockPlan) -> Array:
    """The blocks (flat, the bits of bfloat16) as tiles of pairs, in the order in which a panel needs them."""
    packed = aligned_empty(len(plan.slots) * plan.height * plan.width, values.dtype)
    steps = (1, plan.height) if plan.transposed else (plan.width, 1)
    n_workers = max(1, min(worker_count(), len(packed) // _MIN_PART))
    depth = step_depth(plan.width)
    launch(_pack_blocks, n_workers, values, plan.slots, plan.height, plan.width, depth, *steps, packed)
    return packed
