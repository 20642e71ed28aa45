"""What is said of replicas, and what one process makes of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparselab import SET, Group, Replicas, RigL, SparseLinear


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"growth": "local"}, ValueError, "growth must be one of .'exact', 'candidates'., got 'local'"),
        ({"candidates": 0.5}, ValueError, "candidates must be at least 1, got 0.5"),
        ({"candidates": "many"}, TypeError, "candidates must be a number, got 'many'"),
    ],
)
def test_wrong_arguments(settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Replicas(**settings)


def test_processes_are_not_copied() -> None:
    replicas = Replicas(process_group=object())
    assert copy.deepcopy([replicas])[0] is replicas


@pytest.mark.parametrize("replicas", [None, Replicas(growth="candidates")])
def test_one_process_needs_nobody(replicas: Replicas | None) -> None:
    model = nn.Sequential(SparseLinear(20, 10))
    algorithm, group = RigL(update_freq=1), Group({"0": SET()})
    algorithm.attach(model, optimizer := torch.optim.SGD(model.parameters(), 0.1), replicas=replicas)
    assert algorithm.replicas is replicas
    model(torch.randn(4, 20)).sum().backward()
    optimizer.step()
    algorithm.consolidate()
    assert algorithm.last_update is not None
    assert algorithm.last_update[0].grown
    algorithm.reset()
    assert algorithm.replicas == Replicas()
    group.attach(model, replicas=replicas)
    assert group["0"].replicas is replicas
    group.consolidate()


def test_names_are_those_of_the_wrapped_model(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        net = DistributedDataParallel(nn.Sequential(SparseLinear(20, 10)))
        algorithm = RigL()
        algorithm.attach(net)
        assert algorithm.names == ("0",)
        algorithm.detach()
        Group({"0": SET()}).attach(net)
    finally:
        torch.distributed.destroy_process_group()
