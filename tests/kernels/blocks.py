"""Matrices of blocks of every shape and pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray

from sparselab.kernels import BlockCSR
from tests import strategies
from tests.strategies import VALUE_DTYPES

Array = NDArray[Any]

#: High, wide, square and odd ones, around the height of a micro-panel and the width of a vector.
BLOCKS = ((1, 1), (4, 1), (1, 8), (2, 2), (4, 4), (3, 5), (6, 2), (8, 32), (16, 16), (64, 64))
SHAPES = ((1, 1), (7, 9), (64, 64), (37, 150), (150, 37), (129, 520))

#: Which blocks exist, from (rng, grid).
PATTERNS: dict[str, Callable[[np.random.Generator, tuple[int, int]], Array]] = {
    "some": lambda rng, grid: rng.random(grid) < 0.4,
    "nothing": lambda rng, grid: np.zeros(grid, np.bool_),
    "everything": lambda rng, grid: np.ones(grid, np.bool_),
    "empty and full rows": lambda rng, grid: np.broadcast_to(rng.random((grid[0], 1)) < 0.5, grid),
}


def build(
    shape: tuple[int, int], block_shape: tuple[int, int], kind: str, rng: np.random.Generator,
    dtype: DTypeLike = np.float32,
) -> BlockCSR:  # fmt: skip
    """A matrix of one of the `PATTERNS`."""
    everything = BlockCSR.random(shape, 0.0, block_shape, rng, dtype=dtype)
    kept = np.flatnonzero(PATTERNS[kind](rng, everything.grid))
    return BlockCSR.from_positions(shape, block_shape, kept).with_values(everything.values[kept])


@st.composite
def matrices(draw: st.DrawFn, *, shapes: tuple[tuple[int, int], ...] = SHAPES) -> BlockCSR:
    """Any shape of blocks, pattern and value dtype."""
    return build(
        draw(st.sampled_from(shapes)), draw(st.sampled_from(BLOCKS)), draw(st.sampled_from(sorted(PATTERNS))),
        draw(strategies.generators()), draw(st.sampled_from(VALUE_DTYPES)),
    )  # fmt: skip
