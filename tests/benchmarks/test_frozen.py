"""Layers frozen in few bits, timed and tested, on layers and networks small enough to test."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import frozen, quality
from tests.benchmarks.test_command_line import run
from tests.examples.idx import write_digits

LAYOUTS = ["single", "blocks 4x4"]
ALL = Namespace(parts=frozen.PARTS, layouts=LAYOUTS, sparsity=0.5, epochs=1, seed=1, threads=1)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers and networks of sizes to test; the number of threads is put back."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(frozen, "SHAPES", ((64, 96),))
    monkeypatch.setattr(frozen, "COLD_LAYERS", 2)
    monkeypatch.setattr(frozen, "SECONDS", 0.01)
    monkeypatch.setattr(quality, "HIDDEN", (64, 64))
    monkeypatch.setattr(quality, "DIGITS", dataclasses.replace(quality.DIGITS, update_every=1))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder for data of a computer that has none, and no network."""

    def refuse(remote: object) -> bytes:
        raise OSError("[no network]")

    monkeypatch.setattr("downloads.REPOSITORY", tmp_path / "work" / "repository")
    monkeypatch.setattr("downloads.download", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSELAB_DATA", raising=False)
    return tmp_path / "work" / "shared" / "data"


def test_every_layout_is_timed_and_learns(data: Path) -> None:
    write_digits(data / "mnist")
    console = Console(record=True, width=200)
    rows = frozen.report(ALL, console)
    timed = [row for row in rows if "again" in row]
    assert [(row["layout"], row["tokens"]) for row in timed] == [
        ("single", 1), ("single", 8), ("blocks 4x4", 1), ("blocks 4x4", 8)
    ]  # fmt: skip
    for row in timed:
        for times in (row["again"], row["in_turns"]):
            assert list(times) == ["float32", "bfloat16", "int8"]
            assert all(0 < each < 1e6 for each in times.values())
    learnt = [row for row in rows if "accuracy" in row]
    assert [(row["layout"], row["weights"]) for row in learnt] == [
        (name, weights) for name in LAYOUTS for weights in ("float32", "bfloat16", "int8")
    ]
    for name in LAYOUTS:
        held = [row for row in learnt if row["layout"] == name]
        assert held[0]["bytes"] > held[1]["bytes"] > held[2]["bytes"]
        per_weight = [row["bytes_per_weight"] for row in held]
        assert per_weight[0] - per_weight[1] == pytest.approx(2)
        assert 0.5 < per_weight[1] - per_weight[2] < 1
        for row in held:
            assert 0 <= row["accuracy"] <= 1
            assert row["accuracy_by_8"] == pytest.approx(row["accuracy"], abs=0.1)
    text = console.export_text()
    assert "MNIST, %" in text
    assert "microseconds, the least" in text


def test_without_images_the_rest_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    run(monkeypatch, "--json", str(file), "frozen", "--layouts", "single")
    results = json.loads(file.read_text())["results"]
    assert [row["tokens"] for row in results] == [1, 8]


def test_a_batch_of_a_size_of_its_own_tells_as_much(data: Path) -> None:
    write_digits(data / "mnist")
    model, images = quality.trained_digits(0.5, 1)(quality.Layout({"layer": "sparse"}), 1, "")
    assert quality.accuracy(model, images) == quality.accuracy(model, images, batch=7)
