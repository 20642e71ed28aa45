"""How fast this machine can be at all: the kernels' inner loop with nothing around it.

Each loop keeps two tile rows of sums in registers, as the products do, and adds connections to them:

- *registers*: both factors stay in registers, the peak of the multiply-add units;
- *first level*: every connection loads a tile row from a buffer as large as a block of X in the first-level
  cache, in random order, with an index and a weight: the limit of the sparse products;
- *second level*: the same from a buffer of half the second-level cache.

What a product does beside (packing, visiting the sums, streaming its connections) is what it loses to them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch
from sparselab.kernels.cpu.runtime.memory import aligned_empty
from sparselab.kernels.cpu.runtime.target import TARGET, TILE_BYTES
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.vectors import (
    fma,
    get,
    load,
    splat,
    store,
    tile_width,
    zeros_tile,
)
from sparselab.nn.ops.cpu.threads import use_torch_threads

#: Bytes of tile rows that one multiply-add of each lane loads, over its two operations (float32).
_BYTES_PER_FLOP = 4 / 2

_WIDTH = TILE_BYTES // 4
_FEWEST_CONNECTIONS = 512


@dataclass(frozen=True)
class Limits:
    """GFLOP/s in float32 that `threads` threads reach together, from registers and from two caches."""

    threads: int
    registers: float
    first_level: float
    second_level: float

    @property
    def first_level_bytes(self) -> float:
        """GB/s of tile rows loaded from the first-level cache."""
        return self.first_level * _BYTES_PER_FLOP

    @property
    def second_level_bytes(self) -> float:
        """GB/s of tile rows loaded from the second-level cache."""
        return self.second_level * _BYTES_PER_FLOP


@jit
def _in_registers_share(share, n_shares, passes, values, indices, work):  # type: ignore[no-untyped-def]
    """Add ``passes * len(indices)`` connections whose factors never leave the registers."""
    if spread(share, n_shares):
        return
    memory = work[share]
    like, width = zeros_tile(memory), tile_width(memory)
    sum_a, sum_b = load(memory, 0, like), load(memory, width, like)
    weight, x = splat(get(values, 0), like), splat(get(values, 1), like)
    for _ in range(passes * (len(indices) // 2)):
        sum_a = fma(weight, x, sum_a)
        sum_b = fma(weight, x, sum_b)
    store(memory, 0, sum_a)
    store(memory, width, sum_b)


@jit
def _loaded_share(share, n_shares, passes, values, indices, work):  # type: ignore[no-untyped-def]
    """Add the connections `passes` times, half of them to each of two sums; work holds the sums, then X."""
    if spread(share, n_shares):
        return
    memory = work[share]
    like, width = zeros_tile(memory), tile_width(memory)
    x = memory[2 * width :]
    sum_a, sum_b = load(memory, 0, like), load(memory, width, like)
    half = len(indices) // 2
    for _ in range(passes):
        for k in range(half):
            x_a = load(x, np.int64(get(indices, k)) * width, like)
            x_b = load(x, np.int64(get(indices, half + k)) * width, like)
            sum_a = fma(get(values, k), x_a, sum_a)
            sum_b = fma(get(values, half + k), x_b, sum_b)
    store(memory, 0, sum_a)
    store(memory, width, sum_b)


class _Loop:
    """One of the loops with its data; `seconds` of the fastest call by thread count.

    The first call also compiles; a second one makes that forgotten.
    """

    def __init__(self, kernel: Any, buffer_bytes: int, most: int, connections: int) -> None:
        rows = max(min(buffer_bytes // TILE_BYTES, 1 << 16), 1)
        rng = np.random.default_rng(0)
        # Every row as often as any other, or a buffer larger than the list would not be visited whole.
        orders = -(-_FEWEST_CONNECTIONS // rows)
        indices = np.concatenate([rng.permutation(rows) for _ in range(orders)]).astype(np.uint16)
        values = np.full(len(indices), 0.5, np.float32)
        items = (rows + 2) * _WIDTH
        work = aligned_empty(most * items, np.dtype(np.float32)).reshape(most, items)
        work[:] = 1
        passes = max(connections // len(indices), 1)
        self.flops_per_share = 2 * _WIDTH * passes * (len(indices) // 2 * 2)
        self.seconds: dict[int, float] = {}
        self._work = work
        self._kernel = kernel
        self._arguments = passes, values, indices, work

    def run(self, threads: int) -> None:
        """Compute once, one share for each thread."""
        # The sums grow with every call and would end as infinities.
        self._work[:, : 2 * _WIDTH] = 0
        start = time.perf_counter()
        launch(self._kernel, threads, *self._arguments)
        elapsed = time.perf_counter() - start
        self.seconds[threads] = min(elapsed, self.seconds.get(threads, elapsed))

    def gflops(self, threads: int) -> float:
        """The best rate of all calls on that many threads."""
        return self.flops_per_share * threads / self.seconds[threads] / 1e9


class Meter:
    """Measures the limits of each number of threads, in turns; what counts is the best of all repetitions.

    Call `run` now and then during a benchmark: on a shared machine a single measurement may fall into a bad
    moment, and results would then exceed the limit.

    Parameters
    ----------
    threads : sequence of int
    connections : int
        Connections that each thread adds in one repetition; the default takes a few milliseconds.
    """

    def __init__(self, threads: Sequence[int], connections: int = 1 << 22) -> None:
        most = max(threads)
        block = TARGET.block_columns * TILE_BYTES // 2
        self._threads = threads
        self._loops = (
            _Loop(_in_registers_share, block, most, connections),
            _Loop(_loaded_share, block, most, connections),
            _Loop(_loaded_share, TARGET.l2_bytes // 2, most, connections),
        )

    def run(self, repetitions: int = 5) -> None:
        """Measure some more; torch's thread count is left at the last one measured."""
        for _ in range(repetitions):
            for count in self._threads:
                torch.set_num_threads(count)
                use_torch_threads()
                for loop in self._loops:
                    loop.run(count)

    def limits(self) -> list[Limits]:
        """The best so far, one for each number of threads."""
        return [Limits(count, *(loop.gflops(count) for loop in self._loops)) for count in self._threads]
