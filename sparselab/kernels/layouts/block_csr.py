"""BlockCSR: a sparse matrix of dense blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from sparselab.kernels.layouts.padded_csr import VALUE_DTYPES, Array, PaddedCSR, n_connections, scipy_sparse

if TYPE_CHECKING:
    import scipy.sparse


@dataclass(frozen=True, eq=False)
class BlockCSR:
    """A sparse matrix of dense blocks, all of one shape.

    The matrix is covered by a *grid* of blocks. Of those in the last row and column of the grid, what reaches
    beyond the matrix is stored and 0. Block row r is the blocks ``indptr[r] : indptr[r + 1]``, their columns
    strictly ascending. This is SciPy's BSR, but for sizes that are no multiple of the block.

    Parameters
    ----------
    shape : (int, int)
        Rows (``out_features``) and columns (``in_features``).
    block_shape : (int, int)
        Rows and columns of a block, 1 or more.
    indptr : int64 array, (grid rows + 1,)
        Where block rows begin; from 0 to the number of blocks.
    indices : uint16, int32 or int64 array, (blocks,)
        Block column of each block.
    values : float32 or float64 array, (blocks, rows of a block, columns of a block)

    Raises
    ------
    TypeError, ValueError
        From `check`, which the constructor calls: the kernels run without bounds checks.

    Examples
    --------
    >>> W = BlockCSR.from_dense(np.eye(4, 6), (2, 2))
    >>> W.grid, W.nnz, W.indices
    ((2, 3), 2, array([0, 1], dtype=uint16))
    """

    shape: tuple[int, int]
    block_shape: tuple[int, int]
    indptr: Array
    indices: Array
    values: Array

    def __post_init__(self) -> None:
        self.check()

    @classmethod
    def unchecked(
        cls,
        shape: tuple[int, int],
        block_shape: tuple[int, int],
        indptr: Array,
        indices: Array,
        values: Array,
    ) -> BlockCSR:
        """As the constructor, for what was checked before. A wrong topology reads out of bounds."""
        self = object.__new__(cls)
        fields = {
            "shape": shape, "block_shape": block_shape, "indptr": indptr, "indices": indices, "values": values
        }  # fmt: skip
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        return self

    @classmethod
    def from_dense(cls, matrix: ArrayLike, block_shape: tuple[int, int]) -> BlockCSR:
        """The blocks of a dense matrix (rows, columns) that are not all zeros; float64 or else float32."""
        dense = np.asarray(matrix)
        if dense.ndim != 2:
            raise ValueError(f"matrix must have 2 dimensions, got shape {dense.shape}")
        dense = dense.astype(np.float64 if dense.dtype == np.float64 else np.float32, copy=False)
        shape = int(dense.shape[0]), int(dense.shape[1])
        blocks = cut_blocks(dense, block_shape)
        return cls.from_positions(shape, block_shape, np.flatnonzero(blocks.any((1, 2))), blocks)

    @classmethod
    def from_positions(
        cls,
        shape: tuple[int, int],
        block_shape: tuple[int, int],
        positions: Array,
        blocks: Array | None = None,
    ) -> BlockCSR:
        """Blocks at ascending positions of the grid: those of all `blocks`, or else float32 zeros."""
        grid = grid_of(shape, block_shape)
        topology = PaddedCSR.from_positions(grid, positions)
        empty = np.zeros((len(positions), *block_shape), np.float32)
        values = empty if blocks is None else blocks[positions]
        return cls(shape, block_shape, topology.indptr, topology.indices, values)

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        sparsity: float,
        block_shape: tuple[int, int],
        seed: int | np.random.Generator | None = None,
        *,
        dtype: DTypeLike = np.float32,
    ) -> BlockCSR:
        """Exactly ``n_connections(grid, sparsity)`` random blocks with standard normal values."""
        from sparselab.kernels.layouts.sampling import sample_distinct

        grid = grid_of(shape, block_shape)
        rng = np.random.default_rng(seed)
        positions = sample_distinct(rng, grid[0] * grid[1], n_connections(grid, sparsity))
        W = cls.from_positions(shape, block_shape, positions)
        values = rng.standard_normal(W.values.shape, np.dtype(dtype))  # type: ignore[arg-type]
        slots, outside = W.outside()
        values[slots] = np.where(outside, 0, values[slots])
        return W.with_values(values)

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns."""
        return grid_of(self.shape, self.block_shape)

    @property
    def nnz(self) -> int:
        """Blocks."""
        return len(self.indices)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the values."""
        return self.values.dtype

    def topology(self) -> PaddedCSR:
        """The blocks as connections of the grid; its values are not to be read."""
        no_values = np.broadcast_to(np.float32(0), self.indices.shape)
        return PaddedCSR.unchecked(self.grid, self.indptr, np.diff(self.indptr), self.indices, no_values)

    def positions(self) -> Array:
        """int64 array (blocks,): ``block_row * grid[1] + block_column``, ascending."""
        return self.topology().positions()

    def outside(self) -> tuple[Array, Array]:
        """The blocks that reach beyond the matrix, (n,), and where, bool (n, rows, columns of a block)."""
        row, column = np.divmod(self.positions(), max(self.grid[1], 1))
        last_row, last_column = (n // b for n, b in zip(self.shape, self.block_shape, strict=True))
        slots = np.flatnonzero((row == last_row) | (column == last_column))
        rows = row[slots, None] * self.block_shape[0] + np.arange(self.block_shape[0])
        columns = column[slots, None] * self.block_shape[1] + np.arange(self.block_shape[1])
        return slots, (rows >= self.shape[0])[:, :, None] | (columns >= self.shape[1])[:, None, :]

    def with_values(self, values: Array) -> BlockCSR:
        """The same topology (shared, not copied) with other values."""
        new = self.unchecked(self.shape, self.block_shape, self.indptr, self.indices, values)
        new._check_values()
        return new

    def astype(self, dtype: DTypeLike) -> BlockCSR:
        """The same topology with values of another dtype (float32 or float64)."""
        return self.with_values(self.values.astype(dtype))

    def transpose(self) -> BlockCSR:
        """W^T, in blocks of the transposed shape."""
        row, column = np.divmod(self.positions(), max(self.grid[1], 1))
        order = np.argsort(column, kind="stable")
        positions = column[order] * self.grid[0] + row[order]
        shape, block_shape = self.shape[::-1], self.block_shape[::-1]
        values = np.ascontiguousarray(self.values[order].transpose(0, 2, 1))
        return self.from_positions(shape, block_shape, positions).with_values(values)

    def to_dense(self) -> Array:
        """Dense array, ``(rows, columns)``."""
        rows, columns = self.grid
        height, width = self.block_shape
        dense = np.zeros((rows * columns, height, width), self.dtype)
        dense[self.positions()] = self.values
        whole = dense.reshape(rows, columns, height, width).transpose(0, 2, 1, 3)
        return np.array(whole.reshape(rows * height, columns * width)[: self.shape[0], : self.shape[1]])

    def to_scipy(self) -> scipy.sparse.bsr_array:
        """SciPy BSR array; of the shape of the whole grid if the matrix is no multiple of the block.

        Raises
        ------
        ModuleNotFoundError
            If SciPy is not installed.
        """
        sparse = scipy_sparse()
        shape = tuple(n * b for n, b in zip(self.grid, self.block_shape, strict=True))
        indices = self.indices.astype(np.int64)
        return sparse.bsr_array((self.values.copy(), indices, self.indptr.copy()), shape=shape)

    def check(self) -> None:
        """Raise TypeError or ValueError, naming the field, unless every invariant holds."""
        if len(self.shape) != 2 or min(self.shape) < 0:
            raise ValueError(f"shape must be two sizes >= 0, got {self.shape}")
        check_block_shape(self.block_shape)
        self._check_values()
        self.topology().check()
        if self.indptr[0] != 0:
            raise ValueError(f"indptr must start at 0, got {self.indptr[0]}")
        slots, outside = self.outside()
        if np.any(self.values[slots][outside] != 0):
            raise ValueError("values must be 0 outside the matrix, got others in its last blocks")

    def _check_values(self) -> None:
        if not isinstance(self.values, np.ndarray):
            raise TypeError(f"values must be a NumPy array, got {type(self.values).__name__}")
        if self.values.dtype not in VALUE_DTYPES:
            raise TypeError(f"values must have dtype float32 or float64, got {self.values.dtype}")
        expected = (*np.shape(self.indices), *self.block_shape)
        if self.values.shape != expected:
            raise ValueError(f"values must have shape {expected}, got {self.values.shape}")

    def __repr__(self) -> str:
        return (
            f"BlockCSR(shape={self.shape}, block_shape={self.block_shape}, nnz={self.nnz}, "
            f"dtype={self.dtype})"
        )


class BlockRewrite(NamedTuple):
    """What `rewrite` returns for blocks: as `Rewrite`, but slots are blocks."""

    topology: BlockCSR
    source: Array


def check_block_shape(block_shape: object) -> tuple[int, int]:
    """The shape as two ints; TypeError or ValueError if it is not two positive integers."""
    if not (isinstance(block_shape, (tuple, list)) and len(block_shape) == 2) or not all(
        isinstance(size, (int, np.integer)) and not isinstance(size, bool) for size in block_shape
    ):
        raise TypeError(f"block_shape must be two integers, got {block_shape!r}")
    if min(block_shape) < 1:
        raise ValueError(f"block_shape must be two integers of at least 1, got {block_shape!r}")
    return int(block_shape[0]), int(block_shape[1])


def grid_of(shape: tuple[int, int], block_shape: tuple[int, int]) -> tuple[int, int]:
    """Block rows and block columns that cover a matrix."""
    return -(-shape[0] // block_shape[0]), -(-shape[1] // block_shape[1])


def cut_blocks(dense: Array, block_shape: tuple[int, int]) -> Array:
    """All blocks of a matrix in the order of their positions, (grid size, height, width); 0 outside."""
    height, width = block_shape
    rows, columns = grid_of((dense.shape[0], dense.shape[1]), block_shape)
    whole = np.zeros((rows * height, columns * width), dense.dtype)
    whole[: dense.shape[0], : dense.shape[1]] = dense
    blocks: Array = whole.reshape(rows, height, columns, width).transpose(0, 2, 1, 3)
    return blocks.reshape(-1, height, width)
