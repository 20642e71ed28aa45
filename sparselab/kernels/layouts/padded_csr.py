"""Padded CSR: where the connections are and what they weigh."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

if TYPE_CHECKING:
    import scipy.sparse

Array = NDArray[Any]

VALUE_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
_INDEX_DTYPES = (np.dtype(np.uint16), np.dtype(np.int32), np.dtype(np.int64))


def index_dtype(n_columns: int) -> np.dtype[Any]:
    """Narrowest column dtype for `n_columns` columns: uint16 up to 65,536, then int32, then int64."""
    if n_columns <= 1 << 16:
        return np.dtype(np.uint16)
    return slot_dtype(n_columns)


def slot_dtype(n_slots: int) -> np.dtype[Any]:
    """int32 where slot numbers and counts up to `n_slots` fit, else int64."""
    return np.dtype(np.int32 if n_slots < 1 << 31 else np.int64)


def strides(matrix: Array) -> tuple[int, int]:
    """Strides in items."""
    return matrix.strides[0] // matrix.itemsize, matrix.strides[1] // matrix.itemsize


@dataclass(frozen=True, eq=False)
class PaddedCSR:
    """A sparse matrix whose rows may have room to grow.

    Row i lives in slots ``indptr[i] : indptr[i] + row_nnz[i]``, its columns strictly ascending. The slots
    from there to ``indptr[i + 1]`` are spare: they may hold anything and are never read. Without spare slots
    this is SciPy's CSR.

    Parameters
    ----------
    shape : (int, int)
        Rows (``out_features``) and columns (``in_features``).
    indptr : int64 array, (rows + 1,)
        Where rows begin; ``indptr[-1]`` is the capacity.
    row_nnz : int64 array, (rows,)
        Live slots of each row.
    indices : uint16, int32 or int64 array, (capacity,)
        Column of each slot.
    values : float32 or float64 array, (capacity,)
        Weight of each slot.

    Raises
    ------
    TypeError, ValueError
        From `check`, which the constructor calls: the kernels run without bounds checks.

    Examples
    --------
    >>> W = PaddedCSR.from_dense([[0.0, 2.0], [3.0, 0.0]])
    >>> W.nnz, W.sparsity, W.indices
    (2, 0.5, array([1, 0], dtype=uint16))
    """

    shape: tuple[int, int]
    indptr: Array
    row_nnz: Array
    indices: Array
    values: Array

    def __post_init__(self) -> None:
        self.check()

    @classmethod
    def unchecked(
        cls, shape: tuple[int, int], indptr: Array, row_nnz: Array, indices: Array, values: Array
    ) -> PaddedCSR:
        """As the constructor, for a topology that was checked before. A wrong one reads out of bounds."""
        self = object.__new__(cls)
        fields = {"shape": shape, "indptr": indptr, "row_nnz": row_nnz, "indices": indices, "values": values}
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        return self

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
        return cls._from_sorted(
            (dense.shape[0], dense.shape[1]), np.bincount(rows, minlength=dense.shape[0]), columns,
            dense[rows, columns], padding,
        )  # fmt: skip

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

        Exactly `n_connections(shape, sparsity)` of them; every such set is equally likely. Memory is O(nnz):
        no array of rows x columns is made.
        """
        from sparselab.kernels.layouts.sampling import sample_distinct

        rows, columns = shape
        rng = np.random.default_rng(seed)
        positions = sample_distinct(rng, rows * columns, n_connections(shape, sparsity))
        row = positions // max(columns, 1)
        values: Array = rng.standard_normal(len(positions), dtype=np.dtype(dtype))  # type: ignore[arg-type]
        counts = np.bincount(row, minlength=rows)
        return cls._from_sorted((rows, columns), counts, positions - row * columns, values, padding)

    @classmethod
    def from_positions(cls, shape: tuple[int, int], positions: Array) -> PaddedCSR:
        """Connections at given positions, with values of 0 (float32) and without spare slots.

        Parameters
        ----------
        shape : (int, int)
        positions : int array, (nnz,)
            ``row * columns + column``, strictly ascending.
        """
        row, column = np.divmod(positions, max(shape[1], 1))
        counts = np.bincount(row, minlength=shape[0])
        return cls._from_sorted(shape, counts, column, np.zeros(len(positions), np.float32), 0.0)

    @classmethod
    def _from_sorted(
        cls, shape: tuple[int, int], counts: Array, columns: Array, values: Array, padding: float
    ) -> PaddedCSR:
        if not 0 <= padding < np.inf:
            raise ValueError(f"padding must be a finite number >= 0, got {padding}")
        shape = (int(shape[0]), int(shape[1]))
        row_nnz = counts.astype(np.int64)
        tight = np.zeros(shape[0] + 1, np.int64)
        np.cumsum(row_nnz, out=tight[1:])
        indptr = np.zeros(shape[0] + 1, np.int64)
        np.cumsum(row_nnz + np.ceil(row_nnz * padding).astype(np.int64), out=indptr[1:])
        slots = np.repeat(indptr[:-1] - tight[:-1], row_nnz) + np.arange(tight[-1])
        indices = np.zeros(indptr[-1], index_dtype(shape[1]))
        weights = np.zeros(indptr[-1], values.dtype)
        indices[slots], weights[slots] = columns, values
        return cls(shape, indptr, row_nnz, indices, weights)

    @property
    def nnz(self) -> int:
        """Live connections."""
        return int(self.row_nnz.sum())

    @property
    def capacity(self) -> int:
        """Allocated slots."""
        return len(self.values)

    @property
    def density(self) -> float:
        """Fraction of positions that are live (1 for a matrix without positions)."""
        size = self.shape[0] * self.shape[1]
        return self.nnz / size if size else 1.0

    @property
    def sparsity(self) -> float:
        """``1 - density``."""
        return 1.0 - self.density

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the values."""
        return self.values.dtype

    def live_slots(self) -> Array:
        """int64 array (nnz,): the live slots, in row-major order of their connections."""
        if self.capacity == self.nnz:
            return np.arange(self.nnz)
        before = np.cumsum(self.row_nnz) - self.row_nnz
        return np.repeat(self.indptr[:-1] - before, self.row_nnz) + np.arange(self.nnz)

    def positions(self) -> Array:
        """int64 array (nnz,): ``row * columns + column`` of the live slots, ascending."""
        row = np.repeat(np.arange(self.shape[0], dtype=np.int64), self.row_nnz)
        return row * self.shape[1] + self.indices[self.live_slots()]

    def with_values(self, values: Array) -> PaddedCSR:
        """The same topology (shared, not copied) with other values, ``(capacity,)``."""
        _check_array("values", values, VALUE_DTYPES, self.capacity)
        return self.unchecked(self.shape, self.indptr, self.row_nnz, self.indices, values)

    def astype(self, dtype: DTypeLike) -> PaddedCSR:
        """The same topology with values of another dtype (float32 or float64)."""
        return self.with_values(self.values.astype(dtype))

    def transpose(self) -> PaddedCSR:
        """W^T, without spare slots."""
        row = np.repeat(np.arange(self.shape[0]), self.row_nnz)
        slots = self.live_slots()
        columns = self.indices[slots]
        order = np.argsort(columns, kind="stable")
        counts = np.bincount(columns, minlength=self.shape[1])
        return self._from_sorted(self.shape[::-1], counts, row[order], self.values[slots][order], 0.0)

    def to_dense(self) -> Array:
        """Dense array, ``(rows, columns)``."""
        dense = np.zeros(self.shape, self.values.dtype)
        slots = self.live_slots()
        dense[np.repeat(np.arange(self.shape[0]), self.row_nnz), self.indices[slots]] = self.values[slots]
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

    def check(self) -> None:
        """Raise TypeError or ValueError, naming the field, unless every invariant holds."""
        if len(self.shape) != 2 or min(self.shape) < 0:
            raise ValueError(f"shape must be two sizes >= 0, got {self.shape}")
        rows, columns = self.shape
        _check_array("indptr", self.indptr, (np.dtype(np.int64),), rows + 1)
        _check_array("row_nnz", self.row_nnz, (np.dtype(np.int64),), rows)
        # Compared, not subtracted: a difference of hostile numbers can wrap around to a harmless one.
        if self.indptr[0] < 0 or np.any(self.indptr[1:] < self.indptr[:-1]):
            raise ValueError("indptr must start at 0 or above and never decrease")
        capacity = int(self.indptr[-1])
        _check_array("indices", self.indices, _INDEX_DTYPES, capacity)
        _check_array("values", self.values, VALUE_DTYPES, capacity)
        over = (self.row_nnz < 0) | (self.row_nnz > np.diff(self.indptr))
        if np.any(over):
            row = int(np.argmax(over))
            space = int(self.indptr[row + 1] - self.indptr[row])
            raise ValueError(
                f"row_nnz[{row}] must be between 0 and the row's {space} slots, got {self.row_nnz[row]}"
            )
        self._check_columns(columns)

    def _check_columns(self, columns: int) -> None:
        live = self.live_slots()
        index = self.indices if len(live) == self.capacity else self.indices[live]
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
        return (
            f"PaddedCSR(shape={self.shape}, nnz={self.nnz}, sparsity={self.sparsity:.4f}, dtype={self.dtype})"
        )

    def padded(self, padding: float) -> PaddedCSR:
        """A copy with spare slots: per row a fraction of its entries, rounded up."""
        slots = self.live_slots()
        return self._from_sorted(self.shape, self.row_nnz, self.indices[slots], self.values[slots], padding)

    def copy(self) -> PaddedCSR:
        """A copy that shares no memory."""
        return replace(
            self, indptr=self.indptr.copy(), row_nnz=self.row_nnz.copy(), indices=self.indices.copy(),
            values=self.values.copy(),
        )  # fmt: skip


def n_connections(shape: tuple[int, int], sparsity: float) -> int:
    """Exact number of live connections of a matrix at a sparsity: ``round((1 - sparsity) * rows * columns)``.

    Raises
    ------
    ValueError
        Unless sparsity is a finite number in [0, 1].
    """
    check_fraction("sparsity", sparsity)
    return round((1 - float(sparsity)) * shape[0] * shape[1])


def check_fraction(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless the value is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a number in [0, 1], got {value!r}")
    if not 0 <= value <= 1:  # also refuses NaN
        raise ValueError(f"{name} must be a finite number in [0, 1], got {value}")


def _check_array(name: str, array: object, dtypes: tuple[np.dtype[Any], ...], length: int) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
    if array.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must have dtype {expected}, got {array.dtype}")
    if array.ndim != 1 or len(array) != length:
        raise ValueError(f"{name} must have shape ({length},), got {array.shape}")


def scipy_sparse() -> Any:
    """The module `scipy.sparse`, which is no dependency of this package."""
    try:
        import scipy.sparse
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "to_scipy needs scipy, which is not installed: pip install scipy", name=error.name
        ) from error
    return scipy.sparse
