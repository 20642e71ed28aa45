"""The flags kernels are compiled with, and the cache of compiled kernels."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from sparselab.kernels.cpu.runtime import jit as _jit
from sparselab.kernels.cpu.runtime import target as _target
from sparselab.kernels.cpu.runtime.jit import FASTMATH, cache_directory, jit
from tests.kernels.process import ROOT, run_python
from tests.shared import usual

#: Runs one kernel that compiles fast, or a product too; prints how many came from the cache and how many not.
COUNT = """
import sys
import numpy as np
from sparselab.kernels import PaddedCSR, rewrite, spmm
from sparselab.kernels.cpu.csr import plan as _plan
from sparselab.kernels.rewiring import rewrite as _rewrite
from sparselab.kernels.cpu.csr import spmm as _spmm
W = PaddedCSR.from_dense(np.array([[0, 2, 3], [4, 0, 0]], np.float32))
assert rewrite(W, [0], [0]).matrix.to_dense().tolist() == [[0, 0, 3], [4, 0, 0]]
kernels = [_rewrite._merge]
if "product" in sys.argv:
    assert (spmm(W, np.ones((3, 70), np.float32)) == [[5], [4]]).all()
    kernels += [_plan._fill_segments, _spmm._multiply_tiles]
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
@pytest.mark.parametrize("keep", [usual(False, 0), usual(False, 5), 0.5])
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


def test_a_filled_cache_serves_another_installation(cache: Path, tmp_path: Path) -> None:
    """Copied, as into an image: another place, another time."""
    shutil.copytree(ROOT / "sparselab", tmp_path / "elsewhere" / "sparselab", copy_function=shutil.copy)
    settings = {"SPARSELAB_CACHE_DIR": str(cache), "NUMBA_NUM_THREADS": "1"}
    found = run_python("-W", "error", "-c", COUNT, root=tmp_path / "elsewhere", **settings)
    assert found.split() == ["1", "0"]


def test_a_cache_that_nobody_may_write_to_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(_jit, "_CACHE_DIRECTORY", tmp_path / "kernels-1")
    source = _jit._ROOT / "cpu" / "csr" / "spmm.py"
    (tmp_path / "kernels-1" / "cpu.csr").mkdir(parents=True)
    monkeypatch.setattr(_jit.os, "makedirs", refuse)
    found = _jit._Locator.from_function(refuse, str(source))
    assert found is not None
    assert found.get_cache_path() == str(tmp_path / "kernels-1" / "cpu.csr")
    assert found.get_source_stamp() == "kernels-1"
    assert _jit._Locator.from_function(refuse, str(source.parents[1] / "tiles.py")) is None
    stamps = {_jit._Locator(refuse, __file__).get_source_stamp(), "kernels-1"}
    assert len(stamps) == 2, "other sources are told apart by what they are"


def test_an_edited_a_moved_source_and_another_width_name_another_directory(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "sparselab", tmp_path / "sparselab")
    code = "from sparselab.kernels.cpu.runtime.jit import cache_directory; print(cache_directory())"
    base = {"SPARSELAB_CACHE_DIR": str(tmp_path / "cache")}
    names = [run_python("-c", code, root=tmp_path, **base) for _ in range(2)]
    assert names[0] == names[1]
    for width in sorted({"16", "32", "64"} - {str(_target.VECTOR_BYTES)}):
        names.append(run_python("-c", code, root=tmp_path, **base, SPARSELAB_VECTOR_BYTES=width))
    with (tmp_path / "sparselab/kernels/cpu/simd/vectors.py").open("a") as source:
        source.write("# edited\n")
    names.append(run_python("-c", code, root=tmp_path, **base))
    (tmp_path / "sparselab/kernels/reference/rewrite.py").rename(tmp_path / "sparselab/kernels/moved.py")
    names.append(run_python("-c", code, root=tmp_path, **base))
    assert len(set(names[1:])) == 5
    assert all(Path(name.strip()).parent == tmp_path / "cache" for name in names)


def test_without_a_compiler_the_reason_is_told_at_once() -> None:
    code = """
import sparselab
try:
    import sparselab.kernels
except ImportError as error:
    print(error)
"""
    told = run_python("-c", code, NUMBA_DISABLE_JIT="1").strip()
    assert told == (
        "sparselab's kernels exist only as compiled code: NUMBA_DISABLE_JIT must be unset or 0, got 1"
    )
    assert run_python("-c", code, NUMBA_DISABLE_JIT="0") == ""


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


def test_the_flags_let_nan_and_infinity_live() -> None:
    assert not FASTMATH & {"nnan", "ninf", "fast"}

    @jit
    def is_nan(x):  # type: ignore[no-untyped-def]
        return np.isnan(x), np.isinf(x)

    assert is_nan(np.float32(np.nan)) == (True, False)
    assert is_nan(np.float32(-np.inf)) == (False, True)
