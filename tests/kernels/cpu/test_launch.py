"""How many workers there are, and launching where threads are dangerous."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from sparselab.kernels import PaddedCSR, spmm
from sparselab.kernels.cpu.csr import spmm as _spmm
from sparselab.kernels.cpu.runtime import launch as _launch
from sparselab.kernels.cpu.runtime.target import TILE_BYTES
from tests.kernels.contract import note_workers
from tests.kernels.process import run_python

THREADS = """
import sys, threading
import numba, numpy as np
from sparselab.kernels import PaddedCSR, spmm
from sparselab.kernels.cpu.runtime import launch as _launch
_launch._MIN_WORK = 1
W = PaddedCSR.random((64, 80), 0.5, 0)
X = np.random.default_rng(1).standard_normal((80, 200)).astype(np.float32)
expected = None
if sys.argv[2] == "warm":
    expected = spmm(W, X).tobytes()
results = [[], []]
def work(k):
    for _ in range(200):
        results[k].append(spmm(W, X).tobytes())
threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert numba.threading_layer() == sys.argv[1]
assert [len(each) for each in results] == [200, 200]
assert len({expected or results[0][0], *results[0], *results[1]}) == 1
"""


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
@pytest.mark.parametrize("start", ["cold", "warm"])
@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_two_python_threads_may_launch_at_once(layer: str, start: str) -> None:
    run_python("-c", THREADS, layer, start, NUMBA_THREADING_LAYER=layer)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
def test_little_work_is_done_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    numba.set_num_threads(2)
    monkeypatch.setattr(_launch, "_MIN_WORK", 1000)
    assert [_launch.worker_count(work) for work in (None, 0, 999, 1000, 10**9)] == [2, 1, 1, 2, 2]
    workers = note_workers(monkeypatch, _spmm)
    W = PaddedCSR.from_dense(np.eye(4, dtype=np.float32))
    tile = TILE_BYTES // 4
    # Of each token in a tile, filled or not: 4 connections, 4 rows and 4 columns.
    monkeypatch.setattr(_launch, "_MIN_WORK", 12 * 4 * tile)
    for tokens in (3 * tile, 3 * tile + 1):
        spmm(W, np.ones((4, tokens), np.float32))
    assert workers == [1, 2]
