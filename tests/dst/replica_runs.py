"""What several processes train in the tests: replicas of a model, each on its part of a batch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from sparselab.dst import Group, Replicas
from tests.dst.contract_rows import ROWS
from tests.dst.harness import OPTIMIZERS, build, sparse_layers

TOKENS, STEPS = 16, 30


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes
    ----------
    row : of the contract table, or "group", of two of them.
    kind : of the layers.
    optimizer : of the table of optimizers, "adamw" in shards where it ends with "zero".
    replicas : settings of `Replicas`.
    ddp : settings of `DistributedDataParallel`.
    passes : backward passes of a step; only the last one is synchronised.
    hook : whether gradients are sent as bfloat16.
    tokens : in a batch of all processes.
    """

    row: str
    kind: str = "real"
    optimizer: str = "sgd"
    replicas: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    passes: int = 1
    hook: bool = False
    tokens: int = TOKENS

    def model(self, seed: int) -> nn.Module:
        row = ROWS["rigl" if self.row == "group" else self.row]
        return row.prepare(build(self.kind, torch.float64, seed, row.start))

    def algorithm(self) -> Any:
        if self.row == "group":
            return Group({"0": ROWS["rigl"].make(), "2": ROWS["set"].make()})
        return ROWS[self.row].make()


def batch(step: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(tokens, 20, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (tokens,), generator=generator)


def bf16(state, bucket):  # without annotations, which torch compares with its own
    # Torch refuses its own by name where there is no GPU.
    return bf16_compress_hook(state, bucket)


def step_once(case: Case, model: Any, step: int, rank: int, world: int) -> float:
    """Forward and backward passes of one step of a process that has a part of each batch."""
    total, part = 0.0, case.tokens // world
    passes = 1 if step == 1 else case.passes  # torch cannot begin a static graph without synchronising
    for number in range(passes):
        x, y = (each[rank * part : (rank + 1) * part] for each in batch(step * 10 + number, case.tokens))
        last = number + 1 == passes or not hasattr(model, "no_sync")
        with contextlib.nullcontext() if last else model.no_sync():
            loss = nn.functional.cross_entropy(model(x), y) / passes
            loss.backward()
        total += loss.item()
    return total


def outcome(model: nn.Module, losses: list[float], algorithm: Any) -> dict[str, Any]:
    return {
        "positions": [layer.positions().numpy() for layer in sparse_layers(model)],
        "weights": [parameter.detach().numpy().copy() for parameter in model.parameters()],
        "losses": losses,
        "updates": algorithm.last_update,
    }


def alone(case: Case, steps: int = STEPS) -> dict[str, Any]:
    """The run of one process with whole batches."""
    model, algorithm = case.model(0), case.algorithm()
    attach(case, model, algorithm, {})
    optimizer = OPTIMIZERS[case.optimizer.split()[0]](model.parameters())
    losses = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        losses.append(step_once(case, model, step, 0, 1))
        optimizer.step()
        algorithm.step()
    return outcome(model, losses, algorithm)


def attach(case: Case, model: nn.Module, algorithm: Any, settings: dict[str, Any]) -> None:
    if settings or case.row == "group":
        algorithm.attach(model, **settings)
    else:  # the way that names no layer
        model.apply(algorithm)


def replica(rank: int, case: Case, steps: int = STEPS) -> dict[str, Any]:
    """The run of one process of several."""
    world = dist.get_world_size()
    model, algorithm = case.model(rank), case.algorithm()
    wrapped = DistributedDataParallel(model, **case.ddp)
    if case.hook:
        wrapped.register_comm_hook(None, bf16)
    attach(case, wrapped, algorithm, {"replicas": Replicas(**case.replicas)} if case.replicas else {})
    optimizer = make_optimizer(case, model)
    losses = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        mean = torch.tensor(step_once(case, wrapped, step, rank, world))
        optimizer.step()
        algorithm.step()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return outcome(model, losses, algorithm)


def make_optimizer(case: Case, model: nn.Module) -> Any:
    name, *sharded = case.optimizer.split()
    if not sharded:
        return OPTIMIZERS[name](model.parameters())
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)


def replicas(rank: int, cases: dict[str, Case]) -> dict[str, Any]:
    """All runs, one after the other."""
    return {name: replica(rank, case) for name, case in cases.items()}
