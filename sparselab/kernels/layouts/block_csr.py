"""BlockCSR: connections that are dense blocks of values, in compressed rows of a grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from sparselab.kernels.arrays import (
    VALUE_DTYPES,
    Array,
    check_array,
    check_dense,
    check_shape,
    check_value_dtype,
    frozen,
    n_connections,
    scipy_sparse,
)
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.kernels.layouts.sampling import sample_distinct
from sparselab.kernels.layouts.topology import SparseMatrix, Topology

if TYPE_CHECKING:
    import scipy.sparse


class BlockTopology(Topology):
    """Dense blocks, all of one shape, in compressed rows of the grid that covers a matrix.

    Of the blocks in the last row and column of the grid, what reaches beyond the matrix is stored and 0.

    Parameters
    ----------
    shape : (int, int)
        Rows and columns of the matrix.
    block_shape : (int, int)
        Rows and columns of a block, 1 or more.
    blocks : RowTopology
        The blocks as connections of the grid, without spare slots.

    Raises
    ------
    TypeError, ValueError
        If an argument is not that.
    """

    layout: ClassVar[str] = "bsr"

    def __init__(self, shape: tuple[int, int], block_shape: tuple[int, int], blocks: RowTopology) -> None:
        super().__init__()
        self._shape = check_shape(shape)
        self._block_shape = check_block_shape(block_shape)
        if blocks.shape != self.grid:
            raise ValueError(f"blocks must lie on a grid of {self.grid}, got {blocks.shape}")
        if blocks.capacity != blocks.nnz:
            raise ValueError(f"blocks must have no spare slots, got {blocks.capacity - blocks.nnz}")
        #: The blocks as connections of the grid.
        self.blocks = blocks

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self._shape

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self._block_shape

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns."""
        return grid_of(self._shape, self._block_shape)

    @property
    def nnz(self) -> int:
        """Blocks."""
        return self.blocks.nnz

    @property
    def values_shape(self) -> tuple[int, ...]:
        """``(blocks, rows of a block, columns of a block)``."""
        return (self.nnz, *self._block_shape)

    def positions(self) -> Array:
        """int64 array (blocks,): ``block_row * grid[1] + block_column``, ascending."""
        return self.blocks.positions()

    def outside(self) -> tuple[Array, Array]:
        """The blocks that reach beyond the matrix, (n,), and where, bool (n, rows, columns of a block).

        Both are read-only.
        """
        return self.plan("outside", _outside)

    def rewrite(self, drop: Array, grow: Array, *, compact: bool = False) -> tuple[BlockTopology, Array]:
        """Another topology; see `Topology.rewrite`. It never has spare slots."""
        blocks, source = self.blocks.rewrite(drop, grow, compact=True)
        return BlockTopology(self.shape, self.block_shape, blocks), source

    def transposed(self) -> tuple[BlockTopology, Array]:
        """The topology of W^T, and the slot of W that each of its slots stands for."""
        blocks, slots = self.blocks.transposed()
        return BlockTopology(self.shape[::-1], self.block_shape[::-1], blocks), slots

    def __repr__(self) -> str:
        return f"BlockTopology(shape={self.shape}, block_shape={self.block_shape}, nnz={self.nnz})"


