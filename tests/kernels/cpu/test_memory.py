"""Work memory: aligned, used again, given back when it is much too large."""

from __future__ import annotations

import numpy as np
import pytest

from sparselab.kernels.cpu.runtime import memory as _memory
from sparselab.kernels.cpu.runtime.memory import aligned_empty, lend, mapped_empty, scratch

FLOAT = np.dtype(np.float32)


def test_scratch_rows_and_new_arrays_start_on_cache_lines() -> None:
    for items in (1, 15, 16, 17, 1000):
        for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
            block = scratch(3, items, dtype)
            assert block.shape[0] == 3
            assert block.shape[1] >= items
            assert [row.ctypes.data % 64 for row in block] == [0, 0, 0]
            array = aligned_empty(items, dtype)
            assert (array.shape, array.dtype, array.ctypes.data % 64) == ((items,), dtype, 0)
    assert aligned_empty(0, np.dtype(np.float32)).shape == (0,)


def test_scratch_is_used_again_and_shrinks_when_it_is_much_too_large() -> None:
    large = scratch(2, 4 << 20, FLOAT)
    large[:] = 7
    held = _memory._scratch.buffer
    for _ in range(_memory._WINDOW // 2):
        scratch(1, 100, FLOAT)
    assert np.shares_memory(scratch(2, 4 << 20, FLOAT), held), "large calls recur"
    for _ in range(2 * _memory._WINDOW):
        small = scratch(1, 100, FLOAT)
    assert not np.shares_memory(small, held)
    assert _memory._scratch.buffer.nbytes < 1 << 20
    assert np.all(large == 7), "what was handed out before stays"
    assert scratch(2, 4 << 20, FLOAT).shape == (2, 4 << 20)


def test_scratch_of_little_more_than_is_needed_is_kept() -> None:
    for items in (4 << 20, 2 << 20):
        scratch(1, items, FLOAT)
    held = _memory._scratch.buffer
    for _ in range(3 * _memory._WINDOW):
        scratch(1, 2 << 20, FLOAT)
    assert _memory._scratch.buffer is held


@pytest.mark.parametrize("items", [0, 1, 1000, 1 << 20])
def test_mapped_memory_can_be_written_to(items: int) -> None:
    array = mapped_empty(items, FLOAT)
    array[:] = 3
    assert (array.shape, array.dtype) == ((items,), FLOAT)
    assert np.all(array == 3)


def test_what_is_lent_by_address_is_the_scratch() -> None:
    for n_bytes in (64, 1 << 20, 3 << 20, 128):
        at = lend(n_bytes)
        block = scratch(1, n_bytes, np.dtype(np.uint8))
        assert at % 64 == 0
        assert at == block.ctypes.data
    for _ in range(2 * _memory._WINDOW):
        at = lend(128)
    assert _memory._scratch.buffer.nbytes < 1 << 20
    assert at == scratch(1, 128, np.dtype(np.uint8)).ctypes.data
