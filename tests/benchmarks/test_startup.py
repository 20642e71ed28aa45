"""Fresh processes, timed: with statements that cost nothing in place of the real ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import startup
from benchmarks.startup import Start
from benchmarks.turns import TurnError


def test_only_the_timed_part_counts(tmp_path: Path) -> None:
    assert startup.seconds(Start("pause", "pass", "import time; time.sleep(0.5)"), tmp_path, 1) < 0.4
    assert startup.seconds(Start("pause", "import time; time.sleep(0.5)"), tmp_path, 1) >= 0.5


def test_the_process_is_as_asked(tmp_path: Path) -> None:
    checks = f"""
import os, sparselab.kernels, sys
assert os.environ["NUMBA_NUM_THREADS"] == "1"
assert os.environ["SPARSELAB_CACHE_DIR"] == {str(tmp_path)!r}
assert sparselab.__file__ == {str(startup.ROOT / "sparselab" / "__init__.py")!r}
assert "torch" not in sys.modules
"""
    assert startup.seconds(Start("checks", checks), tmp_path, 1) > 0


def test_a_failing_process_is_named(tmp_path: Path) -> None:
    with pytest.raises(TurnError, match=r"'import x' ended with status 1: ModuleNotFoundError: .*'no_such'"):
        startup.seconds(Start("import x", "import no_such"), tmp_path, 1)


def test_cold_caches_are_new_and_the_other_is_filled_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str, bool]] = []

    def fake(start: Start, cache: Path, threads: int) -> float:
        assert threads == 3
        seen.append((start.name, cache.name, cache.exists()))
        cache.mkdir(exist_ok=True)
        return float(len(seen))

    monkeypatch.setattr(startup, "seconds", fake)
    starts = [Start("warm", ""), Start("cold", "", cold=True)]
    assert startup.run(2, 3, starts) == [[2.0, 4.0], [3.0, 5.0]]
    assert seen[0] == ("filling the cache", "shared", False)
    assert [(name, existed) for name, _, existed in seen[1:]] == [("warm", True), ("cold", False)] * 2


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(startup, "seconds", lambda start, cache, threads: 2.5 if start.cold else 0.25)
    threads = torch.get_num_threads()
    arguments = ["--threads", str(threads), "--json", str(tmp_path / "startup.json"), "startup"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments, "--processes", "2"])
    command.main()
    assert "2.50 (2.50, 2.50)" in capfd.readouterr().out
    rows = json.loads((tmp_path / "startup.json").read_text())["results"]
    assert [row["median_s"] for row in rows] == [0.25] * 5 + [2.5] * 2
    assert rows[-1] == {"what": "warmup()", "cache": "empty", "median_s": 2.5, "seconds": [2.5, 2.5]}
