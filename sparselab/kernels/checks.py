"""What the public functions check of their arguments, and how they return what they were given."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.runtime.memory import aligned_empty
from sparselab.kernels.layouts.topology import SparseMatrix


def check_layout(W: object) -> None:
    """Raise TypeError unless W is a sparse matrix, ValueError if it holds values that no product may see."""
    if not isinstance(W, SparseMatrix):
        raise TypeError(f"W must be a sparse matrix such as PaddedCSR or BlockCSR, got {type(W).__name__}")
    if W.values.shape != W.topology.values_shape:  # ndarray.resize changes an array in place
        raise ValueError(f"W.values must have shape {W.topology.values_shape}, got {W.values.shape}")
    W.check_values()


def check_matrix(name: str, array: object, shape: tuple[int, int | None], dtype: np.dtype[Any]) -> Array:
    """The array, or an aligned copy: strides of a packed record's field are no whole number of items.

    Parameters
    ----------
    name : str
        Of the argument.
    array : object
        What came.
    shape : (int, int or None)
        What it must have; None stands for any number of tokens.
    dtype : numpy.dtype
        What it must have.
    """
    _check_dtype(name, array, dtype)
    assert isinstance(array, np.ndarray)
    expected = f"({shape[0]}, {'tokens' if shape[1] is None else shape[1]})"
    if array.ndim != 2 or array.shape[0] != shape[0] or shape[1] not in (None, array.shape[1]):
        raise ValueError(f"{name} must have shape {expected}, got {array.shape}")
    return array if _is_regular(array) else array.copy(order="K")


def check_vector(name: str, array: object, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """The array; TypeError or ValueError unless it has the dtype and the shape."""
    _check_dtype(name, array, dtype)
    assert isinstance(array, np.ndarray)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    return array


def _check_dtype(name: str, array: object, dtype: np.dtype[Any]) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
    if array.dtype != dtype:
        raise TypeError(f"{name} must have W's dtype {dtype}, got {array.dtype}")


def _is_regular(array: Array) -> bool:
    return array.flags.aligned and not any(stride % array.itemsize for stride in array.strides)


def _check_writable(out: Array) -> None:
    if not out.flags.writeable:
        raise ValueError("out must be writable, got a read-only array")


def check_integers(name: str, array: object) -> Array:
    """A copy as int32 or int64; TypeError or ValueError unless the array is 1-D and has integers that fit."""
    integers = np.asarray(array)
    if integers.size == 0:
        return np.empty(0, np.int64)
    if integers.ndim != 1 or integers.dtype.kind not in "iu":
        raise TypeError(f"{name} must be a 1-D integer array, got {integers.dtype} of shape {integers.shape}")
    if integers.dtype == np.uint64 and int(integers.max()) >= 1 << 63:
        raise ValueError(f"{name} must hold numbers below 2**63, got {int(integers.max())}")
    return np.array(integers, np.int32 if integers.dtype == np.int32 else np.int64, order="C")


def ascending(integers: Array) -> Array:
    """The integers in ascending order."""
    return np.sort(integers) if np.any(integers[1:] < integers[:-1]) else integers


def output(
    out: Array | None, shape: tuple[int, int], W: SparseMatrix, X: Array, bias: Array | None = None
) -> tuple[Array, Array]:
    """The array to write and the array to return; they differ where a kernel cannot write to `out` itself."""
    if out is None:
        token_major = abs(X.strides[0]) < abs(X.strides[1]) if X.size else False
        Y = np.empty(shape, W.dtype, order="F" if token_major else "C")
        return Y, Y
    regular = check_matrix("out", out, shape, W.dtype) is out
    _check_writable(out)
    inputs = [W.values, X] if bias is None else [W.values, X, bias]
    direct = regular and not _overlaps_itself(out) and not _overlaps(out, *inputs)
    return (out if direct else np.empty(shape, W.dtype)), out


def aligned_output(out: Array | None, W: SparseMatrix, *inputs: Array) -> tuple[Array, Array]:
    """As `output`, for one entry per slot."""
    shape = W.topology.values_shape
    if out is not None:
        check_vector("out", out, shape, W.dtype)
        _check_writable(out)
        if out.flags.carray and not _overlaps(out, *inputs):
            return out, out
    dW = aligned_empty(int(np.prod(shape)), W.dtype).reshape(shape)
    return dW, dW if out is None else out


def _overlaps(out: Array, *others: Array) -> bool:
    return any(np.may_share_memory(out, other) for other in others)


def _overlaps_itself(out: Array) -> bool:
    """Whether two entries may worker memory, as in a broadcast array."""
    (n, m), (a, b) = out.shape, (abs(stride) for stride in out.strides)
    if n * m <= 1:
        return False
    small, large, count = (a, b, n) if a <= b else (b, a, m)
    crosswise = n > 1 and m > 1
    return (n > 1 and a == 0) or (m > 1 and b == 0) or (crosswise and small * (count - 1) >= large)


def finish(written: Array, result: Array) -> Array:
    """The result, filled with what was written elsewhere."""
    if written is not result:
        result[...] = written
    return result
