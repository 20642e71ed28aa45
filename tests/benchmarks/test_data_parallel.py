"""Bytes that replicas send, counted, and the command that prints them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.data_parallel import SENT, counted
from tests.benchmarks.test_command_line import run

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def test_what_is_handed_to_collectives_is_counted(tmp_path: Path) -> None:
    originals = [getattr(dist, name) for name in SENT]
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        sent, numbers = Counter[str](), torch.ones(5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "get_world_size", lambda group=None: 4)
            with counted(sent):
                dist.all_reduce(numbers)
                assert sent["updates"] == 20 * 2 * 3 / 4
                dist.all_gather([torch.empty(5)], numbers, dist.group.WORLD)
                assert sent["updates"] == 20 * (1.5 + 3)
                dist.broadcast(numbers, 0, dist.group.WORLD)
                assert sent["updates"] == 20 * (1.5 + 3 + 0.75)
    finally:
        dist.destroy_process_group()
    assert [getattr(dist, name) for name in SENT] == originals


@pytest.mark.slow
def test_the_command_prints_bytes_and_losses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, threads = tmp_path / "parallel.json", torch.get_num_threads()
    options = "data_parallel --ranks 2 --steps 12 --width 32 --every 4 --tokens 64"
    run(monkeypatch, "--json", str(file), *options.split())
    torch.set_num_threads(threads)
    found = json.loads(file.read_text())["results"]
    assert {each["ranks"] for each in found} == {1, 2}
    of_two = {each["arm"]: each for each in found if each["ranks"] == 2 and each["dtype"] == "torch.float64"}
    of_one = {each["arm"]: each for each in found if each["ranks"] == 1 and each["dtype"] == "torch.float64"}
    numbers = (64 + 1) * 32 + (32 + 1) * 32 + (32 + 1) * 10
    assert of_two["dense"]["gradient_bytes"] == 8 * numbers
    live = round(0.1 * 64 * 32) + round(0.1 * 32 * 32)
    assert of_two["SET"]["gradient_bytes"] == 8 * (live + 2 * 32 + 33 * 10)
    assert of_two["RigL"]["n_updates"] == of_two["GMP"]["n_updates"] == 2
    assert (
        of_two["RigL"]["update_bytes"] > of_two["SET"]["update_bytes"] > of_two["Static"]["update_bytes"] == 0
    )
    for arm in ("SET", "RigL", "GMP", "GraNet"):
        assert of_two[arm]["loss"] == pytest.approx(of_one[arm]["loss"], abs=1e-12)
    printed = capsys.readouterr().out
    assert "KiB that each of 2 processes sends, 64 -> 32 -> 32 -> 10, 90% sparse" in printed
    assert "Loss after 12 steps of 64 tokens, with an update every 4" in printed
