"""Dense twins in float64, and whether a result is right by the rounding bound of `tests.oracle`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from tests.fuzz.case import Found
from tests.oracle import Exact, assert_close

Array = np.ndarray[Any, Any]


def exact_product(A: Array, B: Array, live: Array | None = None, bias: Array | None = None) -> Exact:
    """``A B + bias[:, None]`` for finite A and B, with A 0 where it is not `live`."""
    value, magnitude = A @ B, np.abs(A) @ np.abs(B)
    terms = np.full((A.shape[0], 1), A.shape[1]) if live is None else live.sum(1, keepdims=True)
    if bias is not None:
        value, magnitude = value + bias[:, None], magnitude + np.abs(bias)[:, None]
        terms = terms + 1
    return Exact(value, magnitude, terms)


def expect(actual: object, exact: Exact, dtype: DTypeLike, what: str = "") -> None:
    """Raise `Found` unless a result is right."""
    try:
        assert_close(actual, exact, dtype)
    except AssertionError as wrong:
        raise Found("wrong", f"{what} {' '.join(str(wrong).split())[:300]}".strip()) from None


def expect_equal(actual: Any, expected: Any, what: str) -> None:
    """Raise `Found` unless two arrays are the same."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        raise Found("wrong", f"{what}: expected shape {expected.shape}, got {actual.shape}")
    if not np.array_equal(actual, expected, equal_nan=actual.dtype.kind == "f"):
        where = np.argmax(np.ravel(actual != expected))
        raise Found(
            "wrong",
            f"{what}: {np.sum(actual != expected)} differ, first {np.ravel(actual)[where]} "
            f"instead of {np.ravel(expected)[where]}",
        )


class Twin:
    """What a sparse matrix must be: which positions are live, and their weights, kept dense in float64."""

    def __init__(self, shape: tuple[int, int], block: tuple[int, int] = (1, 1)) -> None:
        self.shape, self.block = shape, block
        self.grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
        #: Live positions of the grid, ascending, and the dense block of each (1 x 1 for connections).
        self.positions = np.empty(0, np.int64)
        self.weights = np.empty((0, *block))

    def set(self, positions: Array, weights: Array) -> Twin:
        """Take over ascending positions and their weights."""
        self.positions = np.asarray(positions, np.int64)
        self.weights = np.array(weights, np.float64).reshape(-1, *self.block)
        return self

    def copy(self) -> Twin:
        """A twin of its own."""
        return Twin(self.shape, self.block).set(self.positions, self.weights)

    @property
    def nnz(self) -> int:
        """Live positions."""
        return len(self.positions)

    def free(self) -> Array:
        """Positions that are not live, for matrices small enough to list them."""
        return np.setdiff1d(np.arange(self.grid[0] * self.grid[1]), self.positions)

    def _spread(self, entries: Array) -> Array:
        (rows, columns), (height, width) = self.grid, self.block
        blocks = np.zeros((rows * columns, height, width), entries.dtype)
        blocks[self.positions] = entries
        whole = blocks.reshape(rows, columns, height, width).transpose(0, 2, 1, 3)
        return whole.reshape(rows * height, columns * width)[: self.shape[0], : self.shape[1]]

    def dense(self) -> Array:
        """The matrix."""
        return self._spread(self.weights)

    def live(self) -> Array:
        """Where it has weights."""
        return self._spread(np.ones(self.weights.shape, bool))

    def gather(self, dense: Array) -> Array:
        """Entries of a dense matrix at the live positions, (nnz, *block); 0 beyond the matrix."""
        (rows, columns), (height, width) = self.grid, self.block
        whole = np.zeros((rows * height, columns * width))
        whole[: self.shape[0], : self.shape[1]] = dense
        blocks = whole.reshape(rows, height, columns, width).transpose(0, 2, 1, 3)
        return blocks.reshape(-1, height, width)[self.positions]

    def rewritten(self, drop: Array, grow: Array) -> Twin:
        """The twin after dropping these numbers of live positions and growing these positions."""
        kept = np.ones(self.nnz, bool)
        kept[drop] = False
        regrown = np.isin(self.positions, grow)
        kept |= regrown
        fresh = np.setdiff1d(grow, self.positions)
        positions = np.concatenate([self.positions[kept], fresh])
        weights = np.concatenate([self.weights[kept], np.zeros((len(fresh), *self.block))])
        order = np.argsort(positions, kind="stable")
        return Twin(self.shape, self.block).set(positions[order], weights[order])

    def gradient(self, DY: Array, X: Array) -> Exact:
        """``(DY X^T)`` at the live positions, (nnz, *block)."""
        full = exact_product(DY, X.T)
        return Exact(self.gather(full.value), self.gather(full.magnitude), np.array(X.shape[1]))
