"""What is read of the host, and the sizes that follow from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparselab.kernels.cpu.runtime import target as _target
from sparselab.kernels.cpu.runtime.target import TARGET, Target

KIB = 1 << 10


@pytest.mark.parametrize(
    ("vector_bytes", "l1d", "tile_bytes", "block_columns"),
    [
        (64, 48 * KIB, 256, 128),  # Xeon, Zen 5
        (64, 32 * KIB, 256, 192),  # Zen 4
        (32, 32 * KIB, 128, 384),  # Zen 3
        (32, 48 * KIB, 128, 384),
        (16, 64 * KIB, 128, 384),  # Neoverse
    ],
)
def test_sizes_follow_from_the_width_of_vectors_and_the_first_level_cache(
    vector_bytes: int, l1d: int, tile_bytes: int, block_columns: int
) -> None:
    target = Target.of(vector_bytes, l1d, 1 << 20)
    assert (target.tile_bytes, target.block_columns) == (tile_bytes, block_columns)


def test_the_budget_is_most_of_a_large_second_level() -> None:
    assert Target.of(32, 32 * KIB, 512 * KIB).cache_budget_bytes == 2 << 20
    assert Target.of(64, 48 * KIB, 10 << 20).cache_budget_bytes == 9 << 20


def test_it_is_told_why() -> None:
    small, large = Target.of(32, 32 * KIB, 512 * KIB), Target.of(64, 48 * KIB, 10 << 20)
    for target in (small, large):
        assert {getattr(target, name) > 0 for name in target.why()} == {True}
    assert "32 tokens" in small.why()["tile_bytes"]
    assert "16 registers" in small.why()["tile_bytes"]
    assert small.why()["block_columns"].startswith("48 KiB: long runs")
    assert small.why()["cache_budget_bytes"].startswith("2 MiB at least")
    assert large.why()["block_columns"].startswith("32 KiB stay in the first level of 48 KiB")
    assert large.why()["cache_budget_bytes"] == "nine tenths of the second level"


@pytest.mark.parametrize(
    ("cpu", "vector_bytes", "fast"),
    [("sapphirerapids", 64, True), ("znver4", 64, False), ("skylake", 32, False), ("neoverse-n1", 16, False)],
)
def test_gathers_are_fast_on_wide_vectors_but_of_amd(cpu: str, vector_bytes: int, fast: bool) -> None:
    assert _target._has_fast_gathers(cpu, vector_bytes) is fast


def test_the_host_is_read() -> None:
    assert _target.host() == TARGET
    assert TARGET.tile_bytes % TARGET.vector_bytes == 0
    assert TARGET.l1d_bytes >= 8 * KIB
    assert TARGET.l2_bytes >= TARGET.l1d_bytes


def write(folder: Path, **files: str) -> None:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


def test_caches_are_found_by_level_and_kind(tmp_path: Path) -> None:
    write(tmp_path / "index0", type="Instruction", level="1", size="64K")
    write(tmp_path / "index1", type="Data", level="1", size="48K")
    write(tmp_path / "index2", type="Unified", level="2", size="2048K")
    assert _target._cache_bytes(1, "none", tmp_path) == 48 * KIB
    assert _target._cache_bytes(2, "none", tmp_path) == 2048 * KIB
    assert _target._cache_bytes(3, "none", tmp_path) == 0


def test_unreadable_caches_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "index0", type="Data", level="1", size="unknown")
    (tmp_path / "index1").mkdir()
    assert _target._cache_bytes(1, "none", tmp_path) == 0
    write(tmp_path / "index2", type="Data", level="1", size="32K")
    assert _target._cache_bytes(1, "none", tmp_path) == 32 * KIB


def test_a_host_that_tells_nothing_has_usual_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_target, "_cache_bytes", lambda *_: 0)
    for width, l1d in (("64", 48), ("32", 32), ("16", 32)):
        monkeypatch.setenv("SPARSELAB_VECTOR_BYTES", width)
        target = _target.host()
        assert (target.vector_bytes, target.l1d_bytes, target.l2_bytes) == (int(width), l1d * KIB, 1 << 20)


@pytest.mark.parametrize("width", ["8", "128", "wide"])
def test_a_wrong_vector_width_is_refused(width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSELAB_VECTOR_BYTES", width)
    with pytest.raises(ValueError, match=f"SPARSELAB_VECTOR_BYTES must be 16, 32 or 64, got '{width}'"):
        _target.host()