def _outside(topology: BlockTopology) -> tuple[Array, Array]:
    (n_rows, n_columns), (height, width) = topology.shape, topology.block_shape
    row, column = topology.blocks.row_of_slots(), topology.blocks.indices
    # A matrix of whole blocks has no block row or block column of these numbers.
    slots = np.flatnonzero((row == n_rows // height) | (column == n_columns // width))
    rows = row[slots, None] * height + np.arange(height)
    columns = column[slots, None].astype(np.int64) * width + np.arange(width)
    return frozen(slots), frozen((rows >= n_rows)[:, :, None] | (columns >= n_columns)[:, None, :])


class BlockCSR(SparseMatrix):
    """A sparse matrix of dense blocks, all of one shape.

    The matrix is covered by a *grid* of blocks. Block row r is the blocks ``indptr[r] : indptr[r + 1]``,
    their columns strictly ascending. This is SciPy's BSR, but for sizes that are no multiple of the block:
    what reaches beyond the matrix is stored and 0.

    Parameters
    ----------
    shape : (int, int)
        Rows (``out_features``) and columns (``in_features``).
    block_shape : (int, int)
        Rows and columns of a block, 1 or more.
    indptr : int64 array, (grid rows + 1,)
        Where block rows begin; from 0 to the number of blocks. Copied.
    indices : uint16, int32 or int64 array, (blocks,)
        Block column of each block. Copied.
    values : float32 or float64 array, (blocks, rows of a block, columns of a block)
        Not copied; it may be written to.

    Raises
    ------
    TypeError, ValueError
        If an argument is not that.

    Examples
    --------
    >>> W = BlockCSR.from_dense(np.diag([1.0, 2.0, 3.0]), (2, 2))
    >>> W.nnz, W.grid, W.values[1]
    (2, (2, 2), array([[3., 0.],
           [0., 0.]]))
    """

    topology: BlockTopology
    topology_class = BlockTopology

    def __init__(
        self,
        shape: tuple[int, int],
        block_shape: tuple[int, int],
        indptr: Array,
        indices: Array,
        values: Array,
    ) -> None:
        shape, block_shape = check_shape(shape), check_block_shape(block_shape)
        grid = grid_of(shape, block_shape)
        indptr = check_array("indptr", indptr, (np.dtype(np.int64),), (grid[0] + 1,)).copy()
        if indptr[0] != 0 or np.any(indptr[1:] < indptr[:-1]):
            raise ValueError(f"indptr must start at 0 and never decrease, got {indptr}")
        blocks = RowTopology(grid, indptr, np.diff(indptr), indices)
        self._hold(BlockTopology(shape, block_shape, blocks), values)

    @classmethod
    def from_dense(cls, matrix: ArrayLike, block_shape: tuple[int, int]) -> BlockCSR:
        """The blocks of a dense matrix (rows, columns) that are not all zeros; float64 or else float32."""
        dense, block_shape = check_dense("matrix", matrix), check_block_shape(block_shape)
        shape = int(dense.shape[0]), int(dense.shape[1])
        live = np.zeros(grid_of(shape, block_shape), np.bool_)
        parts = _Parts(dense, block_shape)
        for rows, blocks in parts:
            live[rows] = blocks.any((1, 2)).reshape(live[rows].shape)
        topology = RowTopology.from_positions(live.shape, np.flatnonzero(live))
        values = np.empty((topology.nnz, *block_shape), dense.dtype)
        for rows, blocks in parts:
            slots = slice(topology.indptr[rows.start], topology.indptr[rows.stop])
            np.compress(live[rows].reshape(-1), blocks, axis=0, out=values[slots])
        return cls.of(BlockTopology(shape, block_shape, topology), values)

    @classmethod
    def from_positions(
        cls,
        shape: tuple[int, int],
        block_shape: tuple[int, int],
        positions: Array,
        blocks: Array | None = None,
    ) -> BlockCSR:
        """Blocks at ascending positions of the grid: those of all `blocks`, or else float32 zeros."""
        block_shape = check_block_shape(block_shape)
        rows = RowTopology.from_positions(grid_of(check_shape(shape), block_shape), positions)
        if blocks is None:
            values = np.zeros((rows.nnz, *block_shape), np.float32)
        else:
            every = rows.shape[0] * rows.shape[1], *block_shape
            values = check_array("blocks", blocks, VALUE_DTYPES, every)[rows.positions()]
        return cls.of(BlockTopology(shape, block_shape, rows), values)

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
        """Exactly ``round((1 - sparsity) * grid[0] * grid[1])`` random blocks with standard normal values."""
        grid = grid_of(check_shape(shape), check_block_shape(block_shape))
        rng = np.random.default_rng(seed)
        positions = sample_distinct(rng, grid[0] * grid[1], n_connections(grid, sparsity))
        W = cls.from_positions(shape, block_shape, positions)
        values = rng.standard_normal(W.values.shape, check_value_dtype(dtype))
        slots, outside = W.topology.outside()
        values[slots] = np.where(outside, 0, values[slots])
        return W.with_values(values)

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self.topology.block_shape

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns."""
        return self.topology.grid

    @property
    def indptr(self) -> Array:
        """int64 array (grid rows + 1,): where block rows begin. Read-only."""
        return self.topology.blocks.indptr

    @property
    def indices(self) -> Array:
        """uint16, int32 or int64 array (blocks,): block column of each block. Read-only."""
        return self.topology.blocks.indices

    def check_values(self) -> None:
        """Raise ValueError if something but 0 is stored where blocks reach beyond the matrix."""
        slots, outside = self.topology.outside()
        if len(slots) and np.any(self.values[slots][outside] != 0):
            raise ValueError("values must be 0 where blocks reach beyond the matrix, got other numbers there")

    def transpose(self) -> BlockCSR:
        """W^T, in blocks of the transposed shape."""
        topology, slots = self.topology.transposed()
        return self.of(topology, np.ascontiguousarray(self.values[slots].transpose(0, 2, 1)))

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


#: Bytes of dense blocks that `BlockCSR.from_dense` looks at together.
_PART_BYTES = 1 << 18


class _Part(NamedTuple):
    """Some block rows, and all blocks that they could have."""

    rows: slice
    blocks: Array


class _Parts:
    """All block rows of a dense matrix, a few at a time, as often as one goes through them."""

    def __init__(self, dense: Array, block_shape: tuple[int, int]) -> None:
        self._dense, self._block_shape = dense, block_shape

    def __iter__(self) -> Iterator[_Part]:
        dense, height = self._dense, self._block_shape[0]
        step = max(1, _PART_BYTES // max(1, height * dense.shape[1] * dense.itemsize))
        for row in range(0, len(dense), step * height):
            part = dense[row : row + step * height]
            rows = slice(row // height, row // height + -(-len(part) // height))
            yield _Part(rows, cut_blocks(part, self._block_shape))


def cut_blocks(dense: Array, block_shape: tuple[int, int]) -> Array:
    """All blocks of a matrix in the order of their positions, (grid size, height, width); 0 outside."""
    height, width = block_shape
    rows, columns = grid_of((dense.shape[0], dense.shape[1]), block_shape)
    whole = np.zeros((rows * height, columns * width), dense.dtype)
    whole[: dense.shape[0], : dense.shape[1]] = dense
    blocks: Array = whole.reshape(rows, height, columns, width).transpose(0, 2, 1, 3)
    return blocks.reshape(-1, height, width)
