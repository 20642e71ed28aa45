"""Speed and quality of layouts, on layers and networks small enough to test."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

import sparselab
from benchmarks import layouts, quality
from benchmarks.layouts import DENSE, LAYOUTS, SINGLE, TASKS, Row, Runs
from sparselab.bench.measure.timing import Timing
from tests.benchmarks.test_command_line import run
from tests.examples.idx import write_digits

ALL = Namespace(parts=layouts.PARTS, sparsity=0.5, seeds=2, rounds=1, epochs=1, steps=3, threads=1)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers, networks and batches of sizes to test; the number of threads is put back."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(layouts, "SHAPES", ((64, 96, 8), (96, 64, 8)))
    monkeypatch.setattr(quality, "HIDDEN", (64, 64))
    monkeypatch.setattr(quality, "DIGITS", dataclasses.replace(quality.DIGITS, update_every=1))
    tiny = {
        "n_layer": 1,
        "d_model": 128,
        "d_ff": 128,
        "n_head": 2,
        "context": 8,
        "batch": 2,
        "update_every": 1,
    }
    monkeypatch.setattr(quality, "TEXT", dataclasses.replace(quality.TEXT, validation_windows=4, **tiny))
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


def write_text(data: Path) -> None:
    (data / "tinyshakespeare").mkdir(parents=True)
    (data / "tinyshakespeare" / "input.txt").write_text("To be, or not to be, that is the question:\n" * 20)


def rows_of(scores: dict[str, tuple[float, list[float], list[float]]]) -> dict[str, Row]:
    """Rows of layouts, from the milliseconds of a step, the accuracies, and the losses of each."""
    return {
        name: Row(name, {"layer": Timing(ms, ms, ms)}, {"mnist": Runs(accuracies), "text": Runs(losses)})
        for name, (ms, accuracies, losses) in scores.items()
    }


def test_the_command_measures_all_layouts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_digits(data / "mnist", n_train=300)
    write_text(data)
    file = tmp_path / "layouts.json"
    options = "--sparsity 0.5 --seeds 2 --rounds 1 --epochs 1 --steps 3"
    run(monkeypatch, "--json", str(file), "layouts", *options.split())
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())["results"]
    assert [row["layout"] for row in found] == list(LAYOUTS)
    assert len(found) == 3 + len(layouts.BLOCK_SHAPES)
    for row in found:
        assert list(row["step_ms"]) == ["64 -> 96", "96 -> 64"]
        assert all(each["median"] > 0 for each in row["step_ms"].values())
        assert all(0 <= score <= 1 for score in row["mnist"]["scores"])
        assert all(2 < score < 5 for score in row["text"]["scores"])
        assert len(row["mnist"]["scores"]) == len(row["text"]["scores"]) == 2
        (line,) = (line for line in printed.splitlines() if line.startswith(f"│ {row['layout']} "))
        assert f"{row['times_dense']:.2f}x" in line
        assert f"{100 * row['mnist']['mean']:.2f} ± {100 * row['mnist']['std']:.2f}" in line
        assert f"{row['text']['mean']:.4f} ± {row['text']['std']:.4f}" in line
    assert found[0]["times_dense"] == 1
    assert "as good as single connections (mnist and text): single" in printed


def test_missing_data_is_told_and_the_rest_is_measured(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(data)
    options = Namespace(**{**vars(ALL), "parts": ["mnist", "text"], "seeds": 1})
    found = layouts.report(options, Console(width=150))
    assert all("mnist" not in row and len(row["text"]["scores"]) == 1 for row in found)
    printed = capsys.readouterr().out
    assert printed.count(" no data │") == len(LAYOUTS)
    assert "MNIST, %: no data: " in printed
    assert "could not be downloaded ([no network])" in printed
    assert "step_ms" not in found[0]


def test_only_the_parts_asked_for_are_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = layouts.report(Namespace(**{**vars(ALL), "parts": ["text"]}), Console(width=150))
    assert all(set(row) == {"layout", "sparsity", "epochs", "steps"} for row in found)
    printed = capsys.readouterr().out
    assert "Shakespeare, nats: no data: Tiny Shakespeare: [no network]" in printed
    assert "MNIST" not in printed
    assert "as good" not in printed


@pytest.mark.parametrize(("name", "layout"), LAYOUTS.items())
def test_hidden_layers_have_the_layout_and_the_output_is_the_dense_one(
    name: str, layout: quality.Layout
) -> None:
    models = []
    for each in (LAYOUTS[DENSE], layout):
        torch.manual_seed(0)
        models.append(quality.perceptron(each, 0.5))
    model = models[1]
    assert torch.equal(*(each.state_dict()["4.weight"] for each in models))
    found = dict(sparselab.nn.find_sparse(model))
    assert list(found) == ([] if name == DENSE else ["0", "2"])
    for sparse in found.values():
        assert sparse.sparsity == pytest.approx(0.5, abs=0.02)
        assert sparse.block_shape == (layout.rule or {}).get("block_shape", (1, 1))
        assert isinstance(sparse, sparselab.FanInLinear) == (name == "fan-in")


@pytest.mark.parametrize("name", [DENSE, SINGLE, "fan-in", "blocks 4x4"])
def test_a_seed_gives_the_same_score_and_leaves_the_generator(name: str, data: Path) -> None:
    write_digits(data / "mnist", n_train=300)
    write_text(data)
    before = torch.get_rng_state()
    for learn in (quality.digits(0.5, 1), quality.text(0.5, 3)):
        first, again, other = (learn(LAYOUTS[name], seed, name) for seed in (1, 1, 2))
        assert first == again != other
    assert torch.equal(before, torch.get_rng_state())


def test_algorithms_rewire_in_every_layout(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_digits(data / "mnist", n_train=300)
    write_text(data)
    grown: list[int] = []
    step = sparselab.RigL.step

    def watched(self: sparselab.RigL) -> None:
        step(self)
        grown.extend(each.grown for each in self.last_update or ())

    monkeypatch.setattr(sparselab.RigL, "step", watched)
    for learn in (quality.digits(0.5, 1), quality.text(0.5, 3)):
        for name, layout in LAYOUTS.items():
            grown.clear()
            learn(layout, 1, name)
            assert any(grown) == (name != DENSE)


def test_runs_are_a_mean_and_a_deviation_of_a_sample() -> None:
    runs = Runs([1.0, 2.0, 6.0])
    assert runs.mean == 3
    assert runs.std == pytest.approx(7**0.5)
    assert runs.error == pytest.approx((7 / 3) ** 0.5)
    assert (Runs([2.5]).mean, Runs([2.5]).std) == (2.5, 0.0)
    assert TASKS["mnist"].show(Runs([0.97, 0.98])) == "97.50 ± 0.71"
    assert TASKS["text"].show(Runs([1.23456])) == "1.2346"


@pytest.mark.parametrize(
    ("task", "scores", "reference", "expected"),
    [
        ("mnist", [0.97, 0.98], [0.97, 0.98], True),
        ("mnist", [0.99, 0.99], [0.97, 0.98], True),
        # Off by 0.01 and by 0.011; the error of the means is 0.005, that of the difference no more.
        ("mnist", [0.965, 0.965], [0.97, 0.98], True),
        ("mnist", [0.964, 0.964], [0.97, 0.98], False),
        ("text", [1.9], [2.0], True),
        ("text", [2.0], [2.0], True),
        ("text", [2.001], [2.0], False),
        ("text", [2.05, 2.15], [1.95, 2.05], True),
        ("text", [2.2, 2.3], [1.95, 2.05], False),
    ],
)
def test_as_good_is_within_two_standard_errors(
    task: str, scores: list[float], reference: list[float], expected: bool
) -> None:
    assert TASKS[task].as_good(Runs(scores), Runs(reference)) is expected


def test_the_fastest_is_of_those_that_are_as_good_and_never_the_dense_one() -> None:
    rows = rows_of(
        {
            DENSE: (1.0, [0.99], [1.5]),
            SINGLE: (50.0, [0.97], [2.0]),
            "good at both": (40.0, [0.97], [1.9]),
            "good at images": (30.0, [0.98], [2.1]),
            "good at texts": (20.0, [0.96], [2.0]),
            "bad": (10.0, [0.96], [2.1]),
        }
    )
    assert layouts.fastest(rows, ["mnist"]) == ("good at images", [SINGLE, "good at both", "good at images"])
    assert layouts.fastest(rows, ["text"])[0] == "good at texts"
    assert layouts.fastest(rows, ["mnist", "text"]) == ("good at both", [SINGLE, "good at both"])
    assert layouts.conclude(rows)[2] == (
        "as good as single connections (mnist and text): single, good at both; the fastest is good at both"
    )
    for row in rows.values():
        row.step_ms.clear()
    assert layouts.fastest(rows, ["mnist"])[0] is None
    assert layouts.conclude(rows)[0].endswith(": single, good at both, good at images")


def test_times_dense_is_that_of_all_layers_together() -> None:
    dense = Row(DENSE, {"wide": Timing(30.0, 0, 0), "narrow": Timing(10.0, 0, 0)})
    row = Row(SINGLE, {"wide": Timing(4.0, 0, 0), "narrow": Timing(4.0, 0, 0)})
    assert layouts.times_dense(row, dense) == 5
    row.step_ms["narrow"] = "refused"
    assert layouts.times_dense(row, dense) is None
    assert row.plain(dense)["step_ms"]["narrow"] == "refused"
    assert layouts.times_dense(dense, row) is None


def test_a_layout_that_is_wrong_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = sparselab.FanInLinear.forward
    monkeypatch.setattr(sparselab.FanInLinear, "forward", lambda self, x: 1.01 * forward(self, x))
    found = layouts.report(Namespace(**{**vars(ALL), "parts": ["speed"]}), Console(width=150))
    refused = {row["layout"]: row for row in found if row["times_dense"] is None}
    assert list(refused) == ["fan-in"]
    assert all(each.startswith("refused: ") for each in refused["fan-in"]["step_ms"].values())
    printed = capsys.readouterr().out
    assert "cannot run" in printed
    assert "fan-in refused: " in printed
