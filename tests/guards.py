"""Memory with forbidden pages before and behind it, and operands in any layout in such memory."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from tests.strategies import BROADCASTS, LAYOUTS

Array = np.ndarray[Any, Any]

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def room(n_bytes: int, front: bool) -> Array:
    """Zeroed bytes that end at a forbidden page, or begin behind one.

    The mapping goes when the array does, so an address that was kept for too long is forbidden as well.
    """
    pages = max(1, -(-n_bytes // PAGE))
    memory = mmap.mmap(-1, (pages + 2) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for forbidden in (start, start + (pages + 1) * PAGE):
        if _libc.mprotect(forbidden, PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    return np.frombuffer(memory, np.uint8, n_bytes, PAGE if front else (pages + 1) * PAGE - n_bytes)


def empty(shape: tuple[int, ...], dtype: DTypeLike, order: str = "C", *, front: bool = False) -> Array:
    """A guarded array."""
    dtype = np.dtype(dtype)
    memory = room(int(np.prod(shape)) * dtype.itemsize, front)
    return memory.view(dtype).reshape(shape, order=order)  # type: ignore[call-overload, no-any-return]


def guarded(array: Array, *, front: bool = False) -> Array:
    """A guarded copy in the same order."""
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    copy = empty(array.shape, array.dtype, order, front=front)
    copy[...] = array
    return copy


def matrix(shape: tuple[int, int], dtype: DTypeLike, layout: str, fill: float, *, front: bool) -> Array:
    """A guarded matrix in one of the `LAYOUTS`, every entry and what lies between them `fill`."""
    (factor, rows, tokens), order, cut = LAYOUTS[layout]
    base = empty((factor * shape[0] + rows, factor * shape[1] + tokens), dtype, order, front=front)
    base[...] = fill
    return cut(base)


def operand(rng: np.random.Generator, shape: tuple[int, int], dtype: DTypeLike, layout: str) -> Array:
    """A standard normal, read-only matrix in any layout."""
    front = bool(rng.random() < 0.5)
    if layout in BROADCASTS:
        narrow = (shape[0], min(shape[1], 1)) if layout == BROADCASTS[0] else (min(shape[0], 1), shape[1])
        return np.broadcast_to(guarded(rng.standard_normal(narrow).astype(dtype), front=front), shape)
    if layout == "unaligned":
        records = empty(shape, [("odd", np.uint8), ("number", dtype)], front=front)
        result: Array = records["number"]
    else:
        result = matrix(shape, dtype, layout, np.nan, front=front)
    result[...] = rng.standard_normal(shape)
    result.flags.writeable = False
    return result
