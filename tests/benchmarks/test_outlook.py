"""What larger trainings would take: formulas by hand, and beside what a process has sent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import outlook, traffic
from tests.benchmarks.test_command_line import run

JOB = outlook.Job(1000, 0.1, tokens=10, seconds=0.5, dense_seconds=0.1, plan_bytes=2)


def test_bytes_of_a_step() -> None:
    assert traffic.step_bytes("whole", [600, 400], ranks=2) == 4000  # of two, each sends what it has once
    assert traffic.step_bytes("whole", [1000], ranks=4) == 6000
    assert traffic.step_bytes("bfloat16", [1000], ranks=4) == 3000
    assert traffic.step_bytes("local SGD", [1000], ranks=4) == 6000 / traffic.LOCAL_STEPS
    assert traffic.step_bytes("top-k", [2000, 1024], ranks=3) == 8 * 2 * (20 + 1024)
    assert all(traffic.step_bytes(way, [1000], ranks=1) == 0 for way in traffic.WAYS)
    with pytest.raises(ValueError, match=r"way must be one of .*, got 'none'"):
        traffic.step_bytes("none", [1], 2)


def test_bytes_of_an_update() -> None:
    """That of the 10M model over two cables, where 44.8 and 14.4 MB more than in other steps were counted."""
    found = traffic.update_bytes(1_061_683, 10_616_832, ranks=2, drop=0.3, candidates=2)
    assert found["exact"] == pytest.approx(44.8e6, rel=0.06)
    assert found["candidates"] == pytest.approx(14.4e6, rel=0.06)


def test_memory_and_seconds() -> None:
    assert JOB.memory() == 100 * (4 + 2 + 4 + 2 + 8)
    assert JOB.memory(shards=4) == 100 * (4 + 2 + 4 + 2 + 2)
    assert JOB.dense_memory() == 16 * 1000
    assert JOB.step_s() == 100 * 10 * 0.5
    assert JOB.dense_step_s() == 1000 * 10 * 0.1
    assert outlook.network_s(1e6, 8) == 1


def test_a_whole_training() -> None:
    row = outlook.predict(JOB, ranks=2, mbit=8e-3, way="whole", total=1000, price=3.6)
    assert row["network_s"] == pytest.approx(0.4)  # 400 bytes at 1000 a second
    assert row["share"] == pytest.approx(500 / 500.4)
    assert row["tokens_per_second"] == pytest.approx(20 / 500.4)
    assert row["dense_tokens_per_second"] == pytest.approx(20 / 1004)
    assert row["training_s"] == pytest.approx(50 * 500.4)
    assert row["cost"] == pytest.approx(50 * 500.4 / 3600 * 2 * 3.6)


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    run(monkeypatch, "--json", str(path), "outlook", "--ranks", "4", "--mbit", "100", "1000")
    rows = json.loads(path.read_text())["results"]
    assert [(row["mbit"], row["way"]) for row in rows] == [
        (mbit, way) for mbit in (100, 1000) for way in traffic.WAYS
    ]
    said = capsys.readouterr().out
    assert "10,000,000,000 parameters, 1,000,000,000 live" in said
    assert "An update of RigL" in said
