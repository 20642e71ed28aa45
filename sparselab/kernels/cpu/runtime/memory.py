"""Memory for kernels: work memory that is used again, and arrays on cache lines or in pages of their own."""

from __future__ import annotations

import mmap
import sys
import threading
from typing import Any

import numpy as np

from sparselab.kernels.arrays import Array, address
from sparselab.kernels.cpu.runtime.target import CACHE_LINE

_SMALLEST_MAPPING = 1 << 16

#: After so many calls `scratch` looks whether it holds much more than any of them needed.
_WINDOW = 64

#: How many times more, and how many bytes at least, are worth giving back.
_TOO_MUCH = 4
_WORTH_SHRINKING = 1 << 20


class _Scratch(threading.local):
    """The work memory of one thread, and what the calls since the last look needed of it."""

    def __init__(self) -> None:
        self.buffer = np.empty(0, np.uint8)
        self.calls = 0
        self.most = 0

    def reserve(self, n_bytes: int) -> Array:
        """At least so many bytes."""
        self.calls += 1
        self.most = max(self.most, n_bytes)
        if self.calls >= _WINDOW:
            if self.buffer.nbytes > max(_TOO_MUCH * self.most, _WORTH_SHRINKING):
                self.buffer = mapped_empty(self.most, np.dtype(np.uint8))
            self.calls = self.most = 0
        if self.buffer.nbytes < n_bytes:
            self.buffer = mapped_empty(n_bytes, np.dtype(np.uint8))
        return self.buffer


_scratch = _Scratch()


def scratch(n_rows: int, row_items: int, dtype: np.dtype[Any]) -> Array:
    """Uninitialised work memory, ``(n_rows, row_items)``, every row on a cache line.

    The memory belongs to the calling thread and is handed out again by the next call, so it must not
    outlive the kernel it was taken for. Rows start on cache lines because vector loads that straddle two
    lines run at half speed, and NumPy aligns to 16 bytes only.
    """
    stride = -(-row_items * dtype.itemsize // CACHE_LINE) * CACHE_LINE
    buffer = _scratch.reserve(n_rows * stride + CACHE_LINE)
    start = -address(buffer) % CACHE_LINE
    block = buffer[start : start + n_rows * stride]
    return block.view(dtype).reshape(n_rows, stride // dtype.itemsize)


def mapped_empty(n_items: int, dtype: np.dtype[Any]) -> Array:
    """Uninitialised 1-D array in memory pages of its own, for arrays that live long.

    Plans and scratch are made in the middle of a training step. On the C heap they would come to lie between
    activations and keep the heap from shrinking when those go: the resident set of a small GPT grew by a
    fifth. Pages of their own go back to the system with the array.
    """
    n_bytes = n_items * dtype.itemsize
    if n_bytes < _SMALLEST_MAPPING:
        return np.empty(n_items, dtype)
    return np.frombuffer(_map(n_bytes), dtype, n_items)


def _map(n_bytes: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, n_bytes)
    # Python's default is memory that a child of `os.fork` shares: both would compute in the same scratch.
    return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def aligned_empty(n_items: int, dtype: np.dtype[Any]) -> Array:
    """Uninitialised 1-D array that starts on a cache line."""
    raw = np.empty(n_items * dtype.itemsize + CACHE_LINE, np.uint8)
    start = -address(raw) % CACHE_LINE
    return raw[start : start + n_items * dtype.itemsize].view(dtype)
