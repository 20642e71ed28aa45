"""What the subcommands for models, peers and revisions refuse, and with which words."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import models, peers
from sparselab.bench.contenders.linear import Case
from sparselab.bench.measure.timing import Timing


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--threads", "1", *arguments])
    command.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("models --models 20M", "invalid choice: '20M'"),
        ("models --rounds 0", "expected a positive integer, got '0'"),
        ("models --batch two", "expected a positive integer, got 'two'"),
        ("revisions HEAD", "the following arguments are required: REVISION|expected 2 arguments"),
        ("revisions HEAD HEAD --cases everything", "invalid choice: 'everything'"),
        ("revisions HEAD HEAD --turns -1", "expected one argument|expected a positive integer"),
        ("revisions HEAD HEAD --sparsity 1", "expected a number from 0 up to, not including, 1, got '1'"),
        ("layouts --parts memory", "invalid choice: 'memory'"),
        ("layouts --sparsity 1", "expected a number from 0 up to, not including, 1, got '1'"),
        ("peers --sparsity half", "expected a number from 0 up to, not including, 1, got 'half'"),
        ("peers --shapes 768x3072", "expected INxOUTxTOKENS"),
    ],
)
def test_wrong_arguments(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments.split())
    assert stop.value.code == 2
    assert re.search(message, capfd.readouterr().err)


def test_what_cannot_be_done_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: there is no environment .*, and --no-install forbids"):
        run(monkeypatch, "peers", "--no-install", "--environment", str(tmp_path / "absent"))


def test_results_are_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(models.SIZES, "10M", models.Size(1, 32, 64, 2, 8, 2))
    file = tmp_path / "new" / "models.json"
    run(monkeypatch, "--json", str(file), "models", "--models", "10M", "--rounds", "1", "--batch", "3")
    dense, sparse = json.loads(file.read_text())["results"]
    assert (dense["arm"], sparse["arm"], dense["size"]["batch"]) == ("dense", "sparse", 3)
    assert dense["tokens_per_second"] == pytest.approx(24e3 / dense["mean_ms"])
    assert "10M sparse, 3x8" in capfd.readouterr().out


def test_the_reason_why_a_peer_cannot_run_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    timing = Timing(2.0, 2.0, 2.0)
    row = {"sparselab": timing, "dense": timing, "other_sparselab": "it is [ill]", "sparseprop": timing}
    monkeypatch.setattr(peers, "prepare", lambda *_: {})
    monkeypatch.setattr(peers, "run", lambda *_: [(Case(8, 8, 4, 0.5), {"forward": row})])
    file = tmp_path / "peers.json"
    run(monkeypatch, "--json", str(file), "peers")
    printed = capfd.readouterr().out
    assert "cannot run" in printed
    assert "2.00 (1.00x)" in printed
    assert "peer sparselab 0.2.2: it is [ill]" in printed
    assert json.loads(file.read_text())["results"][0]["timings_ms"]["other_sparselab"] == "it is [ill]"
