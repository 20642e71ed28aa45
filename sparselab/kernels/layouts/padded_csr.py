"""Padded CSR: single connections in compressed rows that may have room to grow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from sparselab.kernels.arrays import (
    INDEX_DTYPES,
    Array,
    check_array,
    check_shape,
    for_kernels,
    frozen,
    index_dtype,
    n_connections,
    scipy_sparse,
    slot_dtype,
)
from sparselab.kernels.layouts.sampling import sample_distinct
from sparselab.kernels.layouts.topology import SparseMatrix, Topology
from sparselab.kernels.rewiring.rewrite import rewrite_rows

if TYPE_CHECKING:
    import scipy.sparse


class RowArrays(NamedTuple):
    """The arrays of a `RowTopology` as compiled code reads them; see `sparselab.kernels.arrays.Rows`."""

    shape: tuple[int, int]
    indptr: Array
    row_nnz: Array
    indices: Array
    nnz: int

    @property
    def rows(self) -> RowArrays:
        """Itself."""
        return self


class RowTopology(Topology):
    """Single connections in compressed rows, with spare slots behind each row.

    Row i lives in slots ``indptr[i] : indptr[i] + row_nnz[i]``, its columns strictly ascending. The slots
    from there to ``indptr[i + 1]`` are spare: they may hold anything and are never read.

    Parameters
    ----------
    shape : (int, int)
        Rows and columns.
    indptr : int64 array, (rows + 1,)
        Where rows begin; ``indptr[-1]`` is the capacity.
    row_nnz : int64 array, (rows,)
        Live slots of each row.
    indices : uint16, int32 or int64 array, (capacity,)
        Column of each slot. Kept as the narrowest dtype that holds every column of the shape.

    Raises
    ------
    TypeError, ValueError
        Unless every invariant holds, naming the argument. The arrays are copied.
    """

    layout: ClassVar[str] = "csr"
    indptr: Array
    row_nnz: Array
    indices: Array

    def __init__(self, shape: tuple[int, int], indptr: Array, row_nnz: Array, indices: Array) -> None:
        super().__init__()
        self._shape = check_shape(shape)
        check_array("indptr", indptr, (np.dtype(np.int64),), (self._shape[0] + 1,))
        check_array("row_nnz", row_nnz, (np.dtype(np.int64),), (self._shape[0],))
        self._own(indptr.copy(), row_nnz.copy())
        check_array("indices", indices, INDEX_DTYPES, (self.capacity,))
        self.indices = indices.copy()
        self.check()
        # After the check, so that no column can wrap around; spare slots may hold anything.
        narrow = index_dtype(self._shape[1])
        if narrow != indices.dtype:
            self.__dict__["indices"] = indices.astype(narrow)
        self.__dict__["indices"] = frozen(self.indices)

    @classmethod
    def adopt(cls, shape: tuple[int, int], indptr: Array, row_nnz: Array, indices: Array) -> RowTopology:
        """As the constructor, for arrays that are valid and that nobody will write to: nothing is copied.

        Wrong ones make kernels read memory that is not theirs. `check` checks them.

        Parameters
        ----------
        shape : (int, int)
        indptr : int64 array, (rows + 1,)
        row_nnz : int64 array, (rows,)
        indices : array of ``index_dtype(columns)``, (capacity,)
        """
        self = object.__new__(cls)
        Topology.__init__(self)
        self._shape = shape
        self._own(indptr, row_nnz)
        self.indices = frozen(np.ascontiguousarray(indices))
        return self

    def _own(self, indptr: Array, row_nnz: Array) -> None:
        self.indptr = frozen(np.ascontiguousarray(indptr))
        self.row_nnz = frozen(np.ascontiguousarray(row_nnz))
        #: Allocated slots.
        self.capacity = int(self.indptr[-1])
        self._nnz = int(self.row_nnz.sum())

    @classmethod
    def from_sorted(cls, shape: tuple[int, int], counts: Array, columns: Array, padding: float = 0.0) -> Any:
        """Rows of some lengths, with these columns one row after the other, and spare slots.

        Parameters
        ----------
        shape : (int, int)
        counts : int array, (rows,)
        columns : int array, (counts.sum(),)
            Of any integer dtype, checked before it is narrowed.
        padding : float
            Spare slots per row, as a fraction of the row's entries (rounded up).

        Returns
        -------
        RowTopology
        int64 array, (counts.sum(),)
            Slot of each column.

        Raises
        ------
        ValueError
            If padding is not a finite number of at least 0, or columns are out of range or not strictly
            ascending within a row.
        """
        if not 0 <= padding < np.inf:
            raise ValueError(f"padding must be a finite number of at least 0, got {padding}")
        rows, n_columns = check_shape(shape)
        if len(columns) and not (int(columns.min()) >= 0 and int(columns.max()) < n_columns):
            worst = int(columns.max()) if int(columns.max()) >= n_columns else int(columns.min())
            raise ValueError(f"indices must be columns of 0..{n_columns - 1}, got {worst}")
        row_nnz = counts.astype(np.int64)
        tight, indptr = np.zeros((2, rows + 1), np.int64)
        np.cumsum(row_nnz, out=tight[1:])
        np.cumsum(row_nnz + np.ceil(row_nnz * padding).astype(np.int64), out=indptr[1:])
        slots = np.repeat(indptr[:-1] - tight[:-1], row_nnz) + np.arange(tight[-1])
        indices = np.zeros(indptr[-1], index_dtype(n_columns))
        indices[slots] = columns
        topology = cls.adopt((rows, n_columns), indptr, row_nnz, indices)
        topology.check()
        return topology, slots

    @classmethod
    def from_positions(cls, shape: tuple[int, int], positions: ArrayLike) -> RowTopology:
        """Connections at given positions, without spare slots.

        Parameters
        ----------
        shape : (int, int)
        positions : int array, (nnz,)
            ``row * columns + column``, strictly ascending.

        Raises
        ------
        TypeError, ValueError
            If they are not that.
        """
        shape = check_shape(shape)
        positions = np.asarray(positions)
        if positions.size == 0:
            positions = np.empty(0, np.int64)
        if positions.ndim != 1 or positions.dtype.kind not in "iu":
            raise TypeError(
                f"positions must be a 1-D integer array, got {positions.dtype} of shape {positions.shape}"
            )
        size = shape[0] * shape[1]
        if len(positions) and not (int(positions[0]) >= 0 and int(positions[-1]) < size):
            wrong = int(positions[0]) if positions[0] < 0 else int(positions[-1])
            raise ValueError(f"positions must lie in 0..{size - 1}, got {wrong}")
        if np.any(positions[1:] <= positions[:-1]):
            raise ValueError("positions must be strictly ascending")
        row, column = np.divmod(positions.astype(np.int64, copy=False), max(shape[1], 1))
        topology: RowTopology = cls.from_sorted(shape, np.bincount(row, minlength=shape[0]), column)[0]
        return topology

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._shape

    @property
    def nnz(self) -> int:
        """Live connections."""
        return self._nnz

    @property
    def values_shape(self) -> tuple[int, ...]:
        """``(capacity,)``."""
        return (self.capacity,)

    @property
    def rows(self) -> RowArrays:
        """The arrays as compiled code reads them, not marked read-only; never to be written to."""
        return self.plan("rows", _row_arrays)

    def live_slots(self) -> Array:
        """int64 array (nnz,): the live slots, in row-major order of their connections."""
        if self.capacity == self.nnz:
            return np.arange(self.nnz)
        before = np.cumsum(self.row_nnz) - self.row_nnz
        return np.repeat(self.indptr[:-1] - before, self.row_nnz) + np.arange(self.nnz)

    def row_of_slots(self) -> Array:
        """int64 array (nnz,): row of each live slot."""
        return np.repeat(np.arange(self.shape[0], dtype=np.int64), self.row_nnz)

    def positions(self) -> Array:
        """int64 array (nnz,): ``row * columns + column`` of the live slots, ascending."""
        return self.row_of_slots() * self.shape[1] + self.indices[self.live_slots()]

    def transposed(self) -> tuple[RowTopology, Array]:
        """The topology of W^T without spare slots, and the slot of W that each of its slots stands for."""
        slots = self.live_slots()
        columns = self.indices[slots]
        order = np.argsort(columns, kind="stable")
        counts = np.bincount(columns, minlength=self.shape[1])
        turned, _ = self.from_sorted(self.shape[::-1], counts, self.row_of_slots()[order])
        return turned, slots[order]

    def rewrite(self, drop: Array, grow: Array, *, compact: bool = False) -> tuple[RowTopology, Array]:
        """Another topology; see `Topology.rewrite`."""
        indptr, row_nnz, indices, source = rewrite_rows(self.rows, drop, grow, compact)
        return self.adopt(self.shape, indptr, row_nnz, indices), source

    def check(self) -> None:
        """Raise TypeError or ValueError, naming the array, unless every invariant holds."""
        # Compared, not subtracted: a difference of hostile numbers can wrap around to a harmless one.
        if self.indptr[0] < 0 or np.any(self.indptr[1:] < self.indptr[:-1]):
            raise ValueError("indptr must start at 0 or above and never decrease")
        over = (self.row_nnz < 0) | (self.row_nnz > np.diff(self.indptr))
        if np.any(over):
            row = int(np.argmax(over))
            space = int(self.indptr[row + 1] - self.indptr[row])
            raise ValueError(
                f"row_nnz[{row}] must be between 0 and the row's {space} slots, got {self.row_nnz[row]}"
            )
        check_array("indices", self.indices, INDEX_DTYPES, (self.capacity,))
        self._check_columns()

    def _check_columns(self) -> None:
        columns = self.shape[1]
        index = self.indices if self.nnz == self.capacity else self.indices[self.live_slots()]
        # As int64 only for the two offending numbers: the array itself may be narrow and unsigned.
        if len(index) and (int(index.max()) >= columns or int(index.min()) < 0):
            worst = int(index.max()) if int(index.max()) >= columns else int(index.min())
            raise ValueError(f"indices must be columns of 0..{columns - 1}, got {worst}")
        rising = index[1:] > index[:-1]
        begins = np.cumsum(self.row_nnz)[:-1]
        rising[begins[(begins > 0) & (begins < len(index))] - 1] = True
        if not np.all(rising):
            k = int(np.argmin(rising))
            row = int(np.searchsorted(np.cumsum(self.row_nnz), k, side="right"))
            raise ValueError(
                "indices must be strictly ascending within a row, "
                f"got {index[k]} before {index[k + 1]} in row {row}"
            )

    def __repr__(self) -> str:
        return f"RowTopology(shape={self.shape}, nnz={self.nnz}, capacity={self.capacity})"


def _row_arrays(topology: RowTopology) -> RowArrays:
    indptr, row_nnz, indices = map(for_kernels, (topology.indptr, topology.row_nnz, topology.indices))
    return RowArrays(topology.shape, indptr, row_nnz, indices, topology.nnz)


class PaddedCSR(SparseMatrix):
    """A sparse matrix whose rows may have room to grow: a `RowTopology` and a value for each slot.

    Without spare slots this is SciPy's CSR.

    Parameters
    ----------
    shape : (int, int)
        Rows (``out_features``) and columns (``in_features``).
    indptr : int64 array, (rows + 1,)
        Where rows begin; ``indptr[-1]`` is the capacity. Copied.
    row_nnz : int64 array, (rows,)
        Live slots of each row: row i is slots ``indptr[i] : indptr[i] + row_nnz[i]``. Copied.
    indices : uint16, int32 or int64 array, (capacity,)
        Column of each slot, strictly ascending within a row. Copied.
    values : float32 or float64 array, (capacity,)
        Weight of each slot. Not copied; it may be written to.

    Raises
    ------
    TypeError, ValueError
        If an argument is not that.

    Examples
    --------
    >>> W = PaddedCSR.from_dense([[0.0, 2.0], [3.0, 0.0]])
    >>> W.nnz, W.sparsity, W.indices
    (2, 0.5, array([1, 0], dtype=uint16))
    """

    topology: RowTopology

    def __init__(
        self, shape: tuple[int, int], indptr: Array, row_nnz: Array, indices: Array, values: Array
    ) -> None:
        new = self.of(RowTopology(shape, indptr, row_nnz, indices), values)
        object.__setattr__(self, "topology", new.topology)
        object.__setattr__(self, "values", new.values)

    @classmethod
    def from_dense(cls, matrix: ArrayLike, *, padding: float = 0.0) -> PaddedCSR:
        """The nonzero entries of a dense matrix.

        Parameters
        ----------
        matrix : float array, (rows, columns)
            Anything but float64 becomes float32.
        padding : float
            Spare slots per row, as a fraction of the row's entries (rounded up).
        """
        dense = np.asarray(matrix)
        if dense.ndim != 2:
            raise ValueError(f"matrix must have 2 dimensions, got shape {dense.shape}")
        dense = dense.astype(np.float64 if dense.dtype == np.float64 else np.float32, copy=False)
        rows, columns = np.nonzero(dense)
        counts = np.bincount(rows, minlength=dense.shape[0])
        return cls._from_sorted(
            (dense.shape[0], dense.shape[1]), counts, columns, dense[rows, columns], padding
        )

    @classmethod
    def from_scipy(cls, matrix: Any, *, padding: float = 0.0) -> PaddedCSR:
        """The stored entries of a SciPy sparse matrix of any format; stored zeros stay connections."""
        csr = matrix.tocsr().copy()
        csr.sum_duplicates()
        dtype = np.float64 if csr.dtype == np.float64 else np.float32
        return cls._from_sorted(csr.shape, np.diff(csr.indptr), csr.indices, csr.data.astype(dtype), padding)

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        sparsity: float,
        seed: int | np.random.Generator | None = None,
        *,
        padding: float = 0.0,
        dtype: DTypeLike = np.float32,
    ) -> PaddedCSR:
        """Uniformly random connections with standard normal values.

        Exactly ``round((1 - sparsity) * rows * columns)`` of them; every such set is equally likely. Memory
        is O(nnz): no array of rows x columns is made.
        """
        rows, columns = check_shape(shape)
        rng = np.random.default_rng(seed)
        positions = sample_distinct(rng, rows * columns, n_connections((rows, columns), sparsity))
        row = positions // max(columns, 1)
        values: Array = rng.standard_normal(len(positions), dtype=np.dtype(dtype))  # type: ignore[arg-type]
        counts = np.bincount(row, minlength=rows)
        return cls._from_sorted((rows, columns), counts, positions - row * columns, values, padding)

    @classmethod
    def _from_sorted(
        cls, shape: tuple[int, int], counts: Array, columns: Array, values: Array, padding: float
    ) -> PaddedCSR:
        topology, slots = RowTopology.from_sorted(shape, counts, columns, padding)
        weights = np.zeros(topology.capacity, values.dtype)
        weights[slots] = values
        return cls.of(topology, weights)

    @property
    def indptr(self) -> Array:
        """int64 array (rows + 1,): where rows begin. Read-only."""
        return self.topology.indptr

    @property
    def row_nnz(self) -> Array:
        """int64 array (rows,): live slots of each row. Read-only."""
        return self.topology.row_nnz

    @property
    def indices(self) -> Array:
        """uint16, int32 or int64 array (capacity,): column of each slot. Read-only."""
        return self.topology.indices

    @property
    def capacity(self) -> int:
        """Allocated slots."""
        return self.topology.capacity

    def live_slots(self) -> Array:
        """int64 array (nnz,): the live slots, in row-major order of their connections."""
        return self.topology.live_slots()

    def transpose(self) -> PaddedCSR:
        """W^T, without spare slots."""
        topology, slots = self.topology.transposed()
        return self.of(topology, self.values[slots])

    def to_dense(self) -> Array:
        """Dense array, ``(rows, columns)``."""
        dense = np.zeros(self.shape, self.values.dtype)
        slots = self.live_slots()
        dense[self.topology.row_of_slots(), self.indices[slots]] = self.values[slots]
        return dense

    def to_scipy(self) -> scipy.sparse.csr_array:
        """SciPy CSR array, without the spare slots.

        Raises
        ------
        ModuleNotFoundError
            If SciPy is not installed.
        """
        sparse = scipy_sparse()
        slots = self.live_slots()
        indptr = np.concatenate([[0], np.cumsum(self.row_nnz)])
        columns = self.indices[slots].astype(slot_dtype(max(self.shape)))
        return sparse.csr_array((self.values[slots], columns, indptr), shape=self.shape)

    def padded(self, padding: float) -> PaddedCSR:
        """A copy with spare slots: per row a fraction of its entries, rounded up."""
        slots = self.live_slots()
        return self._from_sorted(self.shape, self.row_nnz, self.indices[slots], self.values[slots], padding)
