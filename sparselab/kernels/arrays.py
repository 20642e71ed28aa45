"""Arrays, and the few rules about them that every part of the kernels follows."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

Array = NDArray[Any]

VALUE_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
#: Arrays without entries, which tell a kernel the dtype of an address; uint16 are the bits of bfloat16.
NONE_OF = {np.dtype(name): np.empty(0, name) for name in (np.float32, np.float64, np.uint16, np.int8)}
INDEX_DTYPES = (np.dtype(np.uint16), np.dtype(np.int32), np.dtype(np.int64))


class Rows(Protocol):
    """Compressed rows, as kernels read them.

    Row i has its columns, strictly ascending, in ``indices[indptr[i] : indptr[i] + row_nnz[i]]``.
    """

    @property
    def rows(self) -> Rows:
        """The same with arrays that compiled code takes: not marked read-only, never to be written to."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @property
    def indptr(self) -> Array:
        """int64 (rows + 1,): where rows begin; its last entry is the number of slots."""

    @property
    def row_nnz(self) -> Array:
        """int64 (rows,): live slots of each row."""

    @property
    def indices(self) -> Array:
        """uint16, int32 or int64 (slots,): column of each slot."""

    @property
    def nnz(self) -> int:
        """Live slots."""


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


def address(array: Array) -> int:
    """Where the array's first entry is (``ndarray.ctypes.data`` takes 6 us)."""
    return int(array.__array_interface__["data"][0])


class _Alias:
    """The memory of an array, for NumPy to make another array of."""

    def __init__(self, array: Array) -> None:
        self._array = array
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def for_kernels(array: Array) -> Array:
    """A C-contiguous array with the entries, for kernels to read: a copy only if the array is not contiguous.

    Numba compiles a kernel anew for arrays that are marked read-only, so the mark is left out. Kernels write
    to outputs only.
    """
    if not (array.flags.c_contiguous and array.flags.aligned):
        return np.array(array, order="C")
    if array.flags.writeable:
        return array
    if not array.size:
        return np.empty(array.shape, array.dtype)
    alias: Array = np.asarray(_Alias(array))
    return alias


def frozen(array: Array) -> Array:
    """A view of the array that nobody can write to, nor make writable again; itself if it is one."""
    view: Array = array.view()
    try:
        view.flags.writeable = True
    except ValueError:
        return array
    if not array.size:
        view.flags.writeable = False
        return view
    octets: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    whole: Array = np.frombuffer(memoryview(octets).toreadonly(), array.dtype)
    return whole.reshape(array.shape)


def n_connections(shape: tuple[int, int], sparsity: float) -> int:
    """Exact number of live connections of a matrix at a sparsity: ``round((1 - sparsity) * rows * columns)``.

    Raises
    ------
    TypeError, ValueError
        Unless sparsity is a finite number in [0, 1].
    """
    check_fraction("sparsity", sparsity)
    return round((1 - float(sparsity)) * shape[0] * shape[1])


def check_fraction(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless the value is a number in [0, 1]."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a number in [0, 1], got {value!r}")
    if not 0 <= value <= 1:  # also refuses NaN
        raise ValueError(f"{name} must be a finite number in [0, 1], got {value}")


def check_shape(shape: object) -> tuple[int, int]:
    """The shape as two ints; TypeError or ValueError if it is not two sizes whose product fits int64."""
    if not (isinstance(shape, (tuple, list)) and len(shape) == 2) or not all(
        isinstance(size, (int, np.integer)) and not isinstance(size, bool) for size in shape
    ):
        raise TypeError(f"shape must be two integers, got {shape!r}")
    rows, columns = int(shape[0]), int(shape[1])
    if min(rows, columns) < 0:
        raise ValueError(f"shape must be two sizes of at least 0, got {(rows, columns)}")
    if rows * columns >= 1 << 63:
        raise ValueError(f"shape must have fewer than 2**63 positions, got {(rows, columns)}")
    return rows, columns


def as_array(name: str, array: object) -> Array:
    """The same memory as a plain `numpy.ndarray`; TypeError if it is no array, or has a mask to be lost."""
    if type(array) is np.ndarray:
        return array
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} must be an array without a mask, got a MaskedArray; fill it first")
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
    return array.view(np.ndarray)


def check_array(name: str, array: object, dtypes: tuple[np.dtype[Any], ...], shape: tuple[int, ...]) -> Array:
    """The array as a plain one; TypeError or ValueError unless it has one of the dtypes and the shape."""
    plain = as_array(name, array)
    if plain.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must have dtype {expected}, got {plain.dtype}")
    if plain.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {plain.shape}")
    return plain


def check_integers(name: str, array: ArrayLike) -> Array:
    """As a contiguous int32 or int64 array; TypeError or ValueError unless 1-D and of integers that fit."""
    integers = _without_mask(name, array)
    if integers.size == 0:
        return np.empty(0, np.int64)
    if integers.ndim != 1 or integers.dtype.kind not in "iu":
        raise TypeError(f"{name} must be a 1-D integer array, got {integers.dtype} of shape {integers.shape}")
    if integers.dtype.kind == "u" and int(integers.max()) >= 1 << 63:
        raise ValueError(f"{name} must hold numbers below 2**63, got {int(integers.max())}")
    return np.ascontiguousarray(integers, np.int32 if integers.dtype == np.int32 else np.int64)


def check_dense(name: str, matrix: ArrayLike) -> Array:
    """As a matrix of float64 if that is what it holds, else float32; an error if it is no real matrix."""
    dense = _without_mask(name, matrix)
    if dense.ndim != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {dense.shape}")
    return dense.astype(float_dtype(name, dense.dtype), copy=False)


def float_dtype(name: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """float64 for float64 of any byte order, float32 for other real numbers; TypeError for the rest."""
    if dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold real numbers, got {dtype}")
    return np.dtype(np.float64 if dtype.kind == "f" and dtype.itemsize == 8 else np.float32)


def check_value_dtype(dtype: DTypeLike) -> Any:
    """The dtype; TypeError unless values may have it."""
    if np.dtype(dtype) not in VALUE_DTYPES:
        raise TypeError(f"dtype must be float32 or float64, got {np.dtype(dtype)}")
    return np.dtype(dtype)


def _without_mask(name: str, array: ArrayLike) -> Array:
    return as_array(name, array if isinstance(array, np.ndarray) else np.asarray(array))


def scipy_sparse() -> Any:
    """The module `scipy.sparse`, which is no dependency of this package."""
    try:
        import scipy.sparse
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "to_scipy needs scipy, which is not installed: pip install scipy", name=error.name
        ) from error
    return scipy.sparse
