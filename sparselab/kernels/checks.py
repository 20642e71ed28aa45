"""What the public functions check of their arguments, and how they return what they were given."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sparselab.kernels.arrays import VALUE_DTYPES, Array, as_array, check_array
from sparselab.kernels.cpu.runtime.memory import aligned_empty
from sparselab.kernels.layouts.topology import SparseMatrix


def check_layout(W: object) -> None:
    """Raise TypeError unless W is a sparse matrix, ValueError if it holds values that no product may see."""
    if not isinstance(W, SparseMatrix):
        raise TypeError(f"W must be a sparse matrix such as PaddedCSR or BlockCSR, got {type(W).__name__}")
    # An array can be given another shape or dtype in place.
    check_array("W.values", W.values, VALUE_DTYPES, W.topology.values_shape)
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
    plain = _check_dtype(name, array, dtype)
    expected = f"({shape[0]}, {'tokens' if shape[1] is None else shape[1]})"
    if plain.ndim != 2 or plain.shape[0] != shape[0] or shape[1] not in (None, plain.shape[1]):
        raise ValueError(f"{name} must have shape {expected}, got {plain.shape}")
    return plain if _is_regular(plain) else plain.copy(order="K")


def check_vector(name: str, array: object, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """The array as a plain one; TypeError or ValueError unless it has the dtype and the shape."""
    plain = _check_dtype(name, array, dtype)
    if plain.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {plain.shape}")
    return plain


def _check_dtype(name: str, array: object, dtype: np.dtype[Any]) -> Array:
    plain = as_array(name, array)
    if plain.dtype != dtype:
        raise TypeError(f"{name} must have W's dtype {dtype}, got {plain.dtype}")
    return plain


def _is_regular(array: Array) -> bool:
    return array.flags.aligned and not any(stride % array.itemsize for stride in array.strides)


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
    check_matrix("out", out, shape, W.dtype)
    plain = _check_writable(out)
    inputs = [W.values, X] if bias is None else [W.values, X, bias]
    direct = _is_regular(plain) and not _overlaps(plain, *inputs)
    return (plain if direct else np.empty(shape, W.dtype)), out


def aligned_output(out: Array | None, W: SparseMatrix, *inputs: Array) -> tuple[Array, Array]:
    """As `output`, for one entry per slot."""
    shape = W.topology.values_shape
    if out is not None:
        check_vector("out", out, shape, W.dtype)
        plain = _check_writable(out)
        if plain.flags.carray and not _overlaps(plain, *inputs):
            return plain, out
    dW = aligned_empty(math.prod(shape), W.dtype).reshape(shape)
    return dW, dW if out is None else out


def _check_writable(out: Array) -> Array:
    plain = as_array("out", out)
    if not plain.flags.writeable:
        raise ValueError("out must be writable, got a read-only array")
    if _overlaps_itself(plain):
        raise ValueError(
            "out must have memory of its own for each entry, "
            f"got strides {plain.strides} of shape {plain.shape}"
        )
    return plain


def _overlaps(out: Array, *others: Array) -> bool:
    return any(np.may_share_memory(out, other) for other in others)


def _overlaps_itself(out: Array) -> bool:
    """Whether entries share memory, as in a broadcast array; False for any part of an ordinary array."""
    reach = out.itemsize
    for stride, n in sorted((abs(stride), n) for stride, n in zip(out.strides, out.shape, strict=True)):
        if n > 1 and stride < reach:
            return out.size > 0
        reach += stride * max(n - 1, 0)
    return False


def finish(written: Array, result: Array) -> Array:
    """The result, filled with what was written elsewhere."""
    if not np.may_share_memory(written, result):
        result[...] = written
    return result
