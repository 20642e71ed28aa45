"""A child of `os.fork`: memory of its own, no threads, no lock that nobody gives back."""

from __future__ import annotations

import sys

import numba
import pytest

from tests.kernels.process import run_python

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or numba.config.NUMBA_NUM_THREADS < 2, reason="needs fork, two threads"
)


def run_forking(program: str, *arguments: str, **environment: str) -> None:
    run_python("-W", "ignore::DeprecationWarning", "-c", HEAD + program, *arguments, **environment)


HEAD = """
import mmap, os, signal, sys, threading, time
import numba, numpy as np
from sparselab.kernels import BlockCSR, PaddedCSR, sddmm_dw, spmm, spmm_t
from sparselab.kernels.cpu.runtime import launch as _launch, memory as _memory
_launch._MIN_WORK = 1

def in_child(work):
    child = os.fork()
    if child == 0:
        signal.alarm(240)  # a child that waits for ever ends the test, too
        try:
            os._exit(0 if work() else 3)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(4)
    return child

def assert_well(child):
    status = os.waitpid(child, 0)[1]
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, status
"""

COMPUTING = """
rng = np.random.default_rng(1)
matrices = [PaddedCSR.random((500, 700), 0.8, 0)]
matrices += [BlockCSR.random((500, 700), 0.8, block, 0) for block in ((4, 1), (1, 8), (16, 16))]
X, DY = (rng.standard_normal((n, 130)).astype(np.float32) for n in (700, 500))
def products():
    found = []
    for W in matrices:
        found += [spmm(W, X), spmm(W, X[:, :9]), spmm_t(W, DY), sddmm_dw(W, DY, X)]
    return [each.tobytes() for each in found]
expected = products()
assert _launch.worker_count() == 2 and numba.threading_layer() == sys.argv[1]
assert _memory._scratch.buffer.nbytes > _memory._SMALLEST_MAPPING
def often():
    return all(products() == expected for _ in range(20))
child = in_child(lambda: _launch.worker_count() == 1 and often())
mine = often()
assert_well(child)
assert mine and _launch.worker_count() == 2
"""


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_parent_and_child_compute_at_the_same_time(layer: str) -> None:
    run_forking(COMPUTING, layer, NUMBA_THREADING_LAYER=layer)


MEMORY = """
if sys.argv[1] == "shared":
    _memory._map = lambda n_bytes: mmap.mmap(-1, n_bytes)
items = 1 << 20
work, plan = _memory.scratch(1, items, np.dtype(np.float32)), _memory.mapped_empty(items, np.dtype(np.int32))
work[:], plan[:] = 1, 1
def write():
    _memory.scratch(1, items, np.dtype(np.float32))[:] = 2
    plan[:] = 2
    return True
assert_well(in_child(write))
assert (work == 1).all() and (plan == 1).all(), "written to by the child"
"""


def test_a_child_writes_to_memory_of_its_own() -> None:
    run_forking(MEMORY, "private")


def test_shared_memory_would_be_seen() -> None:
    with pytest.raises(AssertionError, match="written to by the child"):
        run_forking(MEMORY, "shared")


LAUNCHES = """
from sparselab.kernels.cpu import partition
from sparselab.kernels.rewiring.two_hop import TwoHops
partition._MIN_PART = 4
W = PaddedCSR.random((300, 400), 0.9, 0)
hops = TwoHops(W.topology, W.transpose().topology)
assert len(hops._edges) == 3, "cut for two workers"
tickets, picks = np.arange(0, hops.n_tickets, 7), np.full(-(-hops.n_tickets // 7), 0.5)
expected = [part.tobytes() for part in hops.follow(tickets, picks)]
assert_well(in_child(lambda: [part.tobytes() for part in hops.follow(tickets, picks)] == expected))
"""


def test_work_that_was_cut_for_threads_before_is_done_without_them() -> None:
    run_forking(LAUNCHES)


COMPILING = """
from numba.core.compiler_lock import global_compiler_lock
compiling = threading.Event()
def compile_for_a_while():
    with global_compiler_lock:
        compiling.set()
        time.sleep(0.5)
thread = threading.Thread(target=compile_for_a_while)
thread.start()
compiling.wait()
assert_well(in_child(lambda: numba.njit(lambda x: x + 1)(1) == 2))
thread.join()
assert numba.njit(lambda x: x + 2)(1) == 3
"""


def test_a_child_compiles_though_another_thread_did_when_it_was_forked() -> None:
    run_forking(COMPILING)
