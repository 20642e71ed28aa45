"""Replicas over a network that is slow: what they should send, and, where one can be made, what they do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks import slow_link
from benchmarks.traffic import LOCAL_STEPS, WAYS
from examples.gpt_model import Shape
from tests.benchmarks.test_command_line import run

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[slow_link.Plan]:
    monkeypatch.setitem(slow_link.PRESETS, "tiny", Shape(1, 64, 2))
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield slow_link.Plan("tiny", 0.9, 32, 1, list(WAYS))
    dist.destroy_process_group()


@pytest.mark.parametrize("way", WAYS)
def test_what_a_step_should_send(alone: slow_link.Plan, way: str) -> None:
    sparse, dense = (slow_link.Trainer(alone, sparsity, way) for sparsity in (0.9, 0.0))
    sparse.step()
    sparse.average()
    n, whole = dense.n_parameters, 2 * 3 / 4 * 4
    share = {"whole": 1, "bfloat16": 1 / 2, "local SGD": 1 / LOCAL_STEPS}.get(way)
    if share is not None:
        assert dense.expected(4) == pytest.approx(whole * n * share)
        assert sparse.expected(4) == pytest.approx(whole * sparse.n_parameters * share)
    else:  # biases and norms whole, of each other Parameter a hundredth, with its index, to three others
        large = sum(each.numel() for each in dense.model.parameters() if each.numel() > 1024)
        assert dense.expected(4) == pytest.approx(8 * 3 * (n - 0.99 * large), rel=1e-3)
    assert sparse.n_parameters < n
    assert isinstance(sparse.net, DistributedDataParallel) == (way != "local SGD")


def test_a_reason_is_given_where_there_can_be_no_such_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_link.shutil, "which", lambda name: None)
    monkeypatch.setattr(slow_link.os, "geteuid", lambda: 0)
    monkeypatch.setattr(slow_link.sys, "platform", "linux")
    assert slow_link.unable() == "no ip and no tc (iproute2)"
    monkeypatch.setattr(slow_link.os, "geteuid", lambda: 1000)
    assert slow_link.unable() == "network namespaces need root"


@pytest.mark.slow
def test_the_command_measures_what_it_should(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if why := slow_link.unable():
        pytest.skip(why)
    path = tmp_path / "slow.json"
    options = ["slow_link", "--ways", "whole", "--tokens", "64", "--rounds", "1", "--mbit", "400"]
    run(monkeypatch, "--json", str(path), *options)
    dense, sparse = json.loads(path.read_text())["results"]
    for row in (dense, sparse):  # headers of packets come on top
        assert row["expected_bytes"] < row["step"]["n_bytes"] < 1.1 * row["expected_bytes"]
    assert 200 < dense["mbit"] < 410
    assert sparse["step"]["n_bytes"] < 0.2 * dense["step"]["n_bytes"]
    assert "by candidates" in capsys.readouterr().out
