"""Under DistributedDataParallel all replicas have the connections of the first, and train as one process."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sparselab import (
    SET,
    BlockSparseLinear,
    FanInLinear,
    MaskedLinear,
    RigL,
    SparseConv2d,
    SparseLinear,
    Static,
)

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

KINDS: dict[str, Any] = {
    "single": lambda: SparseLinear(16, 12, sparsity=0.5),
    "fan-in": lambda: FanInLinear(16, 12, sparsity=0.5),
    "blocks": lambda: BlockSparseLinear(16, 12, sparsity=0.5, block_shape=(4, 2)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 2, 2)), SparseConv2d(4, 12, 2, sparsity=0.5), nn.Flatten()
    ),
    "masked": lambda: MaskedLinear(16, 12, sparsity=0.5),
    "bare": lambda: None,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "": {},
    "no buffers": {"broadcast_buffers": False},
    "views": {"gradient_as_bucket_view": True, "find_unused_parameters": True},
    "static": {"static_graph": True},
}
WORLD, STEPS = 2, 3


def made(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "bare":
        return SparseLinear(16, 12, sparsity=0.5)
    return nn.Sequential(KINDS[kind](), nn.BatchNorm1d(12), SparseLinear(12, 5, sparsity=0.5))


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(10 * step + rank))


def positions(model: nn.Module) -> list[list[int]]:
    return [layer.positions().tolist() for layer in model.modules() if hasattr(layer, "positions")]


def train(rank: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    try:
        found: dict[Any, Any] = {}
        for kind in KINDS:
            for name, settings in SETTINGS.items():
                model = made(kind, rank)
                wrapped = DistributedDataParallel(model, **settings)
                algorithm = Static()
                algorithm.attach(model)
                for dynamic in (RigL(), SET()):
                    dynamic.attach(made(kind, rank))
                    with pytest.raises(RuntimeError, match=r"a world of 2 processes must know whether they"):
                        dynamic.step()
                with pytest.raises(TypeError, match=r"into shards, got a \w+; wrap"):
                    fully_shard(made(kind, rank), mesh=init_device_mesh("cpu", (WORLD,)))
                optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
                for step in range(STEPS):
                    optimizer.zero_grad()
                    wrapped(batch(step, rank)).square().mean().backward()
                    optimizer.step()
                    algorithm.step()
                parameters = [parameter.detach().numpy() for parameter in model.parameters()]
                found[kind, name] = positions(model), parameters
        results.put((rank, found))
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_replicas_train_as_one() -> None:
    context = torch.multiprocessing.get_context("spawn")
    results, port = context.SimpleQueue(), free_port()
    processes = [context.Process(target=train, args=(rank, port, results)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    both = dict(results.get() for _ in range(WORLD))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for key, (connections, parameters) in both[0].items():
        kind, _ = key
        other_connections, other_parameters = both[1][key]
        model = made(kind, 0)
        assert connections == other_connections == positions(model), key
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(STEPS):
            optimizer.zero_grad()
            # Norms see the part of each process.
            sum(model(batch(step, rank)).square().mean() / WORLD for rank in range(WORLD)).backward()
            optimizer.step()
        for ours, theirs, expected in zip(parameters, other_parameters, model.parameters(), strict=True):
            assert (ours == theirs).all(), key
            torch.testing.assert_close(torch.from_numpy(ours), expected.detach())
