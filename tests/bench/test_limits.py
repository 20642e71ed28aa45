"""The loops of the limits compute what they are said to count."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch

from sparselab.bench.measure import limits
from sparselab.kernels.cpu.runtime.memory import aligned_empty
from sparselab.kernels.cpu.runtime.target import TILE_BYTES

WIDTH = TILE_BYTES // 4


def work(rows: int) -> np.ndarray:
    memory = aligned_empty((rows + 2) * WIDTH, np.dtype(np.float32))
    memory[:] = np.random.default_rng(0).standard_normal(memory.size)
    return memory.reshape(1, -1)


def test_loaded_connections_are_added() -> None:
    rng = np.random.default_rng(1)
    values, indices = rng.standard_normal(10).astype(np.float32), rng.permutation(10).astype(np.uint16)
    memory = work(10)
    sums, x = memory.reshape(12, WIDTH)[:2].copy(), memory.reshape(12, WIDTH)[2:].copy()
    limits._loaded_share(0, 1, 3, values, indices, memory)
    for k, part in enumerate((slice(0, 5), slice(5, 10))):
        expected = sums[k] + 3 * values[part] @ x[indices[part]]
        np.testing.assert_allclose(memory.reshape(12, WIDTH)[k], expected, rtol=1e-4, atol=1e-5)


def test_connections_in_registers_are_added() -> None:
    values, indices = np.array([0.5, 3], np.float32), np.zeros(8, np.uint16)
    memory = work(1)
    sums = memory.reshape(3, WIDTH)[:2].copy()
    limits._in_registers_share(0, 1, 5, values, indices, memory)
    np.testing.assert_allclose(memory.reshape(3, WIDTH)[:2], sums + 5 * 4 * 1.5, rtol=1e-5)


def test_a_rate_is_operations_of_all_threads_over_the_best_time() -> None:
    loop = limits._Loop(limits._loaded_share, 64 * TILE_BYTES, 2, 4096)
    assert loop.flops_per_share == 2 * WIDTH * 4096
    loop.seconds = {2: 1e-3}
    assert loop.gflops(2) == pytest.approx(2 * 2 * WIDTH * 4096 / 1e-3 / 1e9)
    loop.run(2)
    assert loop.seconds[2] <= 1e-3


@pytest.mark.parametrize("rows", [1, 96, 700])
def test_every_row_of_the_buffer_is_visited_equally_often(rows: int) -> None:
    _, _, indices, memory = limits._Loop(None, rows * TILE_BYTES, 1, 1)._arguments
    counts = np.bincount(indices, minlength=rows)
    assert counts.min() == counts.max() >= 1
    assert len(indices) >= 512
    assert memory.shape == (1, (rows + 2) * WIDTH)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one core")
def test_limits_of_several_thread_counts() -> None:
    meter = limits.Meter([1, 2], connections=512)
    meter.run(1)
    before = meter.limits()
    meter.run(2)
    one, two = after = meter.limits()
    for early, late in zip(before, after, strict=True):
        assert late.registers >= early.registers
        assert late.second_level >= early.second_level
    assert (one.threads, two.threads) == (1, 2)
    assert torch.get_num_threads() == 2
    for each in (one, two):
        assert min(each.registers, each.first_level, each.second_level) > 0
        assert each.first_level_bytes == 2 * each.first_level
        assert each.second_level_bytes == 2 * each.second_level
