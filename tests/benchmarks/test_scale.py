"""Memory by cause, on a model small enough to test."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn

import sparselab
from benchmarks import scale
from examples.gpt_model import Shape
from sparselab.nn import SparseLayer


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scale.PRESETS, "tiny", Shape(1, 32, 2))
    monkeypatch.setattr(scale, "CONTEXT", 16)


def test_live_tensors_are_those_that_are_there_at_once() -> None:
    model = nn.Linear(10, 10, bias=False)
    with scale.LiveTensors(model) as seen:
        kept = torch.zeros(1000)
        for _ in range(5):
            gone = torch.ones(500)
            del gone
        view = kept[:10]
    assert seen.most == 6000
    assert (seen.gradients, view.numel()) == (0, 10)


def test_gradients_at_the_highest_moment_are_told_apart() -> None:
    model = nn.Linear(100, 100, bias=False)
    with scale.LiveTensors(model) as seen:
        model(torch.ones(1, 100)).sum().backward()
        more = torch.zeros(100_000)
    assert seen.gradients == 40_000
    assert seen.most >= 440_000 == more.nbytes + seen.gradients


@pytest.mark.usefixtures("tiny")
def test_a_model_is_looked_at_from_building_to_loading() -> None:
    row = scale.measure("tiny", 0.5, 32, torch.get_num_threads(), None)
    assert row["live"] < row["dense"]
    phases = [each["phase"] for each in row["phases"]]
    assert phases == [
        "build", "first step", "step", "step", "step", "step with an update", "step after it", "step", "save",
        "load", "first step again",
    ]  # fmt: skip
    assert all(each["peak"] > 0 for each in row["phases"])
    assert 0 < row["step_s"] <= max(each["seconds"] for each in row["phases"] if each["phase"] == "step")
    assert row["file_bytes"] > 3 * 4 * row["live"]
    causes = row["causes"]
    assert causes["weights"] == 4 * row["live"]
    ages = causes["moments of AdamW, ages"] - 2 * causes["weights"]
    assert 0 < ages < 2.1 * row["live"]  # 2 bytes for each connection of layers that grew
    assert causes["activations and temporaries"] > 0
    assert causes["code, before the model"] > 1 << 26
    out = io.StringIO()
    console = Console(file=out, width=150)
    console.print(scale.by_cause(row), scale.by_phase(row))
    assert "plans of kernels" in out.getvalue()
    assert "step with an update" in out.getvalue()


@pytest.mark.usefixtures("tiny")
def test_the_same_model_dense() -> None:
    dense = scale.measure_dense("tiny", 32, torch.get_num_threads())
    n = scale.Trainer(scale.PRESETS["tiny"], None, 32).dense
    assert dense["tensors"] == pytest.approx(16 * n, rel=0.01)
    row = {
        "model": "tiny",
        "dense": n,
        "live": n // 2,
        "tensors": 8 * n,
        "step_peak": dense["step_peak"] // 4,
        "step_s": dense["step_s"] * 0.3,
    }
    lines = scale.beside_dense([row | {"dense_arm": dense}, row]).splitlines()
    assert all(share in lines[-2] for share in ("50%", "25%", "30%"))
    assert "does not fit" not in lines[-2]
    assert "does not fit" in lines[-1]


@pytest.mark.usefixtures("tiny")
def test_what_does_not_fit_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scale.fits("tiny", 0.1, scale.MOST_PER_WEIGHT)
    monkeypatch.setattr(scale, "alone", lambda call: {"called": call})
    monkeypatch.setattr(scale, "MOST_PER_DENSE_WEIGHT", 1 << 50)
    assert scale.run(["tiny"], 0.9, 32, 1) == [{"called": "measure('tiny', 0.9, 32, 1, None)"}]
    assert "tiny: does not fit here dense" in capsys.readouterr().err
    monkeypatch.setattr(scale, "MOST_BESIDE", 1 << 60)
    assert scale.run(["tiny"], 0.9, 32, 1) == []
    assert "tiny: does not fit here\n" in capsys.readouterr().err


def test_layers_of_blocks() -> None:
    trainer = scale.Trainer(Shape(1, 32, 2), 0.9, 32, (4, 4))
    kinds = {type(layer) for layer in trainer.model.modules() if isinstance(layer, SparseLayer)}
    assert kinds == {sparselab.BlockSparseLinear}
    trainer.step()
