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

_MOST_BLOCKS = 64

_BYTE = np.dtype(np.uint8)


class _Scratch(threading.local):
    """The work memory of one thread, and what the calls since the last look needed of it."""

    def __init__(self) -> None:
        self.buffer = np.empty(0, np.uint8)
        self.calls = 0
        self.most = 0
        #: Where its first cache line begins, and how much memory there is from there on.
        self.start = self.room = 0
        #: Blocks that were cut from the buffer, since slicing costs as much as a small product.
        self.blocks: dict[tuple[int, int, str], Array] = {}

    def block(self, n_rows: int, row_items: int, dtype: np.dtype[Any]) -> Array:
        """A block of the buffer, every row on a cache line."""
        key = n_rows, row_items, dtype.char
        found = self.blocks.get(key)
        n_bytes = self._bytes(n_rows, row_items, dtype) if found is None else found.nbytes + CACHE_LINE
        self.calls += 1
        if n_bytes > self.most:
            self.most = n_bytes
        if self.calls >= _WINDOW:
            if self.buffer.nbytes > max(_TOO_MUCH * self.most, _WORTH_SHRINKING):
                self._replace(self.most)
                found = None
            self.calls = self.most = 0
        return self._cut(key, n_bytes, dtype) if found is None else found

    def lend(self, n_bytes: int) -> int:
        """Address of so many bytes of the buffer, on a cache line."""
        own: dict[str, Any] = self.__dict__  # of this thread: one look-up that costs as much as the rest
        calls = own["calls"] = own["calls"] + 1
        if n_bytes > own["most"]:
            own["most"] = n_bytes
        if own["room"] < n_bytes or calls >= _WINDOW:
            self.block(1, n_bytes, _BYTE)
        start: int = own["start"]
        return start

    @staticmethod
    def _bytes(n_rows: int, row_items: int, dtype: np.dtype[Any]) -> int:
        return n_rows * (-(-row_items * dtype.itemsize // CACHE_LINE) * CACHE_LINE) + CACHE_LINE

    def _cut(self, key: tuple[int, int, str], n_bytes: int, dtype: np.dtype[Any]) -> Array:
        if self.buffer.nbytes < n_bytes:
            self._replace(n_bytes)
        if len(self.blocks) >= _MOST_BLOCKS:
            self.blocks.clear()
        start = -address(self.buffer) % CACHE_LINE
        whole = self.buffer[start : start + n_bytes - CACHE_LINE].view(dtype)
        block = self.blocks[key] = whole.reshape(key[0], len(whole) // max(key[0], 1))
        return block

    def _replace(self, n_bytes: int) -> None:
        self.blocks.clear()
        self.buffer = mapped_empty(n_bytes, _BYTE)
        at = address(self.buffer)
        offset = -at % CACHE_LINE
        self.start, self.room = at + offset, n_bytes - offset


_scratch, _values, _gradient, _hidden = _Scratch(), _Scratch(), _Scratch(), _Scratch()

#: ``lend(n_bytes)``: address of so many bytes of the memory of `scratch`, on a cache line.
lend = _scratch.lend


def scratch(n_rows: int, row_items: int, dtype: np.dtype[Any]) -> Array:
    """Uninitialised work memory, ``(n_rows, row_items)``, every row on a cache line.

    The memory belongs to the calling thread and is handed out again by the next call, so it must not
    outlive the kernel it was taken for. Rows start on cache lines because vector loads that straddle two
    lines run at half speed, and NumPy aligns to 16 bytes only.
    """
    return _scratch.block(n_rows, row_items, dtype)


def scratch_of_values(n_items: int, dtype: np.dtype[Any]) -> Array:
    """Uninitialised work memory for at least so many items, beside that of `scratch`, on a cache line.

    For values brought into another order, which a product reads together with its `scratch`. Handed out again
    by the next call.
    """
    row: Array = _values.block(1, n_items, dtype)[0]
    return row


def scratch_of_weights(n_rows: int, row_items: int, dtype: np.dtype[Any]) -> Array:
    """As `scratch_of_values`, and in the same memory, for several arrays at a time."""
    return _values.block(n_rows, row_items, dtype)


def scratch_of_gradient(n_items: int, dtype: np.dtype[Any]) -> Array:
    """The same once more, for rows of a dense gradient, which are made by products that use either."""
    row: Array = _gradient.block(1, n_items, dtype)[0]
    return row


def scratch_of_hidden(n_rows: int, row_items: int, dtype: np.dtype[Any]) -> Array:
    """As `scratch`, beside the others, for what lies between two products of a backward pass."""
    return _hidden.block(n_rows, row_items, dtype)


def scratch_bytes() -> int:
    """Bytes of work memory that the calling thread holds."""
    return sum(each.buffer.nbytes for each in (_scratch, _values, _gradient, _hidden))


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


def aligned_zeros(n_items: int, dtype: np.dtype[Any]) -> Array:
    """Zeros in a 1-D array that starts on a cache line."""
    zeros = aligned_empty(n_items, dtype)
    zeros.fill(0)
    return zeros


def aligned_empty(n_items: int, dtype: np.dtype[Any]) -> Array:
    """Uninitialised 1-D array that starts on a cache line."""
    raw = np.empty(n_items * dtype.itemsize + CACHE_LINE, np.uint8)
    start = -address(raw) % CACHE_LINE
    return raw[start : start + n_items * dtype.itemsize].view(dtype)
