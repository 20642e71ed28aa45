"""A random matrix with its dense twin, and the check that the one still is the other."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.fuzz import adapter
from tests.fuzz.case import Case, Found
from tests.fuzz.judge import Twin, expect_equal
from tests.guards import guarded
from tests.strategies import PATTERNS

Array = np.ndarray[Any, Any]

SIZES = (0, 1, 2, 3, 5, 8, 9, 16, 17, 31, 33, 40, 64, 65, 90)
WIDE = (65_535, 65_536, 65_537, 66_001, 70_000)
BLOCKS = ((4, 1), (1, 8), (4, 4), (3, 5), (8, 2), (1, 1), (16, 16), (5, 1))


class State:
    """What a sequence of kernel calls works on.

    Attributes
    ----------
    W
        The matrix.
    twin : Twin
    given : dict
        The arrays that it was made of.
    kept : list
        Matrices of before, with their twins: nothing may have changed them.
    """

    def __init__(self, W: Any, twin: Twin, given: dict[str, Array]) -> None:
        self.W, self.twin, self.given = W, twin, given
        self.kept: list[tuple[Any, Twin]] = []
        self.plans: dict[str, Any] = {}

    @property
    def dtype(self) -> Any:
        """Dtype of the weights."""
        return self.W.values.dtype

    def replace(self, W: Any, twin: Twin) -> None:
        """Go on with another matrix, and keep this one."""
        self.kept = [*self.kept[-1:], (self.W, self.twin)]
        self.W, self.twin, self.given = W, twin, {}

    def check(self, what: str = "the matrix") -> None:
        """Raise `Found` unless the matrix and those of before are what their twins are."""
        expect_matrix(self.W, self.twin, what)
        for W, twin in self.kept:
            expect_matrix(W, twin, "a matrix of before")


def expect_matrix(W: Any, twin: Twin, what: str) -> None:
    """Raise `Found` unless a matrix has the twin's positions and weights."""
    if tuple(W.shape) != twin.shape:
        raise Found("wrong", f"{what}: expected shape {twin.shape}, got {W.shape}")
    live, positions = adapter.slots(W)
    expect_equal(positions, twin.positions, f"{what}: positions")
    weights = W.values[live].reshape(twin.weights.shape)
    expect_equal(weights, twin.weights.astype(W.values.dtype), f"{what}: weights")


def draw_shape(case: Case) -> tuple[int, int]:
    """Mostly small; sometimes with more columns than the narrowest index type can hold."""
    if case.chance(0.06):
        return int(case.rng.integers(1, 4)), case.pick(WIDE)
    return case.pick(SIZES), case.pick(SIZES)


def draw_pattern(case: Case, grid: tuple[int, int]) -> Array:
    """Ascending positions of one of the kinds in `PATTERNS`."""
    rows, columns = grid
    kind = case.pick(sorted(PATTERNS))
    if rows == 0 or columns == 0:
        return np.empty(0, np.int64)
    drawn = columns
    if columns > 1000:
        kind, drawn = "few", columns if case.chance(0.5) else min(columns, 1 << 16)
    counts = (
        case.rng.integers(0, 40, rows) if kind == "few" else PATTERNS[kind](case.rng, rows, columns)
    ).astype(np.int64)
    chosen = [i * columns + np.sort(case.rng.choice(drawn, n, replace=False)) for i, n in enumerate(counts)]
    return np.concatenate(chosen).astype(np.int64)


def draw_index_dtype(case: Case, columns: int) -> type:
    """Mostly the narrowest; always one that is allowed."""
    if columns <= 1 << 16:
        return case.pick((np.uint16,) * 8 + (np.int32, np.int64))  # type: ignore[no-any-return]
    return case.pick((np.uint16, np.uint16, np.int32, np.int64))  # type: ignore[no-any-return]


def draw_dtype(case: Case) -> type:
    """float32 more often than float64."""
    return case.pick((np.float32,) * 3 + (np.float64,))  # type: ignore[no-any-return]


def padded_arrays(case: Case, twin: Twin) -> dict[str, Array]:
    """Guarded arrays of a `PaddedCSR` that is this twin, with poisoned spare slots now and then."""
    rows, columns = twin.grid
    spare = case.pick((0, 0, 1, 3))
    row, column = np.divmod(twin.positions, max(columns, 1))
    row_nnz = np.bincount(row, minlength=rows).astype(np.int64)[:rows]
    room = row_nnz + case.rng.integers(spare + 1, size=rows)
    indptr = np.concatenate([[0], np.cumsum(room)]).astype(np.int64) + int(case.rng.integers(spare + 1))
    index_dtype = draw_index_dtype(case, columns)
    if len(column) and column.max() > np.iinfo(index_dtype).max:
        index_dtype = np.int32
    indices = np.full(indptr[-1], np.iinfo(index_dtype).max, index_dtype)
    values = np.full(indptr[-1], np.nan, draw_dtype(case))
    before = np.cumsum(row_nnz) - row_nnz
    live = np.repeat(indptr[:-1] - before, row_nnz) + np.arange(row_nnz.sum())
    indices[live], values[live] = column, twin.weights.reshape(-1)
    front = case.chance(0.5)
    parts = {"indptr": indptr, "row_nnz": row_nnz, "indices": indices, "values": values}
    return {name: guarded(array, front=front) for name, array in parts.items()}


def draw_padded(case: Case) -> State:
    """A random `PaddedCSR`."""
    twin = Twin(draw_shape(case))
    positions = draw_pattern(case, twin.grid)
    twin.set(positions, case.rng.standard_normal(len(positions)).astype(np.float32))
    arrays = padded_arrays(case, twin)
    case.note("PaddedCSR")
    W = case.valid(lambda: adapter.padded(twin.shape, **arrays))
    state = State(W, twin, arrays)
    state.check("a new PaddedCSR")
    return state


def block_arrays(case: Case, twin: Twin) -> dict[str, Array]:
    """Guarded arrays of a `BlockCSR` that is this twin."""
    rows, columns = twin.grid
    row, column = np.divmod(twin.positions, max(columns, 1))
    counts = np.bincount(row, minlength=rows)[:rows]
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    index_dtype = draw_index_dtype(case, columns) if columns <= 1 << 16 else np.int32
    values = twin.weights.astype(draw_dtype(case))
    front = case.chance(0.5)
    parts = {"indptr": indptr, "indices": column.astype(index_dtype), "values": values}
    return {name: guarded(array, front=front) for name, array in parts.items()}


def draw_blocks(case: Case) -> State:
    """A random `BlockCSR`."""
    shape = draw_shape(case)
    twin = Twin((min(shape[0], 64), shape[1]), case.pick(BLOCKS))
    positions = draw_pattern(case, twin.grid)
    twin.set(positions, np.zeros((len(positions), *twin.block)))
    inside = twin.gather(np.ones(twin.shape))
    weights = case.rng.standard_normal(twin.weights.shape).astype(np.float32) * inside
    twin.set(positions, weights)
    arrays = block_arrays(case, twin)
    case.note("BlockCSR")
    W = case.valid(lambda: adapter.blocks(twin.shape, twin.block, **arrays))
    state = State(W, twin, arrays)
    state.check("a new BlockCSR")
    return state
