"""Kernels that are run again and again by addresses, seen through small ones."""

from __future__ import annotations

import threading
from typing import NamedTuple

import numba
import numpy as np
import pytest

from sparselab.kernels.arrays import Array, address
from sparselab.kernels.cpu.runtime import launch as _launch
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.program import MOST_OPERANDS, Given, Lent, Program, _kind
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.vectors import get, put, view_at


class Pair(NamedTuple):
    first: Array
    second: int


INT = np.dtype(np.int64)
IN, OUT = Given(1), Given(2)


@jit
def scale(worker, n_workers, pair, flag, nothing, table, source, target_at, work):  # type: ignore[no-untyped-def]
    """``target[k] = pair[0] * source[k] + pair[1] + table[k]``, negative if the flag says so."""
    if spread(worker, n_workers):
        return
    target, n = view_at(target_at, source), len(table)
    for k in range(worker * n // n_workers, (worker + 1) * n // n_workers):
        work[worker, k] = pair[0] * get(source, k) + pair[1] + table[k]
        put(target, k, -work[worker, k] if flag else work[worker, k])


@jit
def total(worker, n_workers, source, sums):  # type: ignore[no-untyped-def]
    """Add all entries to the first sum."""
    if spread(worker, n_workers):
        return
    for k in range(len(source)):
        sums[0] += source[k]


@jit
def fail(worker, n_workers, at):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    raise ValueError("this cannot be computed")


@jit
def halve(worker, n_workers, factor, out):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    out[0] = factor


def run(program: Program, *arrays: Array) -> None:
    at = [address(array) for array in arrays]
    program.run(*at, *[0] * (MOST_OPERANDS - len(at)))


def scaling(n: int, n_workers: int, factor: int, flag: bool = False) -> Program:
    program = Program()
    work = program.work((n_workers, n), INT)
    program.add(scale, n_workers, (factor, 7), flag, None, np.arange(n), Lent(IN, (n,), INT), OUT, work)
    return program.ready()


@pytest.mark.any_width
@pytest.mark.parametrize("n_workers", [1, 2, 3])
@pytest.mark.parametrize("flag", [False, True])
def test_arguments_of_every_kind_arrive(n_workers: int, flag: bool) -> None:
    program, rng = scaling(50, n_workers, 3, flag), np.random.default_rng(0)
    for _ in range(2):
        source, target = rng.integers(-9, 9, 50), np.zeros(50, np.int64)
        run(program, source, target)
        expected = 3 * source + 7 + np.arange(50)
        assert target.tolist() == (-expected if flag else expected).tolist()


def test_kernels_follow_each_other_and_share_what_is_lent() -> None:
    program, table = Program(), np.zeros(5, np.int64)
    between, sums = program.lend((5,), INT), program.zeros(1, INT)
    work = program.work((1, 5), INT)
    program.add(scale, 1, (2, 0), False, None, table, Lent(IN, (5,), INT), between.at, work)
    program.add(total, 1, Lent(between.at, (5,), INT), sums)
    program.add(total, 1, Lent(sums.at, (1,), INT), Lent(OUT, (1,), INT))
    program.ready()
    for numbers in ([1, 2, 3, 4, 5], [10, 0, 0, 0, 0]):
        out = np.full(1, 100)
        run(program, np.array(numbers), out)
        assert out[0] == 100 + 2 * sum(numbers)


def test_memory_is_cleared_first_and_then_copied_to() -> None:
    program = Program()
    program.copy(IN, OUT, 3 * 8)
    program.clear(OUT, 6 * 8 - 3)
    program.add(total, 1, Lent(IN, (3,), INT), program.zeros(1, INT))
    program.ready()
    out = np.full(6, -1)
    run(program, np.array([5, 6, 7]), out)
    assert out[:5].tolist() == [5, 6, 7, 0, 0]
    assert out[5:].view(np.uint8).tolist() == [0] * 5 + [255] * 3


def test_lent_rows_begin_on_cache_lines_and_passing_memory_is_used_again() -> None:
    program = Program()
    kept = program.lend((3, 5), np.dtype(np.float32))
    assert kept.shape == (3, 16)
    assert program.lend((2,), INT).at.offset - kept.at.offset == 3 * 64
    places = []
    for _ in range(2):
        work = program.work((1, 5), INT)
        places.append(work.at)
        program.add(scale, 1, (1, 1), False, None, np.arange(5), Lent(IN, (5,), INT), OUT, work)
    assert places[0] == places[1]


def test_any_number_of_python_threads_run_one_program() -> None:
    n, program = 2000, scaling(2000, 1, 5)
    wrong = []

    def often(seed: int) -> None:
        source, target = np.random.default_rng(seed).integers(-9, 9, n), np.zeros(n, np.int64)
        for _ in range(300):
            target[:] = 0
            run(program, source, target)
            if not np.array_equal(target, 5 * source + 7 + np.arange(n)):
                wrong.append(seed)

    threads = [threading.Thread(target=often, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_programs_on_threads_wait_for_each_other_where_a_process_would_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = []

    class Lock:
        def __enter__(self) -> None:
            held.append(True)

        def __exit__(self, *error: object) -> None:
            held.append(False)

    monkeypatch.setattr(_launch, "_is_workqueue", lambda: True)
    monkeypatch.setattr(_launch, "_launch_lock", Lock())
    source, target = np.arange(8), np.zeros(8, np.int64)
    run(scaling(8, 1, 1), source, target)
    assert held == []
    run(scaling(8, 2, 1), source, target)
    assert held == [True, False]
    assert target.tolist() == (2 * source + 7).tolist()


def test_a_kernel_that_fails_is_an_error() -> None:
    program = Program()
    program.add(fail, 1, IN)
    with pytest.raises(RuntimeError, match="a kernel of a program failed"):
        run(program.ready(), np.zeros(1))


def test_arguments_that_are_no_words_are_refused() -> None:
    with pytest.raises(TypeError, match="must be integers and arrays"):
        Program().add(halve, 1, 0.5, np.zeros(1))


def test_arrays_must_be_contiguous_and_not_marked() -> None:
    marked = np.arange(8)
    marked.flags.writeable = False
    for array in (np.arange(8)[::2], marked):
        with pytest.raises(ValueError, match="must be contiguous"):
            Program().add(total, 1, array, np.zeros(1, np.int64))


@pytest.mark.parametrize(
    "value", [3, True, None, (1, 2), (1, np.zeros(2)), Pair(np.zeros(3, np.int32), 4), np.zeros((2, 3))]
)
def test_types_are_those_that_numba_finds(value: object) -> None:
    assert _kind(value) == numba.typeof(value)
