"""Optimizers within optimizers, and groups with names: training is that of the optimizer inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import optim

from tests.dst.engine.test_optimizers import EVERY, UPDATES, algorithm_of, made, train


def trained_like_adamw(wrap: Callable[[Any], tuple[Any, Any]], drive: str) -> None:
    """An optimizer made by `wrap` of parameters trains as AdamW itself does."""
    runs = []
    for how in (wrap, lambda p: (optim.AdamW(p, lr=0.01),) * 2):
        layer = made("single")
        optimizer, inner = how(layer) if how is wrap else how(layer.parameters())
        algorithm = algorithm_of("single")
        algorithm.attach(layer, optimizer if drive == "attached" else None)
        if drive == "tracked":
            algorithm.track(optimizer)
            algorithm.track(inner)
        for step in range(1, UPDATES * EVERY + 2):
            train(layer, optimizer, 1, step)
            if drive != "attached":
                algorithm.step()
        runs.append((layer.positions(), layer.weight_values, inner.state[layer.weight_values]["exp_avg_sq"]))
    for ours, theirs in zip(*runs, strict=True):
        assert torch.equal(ours, theirs)


DRIVES = ["attached", "by hand", "tracked"]


@pytest.mark.parametrize("drive", DRIVES)
def test_accelerates_optimizer(drive: str) -> None:
    accelerate = pytest.importorskip("accelerate")

    def wrap(layer: Any) -> tuple[Any, Any]:
        wrapped = accelerate.Accelerator(cpu=True).prepare(optim.AdamW(layer.parameters(), lr=0.01))
        return wrapped, wrapped.optimizer

    trained_like_adamw(wrap, drive)


@pytest.fixture
def one_process() -> Any:
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_zero_redundancy_optimizer(drive: str) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def wrap(layer: Any) -> tuple[Any, Any]:
        wrapped = ZeroRedundancyOptimizer(layer.parameters(), optim.AdamW, lr=0.01)
        return wrapped, wrapped.optim

    trained_like_adamw(wrap, drive)


def test_named_parameters_and_groups() -> None:
    def wrap(layer: Any) -> tuple[Any, Any]:
        named = dict(layer.named_parameters())
        groups = [
            {"params": [(name, each)], "weight_decay": 0.01, "lr": 0.01} for name, each in named.items()
        ]
        return (optim.AdamW(groups),) * 2

    trained_like_adamw(wrap, "attached")
    trained_like_adamw(lambda layer: (optim.AdamW(layer.named_parameters(), lr=0.01),) * 2, "by hand")
