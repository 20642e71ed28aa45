"""Checkpoints: a run goes on from one to the bit, and what is cut short or altered is refused."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparselab import (
    SET,
    BlockSparseLinear,
    CheckpointError,
    FanInLinear,
    Group,
    RandomState,
    RigL,
    SparseLinear,
    load_checkpoint,
    save_checkpoint,
)
from tests.test_resume import assert_same


class Run:
    """A model of several kinds of layers in training; the batches come from torch's own generator.

    Without a tanh, for which MKL waits in a forked process.
    """

    def __init__(self, seed: int, sparsity: float = 0.8) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            SparseLinear(24, 40, sparsity=sparsity),
            nn.Dropout(0.1),
            nn.ReLU(),
            BlockSparseLinear(40, 24, sparsity=sparsity, block_shape=(4, 4)),
            nn.LayerNorm(24),
            FanInLinear(24, 16, sparsity=0.5),
            nn.Linear(16, 3),
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.9)
        self.algorithm = Group(
            {"5": SET(update_freq=3, seed=2, scope="row"), "*": RigL(update_freq=4, seed=3, stop=40)}
        )
        self.algorithm.attach(self.model, self.optimizer)

    @property
    def parts(self) -> dict[str, Any]:
        # The wrong way round: models come first all the same.
        return {
            "algorithm": self.algorithm,
            "schedule": self.schedule,
            "optimizer": self.optimizer,
            "model": self.model,
            "random": RandomState(),
        }

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            x = torch.randn(16, 24)
            self.optimizer.zero_grad()
            loss = (self.model(x) - x[:, :3].square()).square().mean()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            losses.append(loss.item())
        return losses

    def state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}


@pytest.mark.parametrize("sparsity", [0.8, 0.4], ids=["other connections", "more of them"])
def test_a_run_goes_on_to_the_bit_in_a_model_of_another_topology(sparsity: float, tmp_path: Path) -> None:
    first, second = Run(0), Run(1, sparsity)
    first.train(9)
    save_checkpoint(tmp_path / "last", **first.parts, progress={"step": 9, "curve": [0.5, 0.25]})
    losses = first.train(9)
    second.train(2 if sparsity == 0.8 else 0)
    assert load_checkpoint(tmp_path / "last", **second.parts) == {
        "progress": {"step": 9, "curve": [0.5, 0.25]}
    }
    assert second.train(9) == losses
    assert_same(second.state(), first.state())


def test_some_parts_come_back_and_the_others_are_not_read(tmp_path: Path) -> None:
    run = Run(0)
    save_checkpoint(tmp_path / "last", **run.parts)
    other = Run(1)
    before = other.optimizer.state_dict()
    assert load_checkpoint(tmp_path / "last", model=other.model) == {}
    assert_same(other.model.state_dict(), run.model.state_dict())
    assert_same(other.optimizer.state_dict(), before)


def test_the_generators_of_the_process_go_on(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        numpy = np.random.standard_normal(3).tolist()  # noqa: NPY002
        return [torch.rand(3).tolist(), numpy, random.random(), random.gauss()]

    draw()
    save_checkpoint(tmp_path / "last", random=RandomState())
    drawn = draw()
    load_checkpoint(tmp_path / "last", random=RandomState())
    assert draw() == drawn


PLAIN = {
    "numbers": [True, 1 << 70, -0.1, 1j, None, float("inf")],
    "words": ("", "ä😀", b"\x00\xff"),
    "sets": {1, 2},
    "torch": (torch.Size([2, 3]), torch.bfloat16, torch.device("cpu")),
    3: {(1, 2): torch.tensor([7], dtype=torch.uint16)},
}


def test_plain_values_come_back_as_they_were(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last", value=PLAIN, nothing=None)
    assert_same(load_checkpoint(tmp_path / "last"), {"value": PLAIN, "nothing": None})


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [lambda: 0]}, r"an entry of value\['a'\] must be .*function"),
        ({"lr": np.float64(0.1)}, r"value\['lr'\] must be .*numpy.float64"),
        (np.zeros(3), "value must be .*numpy.ndarray"),
        ({np.int64(3): 0}, "a key of value must be .*numpy.int64"),
        (torch.zeros(3).to_sparse().__class__, "value must be "),
    ],
)
def test_what_would_not_be_read_is_not_written(value: Any, where: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=where):
        save_checkpoint(tmp_path / "last", value=value)
    with torch.device("meta"):
        model = SparseLinear(30, 20)
    with pytest.raises(ValueError, match=r"model\['weight_values'\] must hold data, .*materialize"):
        save_checkpoint(tmp_path / "last", model=model)
    assert not list(tmp_path.iterdir())


def assert_refused(path: Path, error: type[Exception], message: str) -> None:
    """Loading raises and changes nothing."""
    run = Run(1)
    before, own = run.state(), {k: v.clone() for k, v in run.model.state_dict().items()}
    with pytest.raises(error, match=message):
        load_checkpoint(path, **run.parts)
    assert_same(dict(run.model.state_dict()), own)
    assert_same(run.optimizer.state_dict(), before["optimizer"])
    assert_same(run.algorithm.state_dict(), before["algorithm"])


def test_parts_that_are_not_there_are_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last", model=Run(0).model, optimizer=3)
    states = r"no states of \['algorithm', 'schedule', 'optimizer', 'random'\] in .*last.*of \['model'\]"
    assert_refused(tmp_path / "last", KeyError, states)


def test_a_file_that_was_cut_short_or_altered_anywhere_is_refused(tmp_path: Path) -> None:
    path, layer = tmp_path / "last", SparseLinear(8, 8, sparsity=0.5)
    save_checkpoint(path, layer=layer, progress={"step": 3})
    whole, born = path.read_bytes(), {k: v.clone() for k, v in layer.state_dict().items()}
    cuts = [whole[:n] for n in (*range(0, 60), *range(60, len(whole), 97), len(whole) - 1)]
    flips = [
        whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
        for at in (*range(0, 60), *range(60, len(whole), 41), *range(len(whole) - 60, len(whole)))
    ]
    for damaged in (*cuts, *flips, whole + b"\0", whole + whole, b""):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"must be a whole file of save_checkpoint, got .*last'"):
            load_checkpoint(path, layer=layer)
        assert_same(dict(layer.state_dict()), born)
    path.write_bytes(whole)
    assert load_checkpoint(path, layer=layer) == {"progress": {"step": 3}}


def test_a_damaged_part_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    run, path = Run(0), tmp_path / "last"
    run.train(3)
    save_checkpoint(path, **run.parts)
    whole = bytearray(path.read_bytes())
    moments = run.optimizer.state_dict()["state"][0]["exp_avg"].numpy().tobytes()
    whole[whole.index(moments) + 5] ^= 4
    path.write_bytes(whole)
    assert_refused(path, CheckpointError, "the checksum of its part 'optimizer' is another one")
    assert_same(load_checkpoint(path, model=run.model), {})


def test_another_file_is_refused(tmp_path: Path) -> None:
    torch.save({"model": torch.zeros(100)}, tmp_path / "last")
    assert_refused(tmp_path / "last", CheckpointError, "it does not begin as one")
    assert_refused(tmp_path / "none", FileNotFoundError, "none")


def test_a_model_that_does_not_fit_says_so(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last", model=nn.Sequential(SparseLinear(24, 40)))
    with pytest.raises(RuntimeError, match="indptr must be int64 of shape"):
        load_checkpoint(tmp_path / "last", model=nn.Sequential(SparseLinear(24, 41)))


def test_a_write_that_fails_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, run = tmp_path / "last", Run(0)
    save_checkpoint(path, **run.parts)
    before, real = path.read_bytes(), torch.save

    def fail(state: Any, file: Any) -> None:
        if "param_groups" in state:
            file.write(b"half")
            raise OSError("the disk is full")
        real(state, file)

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="the disk is full"):
        save_checkpoint(path, **run.parts)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_tensors_go_to_the_file_from_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparselab.nn.models.saved import checkpoint

    seen: list[int] = []
    write = checkpoint._Writer.write

    def spied(self: Any, data: Any) -> int:
        seen.append(np.frombuffer(data, np.uint8).__array_interface__["data"][0])
        return write(self, data)

    monkeypatch.setattr(checkpoint._Writer, "write", spied)
    run = Run(0)
    run.train(1)
    save_checkpoint(tmp_path / "last", **run.parts)
    moments = run.optimizer.state_dict()["state"][0]["exp_avg"]
    assert {moments.data_ptr(), *(p.data_ptr() for p in run.model.parameters())} <= set(seen)


def test_an_optimizer_keeps_the_tensors_that_were_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Tensor] = []
    load = torch.load

    def spied(*arguments: Any, **options: Any) -> Any:
        found = load(*arguments, **options)
        if "param_groups" in found:
            read.append(found["state"][0]["exp_avg"])
        return found

    monkeypatch.setattr(torch, "load", spied)
    run = Run(0)
    run.train(1)
    save_checkpoint(tmp_path / "last", **run.parts)
    load_checkpoint(tmp_path / "last", **run.parts)
    kept = run.optimizer.state[run.model[0].weight_values]["exp_avg"]
    assert [each.data_ptr() for each in read] == [kept.data_ptr()]


@pytest.mark.skipif(os.name != "posix", reason="folders are flushed on POSIX only")
def test_the_file_is_flushed_before_it_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: calls.append(name) or real(*a))
    save_checkpoint(tmp_path / "last", value=1)
    assert calls == ["fsync", "replace", "fsync"]
