"""The compiled kernels' cache, and launching them where threads are dangerous."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from sparselab.kernels import PaddedCSR, spmm
from sparselab.kernels.cpu.csr import spmm as _spmm
from sparselab.kernels.cpu.runtime import jit as _jit
from sparselab.kernels.cpu.runtime import target as _target
from sparselab.kernels.cpu.runtime.jit import FASTMATH, cache_directory, jit
from sparselab.kernels.cpu.runtime.memory import aligned_empty, scratch
from tests.kernels.contract import note_shares
from tests.kernels.process import ROOT, run_python

#: Runs one kernel that compiles fast, or a product too; prints how many came from the cache and how many not.
COUNT = """
import sys
import numpy as np
from sparselab.kernels import PaddedCSR, rewrite, spmm
from sparselab.kernels.cpu.csr import plan as _plan
from sparselab.kernels.rewiring import rewrite as _rewrite
from sparselab.kernels.cpu.csr import spmm as _spmm
W = PaddedCSR.from_dense(np.array([[0, 2, 3], [4, 0, 0]], np.float32))
assert rewrite(W, [0], [0]).topology.to_dense().tolist() == [[0, 0, 3], [4, 0, 0]]
kernels = [_rewrite._merge]
if "product" in sys.argv:
    assert (spmm(W, np.ones((3, 20), np.float32)) == [[5], [4]]).all()
    kernels += [_plan._fill_segments, _spmm._multiply_share]
stats = [kernel.stats for kernel in kernels]
print(sum(sum(s.cache_hits.values()) for s in stats), sum(sum(s.cache_misses.values()) for s in stats))
"""


def count(cache: Path, *arguments: str) -> tuple[int, int]:
    """(kernels loaded, kernels compiled) by a process that uses this cache directory."""
    settings = {"SPARSELAB_CACHE_DIR": str(cache), "NUMBA_NUM_THREADS": "1"}
    loaded, compiled = run_python("-W", "error", "-c", COUNT, *arguments, **settings).split()
    return int(loaded), int(compiled)


@pytest.fixture(scope="module")
def filled_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    assert count(cache) == (0, 1)
    return cache


@pytest.fixture
def cache(filled_cache: Path, tmp_path: Path) -> Path:
    """A copy of a cache that holds the kernel of `COUNT`."""
    return Path(shutil.copytree(filled_cache, tmp_path / "cache"))


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    assert count(tmp_path, "product") == (0, 3)
    assert count(tmp_path, "product") == (3, 0)


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("keep", [0, 5, 0.5])
def test_truncated_files_are_survived_and_replaced(cache: Path, suffix: str, keep: float) -> None:
    files = list(cache.rglob(f"*.{suffix}"))
    assert files
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else int(keep)])
    assert count(cache) == (0, 1)
    assert count(cache) == (1, 0)


def test_files_of_another_kind_are_survived(cache: Path) -> None:
    for file in cache.rglob("*.nb?"):
        file.write_bytes(b"garbage" * 100)
    assert count(cache) == (0, 1)


def test_a_directory_that_cannot_be_made_is_survived(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a directory")
    assert count(in_the_way) == (0, 1)
    assert in_the_way.read_text() == "not a directory"


def test_a_directory_that_vanishes_is_survived(tmp_path: Path) -> None:
    code = f"import shutil, sparselab.kernels\nshutil.rmtree({str(tmp_path / 'cache')!r})\n" + COUNT
    output = run_python("-c", code, SPARSELAB_CACHE_DIR=str(tmp_path / "cache"), NUMBA_NUM_THREADS="1")
    assert output.split() == ["0", "1"]


def test_an_edited_source_and_another_width_name_another_directory(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "sparselab", tmp_path / "sparselab")
    code = "from sparselab.kernels import cache_directory; print(cache_directory())"
    base = {"SPARSELAB_CACHE_DIR": str(tmp_path / "cache")}
    names = [run_python("-c", code, root=tmp_path, **base) for _ in range(2)]
    assert names[0] == names[1]
    for width in sorted({"16", "32", "64"} - {str(_target.VECTOR_BYTES)}):
        names.append(run_python("-c", code, root=tmp_path, **base, SPARSELAB_VECTOR_BYTES=width))
    with (tmp_path / "sparselab/kernels/cpu/simd/vectors.py").open("a") as source:
        source.write("# edited\n")
    names.append(run_python("-c", code, root=tmp_path, **base))
    assert len(set(names[1:])) == 4
    assert all(Path(name.strip()).parent == tmp_path / "cache" for name in names)


@pytest.mark.parametrize("width", ["8", "128", "wide"])
def test_a_wrong_vector_width_is_refused(width: str, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setenv("SPARSELAB_VECTOR_BYTES", width)
    with pytest.raises(ValueError, match=f"SPARSELAB_VECTOR_BYTES must be 16, 32 or 64, got '{width}'"):
        _target._vector_bytes()


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPARSELAB_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_directory().parent == Path("/home/somebody/.cache/sparselab")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory().parent == Path("/xdg/sparselab")
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/of/numba")
    assert cache_directory().parent == Path("/of/numba")
    monkeypatch.setenv("SPARSELAB_CACHE_DIR", "/own")
    assert cache_directory().parent == Path("/own")
    assert cache_directory().name == f"kernels-{_jit._sources_digest()}"


FORK = """
import os, sys
import numba, numpy as np
from sparselab.kernels import PaddedCSR, sddmm_dw, spmm, spmm_t
from sparselab.kernels.cpu.runtime import jit as _jit
_jit._MIN_WORK = 1
W = PaddedCSR.random((64, 80), 0.5, 0)
X = np.random.default_rng(1).standard_normal((80, 200)).astype(np.float32)
def products():
    Y = spmm(W, X)
    return [Y, spmm_t(W, Y), sddmm_dw(W, Y, X)]
