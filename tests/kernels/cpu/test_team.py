"""Kernels that give themselves to the thread pool, seen through a small one."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, new_counter
from sparselab.kernels.cpu.runtime.team import spread, team
from sparselab.kernels.cpu.simd.vectors import next_item
from tests.kernels.process import run_python

needs_two_threads = pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")


@jit
def fill(share, n_workers, start, out, faulty):  # type: ignore[no-untyped-def]
    """Note who was here; the share `faulty` is an error."""
    if spread(share, n_workers):
        return
    if share == faulty:
        raise ValueError("this share cannot be computed")
    out[share] += start + n_workers


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=needs_two_threads)])
@pytest.mark.parametrize("n_workers", [1, 2, 3, 8])
def test_every_share_runs_once_whatever_the_number_of_threads(threads: int, n_workers: int) -> None:
    numba.set_num_threads(threads)
    out = np.zeros(8, np.int64)
    launch(fill, n_workers, 10, out, -1)
    assert out.tolist() == [10 + n_workers] * n_workers + [0] * (8 - n_workers)


@jit
def tick(share, n_workers, turns, taken):  # type: ignore[no-untyped-def]
    """Count who takes which turn."""
    if spread(share, n_workers):
        return
    turn = next_item(turns)
    while turn < taken.shape[1]:
        taken[share, turn] += 1
        turn = next_item(turns)


@pytest.mark.parametrize("n_workers", [1, pytest.param(2, marks=needs_two_threads)])
def test_every_turn_is_taken_once_whoever_takes_it(n_workers: int) -> None:
    numba.set_num_threads(n_workers)
    taken = np.zeros((n_workers, 200_000), np.int64)
    turns = new_counter()
    launch(tick, n_workers, turns, taken)
    assert np.all(taken.sum(0) == 1)
    assert turns[0] == taken.shape[1] + n_workers


def test_a_share_alone_is_computed_alone() -> None:
    out = np.zeros(3, np.int64)
    fill(1, 3, 10, out, -1)
    assert out.tolist() == [0, 13, 0]


@pytest.mark.parametrize("n_workers", [1, 2, 3])
def test_an_error_in_a_share_is_raised(n_workers: int) -> None:
    out = np.zeros(3, np.int64)
    with pytest.raises(ValueError, match="this share cannot be computed"):
        launch(fill, n_workers, 10, out, 0)
    assert out[1:n_workers].tolist() == [10 + n_workers] * (n_workers - 1)


def test_threads_and_a_single_share_run_the_same_code() -> None:
    launch(fill, 1, 0, np.zeros(2, np.int64), -1)
    compiled = len(fill.signatures)
    launch(fill, 2, 0, np.zeros(2, np.int64), -1)
    assert len(fill.signatures) == compiled


def test_a_share_must_be_an_integer_of_64_bits() -> None:
    with pytest.raises(numba.TypingError):
        fill(np.int32(0), 1, 0, np.zeros(1, np.int64), -1)


def test_the_pool_does_not_move() -> None:
    assert team() == team() < 0


THREADS = """
import sys, numba, numpy as np
from sparselab.kernels.cpu.runtime.launch import launch
from tests.kernels.cpu.test_team import fill
out = np.zeros(7, np.int64)
launch(fill, 7, 1, out, -1)
assert out.tolist() == [8] * 7, out
assert numba.threading_layer() == sys.argv[1]
"""


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
@pytest.mark.parametrize("threads", ["1", "2", "5", "16"])
def test_every_layer_runs_every_share(layer: str, threads: str) -> None:
    run_python("-c", THREADS, layer, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS=threads)