expected = products()
assert _jit.worker_count() == 2 and numba.threading_layer() == sys.argv[1]
child = os.fork()
if child == 0:
    try:
        same = all(a.tobytes() == b.tobytes() for a, b in zip(products(), expected))
        os._exit(0 if same and _jit.worker_count() == 1 else 3)
    except BaseException:
        os._exit(4)
status = os.waitpid(child, 0)[1]
assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, status
assert _jit.worker_count() == 2
assert all(a.tobytes() == b.tobytes() for a, b in zip(products(), expected))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or numba.config.NUMBA_NUM_THREADS < 2, reason="needs fork, two threads"
)
@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_a_forked_child_computes_the_same_without_threads(layer: str) -> None:
    run_python("-W", "ignore::DeprecationWarning", "-c", FORK, layer, NUMBA_THREADING_LAYER=layer)


THREADS = """
import sys, threading
import numba, numpy as np
from sparselab.kernels import PaddedCSR, plan_spmm, spmm
from sparselab.kernels.cpu.runtime import jit as _jit
_jit._MIN_WORK = 1
W = PaddedCSR.random((64, 80), 0.5, 0)
X = np.random.default_rng(1).standard_normal((80, 200)).astype(np.float32)
plan, expected, wrong = plan_spmm(W), None, []
if sys.argv[2] == "warm":
    expected = spmm(W, X).tobytes()
results = [[], []]
def work(k):
    for _ in range(200):
        results[k].append(spmm(W, X, plan=plan).tobytes())
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


def test_the_flags_let_nan_and_infinity_live() -> None:
    assert not FASTMATH & {"nnan", "ninf", "fast"}

    @jit
    def is_nan(x):  # type: ignore[no-untyped-def]
        return np.isnan(x), np.isinf(x)

    assert is_nan(np.float32(np.nan)) == (True, False)
    assert is_nan(np.float32(-np.inf)) == (False, True)


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


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
def test_little_work_is_done_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    numba.set_num_threads(2)
    monkeypatch.setattr(_jit, "_MIN_WORK", 1000)
    assert [_jit.worker_count(work) for work in (None, 0, 999, 1000, 10**9)] == [2, 1, 1, 2, 2]
    shares = note_shares(monkeypatch, _spmm)
    W = PaddedCSR.from_dense(np.eye(4, dtype=np.float32))
    for tokens in (80, 90):  # times 4 connections, 4 rows and 4 columns
        spmm(W, np.ones((4, tokens), np.float32))
    assert shares == [1, 2]
