"""What several processes train in the tests: replicas of a model, each on its part of a batch."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from examples.ranks import in_bfloat16
from sparselab.dst import Group, Replicas
from tests.dst.contract_rows import ROWS
from tests.dst.harness import OPTIMIZERS, build, sparse_layers

TOKENS, STEPS, SAVED = 16, 30, 18


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes
    ----------
    row : of the contract table, or "group", of two of them.
    kind : of the layers.
    optimizer : of the table of optimizers; "adamw zero" in shards.
    replicas : settings of `Replicas`.
    ddp : settings of `DistributedDataParallel`.
    passes : backward passes of a step.
    sync : whether each of them is synchronised, not only the last.
    clear : whether gradients are set to None; else to 0.
    hook : whether gradients are sent as bfloat16.
    tokens : in a batch of all processes.
    attach_first : whether the algorithm comes before the wrapper.
    """

    row: str
    kind: str = "real"
    optimizer: str = "sgd"
    replicas: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    passes: int = 1
    sync: bool = False
    clear: bool = True
    hook: bool = False
    tokens: int = TOKENS
    attach_first: bool = False

    def model(self, seed: int) -> nn.Module:
        row = ROWS["rigl" if self.row == "group" else self.row]
        model: nn.Module = row.prepare(build(self.kind, torch.float64, seed, row.start))
        return model

    def algorithm(self) -> Any:
        if self.row == "group":
            return Group({"0": ROWS["rigl"].make(), "2": ROWS["set"].make()})
        return ROWS[self.row].make()

    def attach(self, model: nn.Module, algorithm: Any) -> None:
        if self.replicas:
            algorithm.attach(model, replicas=Replicas(**self.replicas))
        elif self.row == "group":
            algorithm.attach(model)
        else:  # by layers without names
            model.apply(algorithm)

    def optimize(self, model: nn.Module, sharded: bool) -> Any:
        name, *shards = self.optimizer.split()
        if not (shards and sharded):
            return OPTIMIZERS[name](model.parameters())
        from torch.distributed.optim import (
            ZeroRedundancyOptimizer,
        )  # warns that torch.jit.script is deprecated

        return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)


def batch(step: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(tokens, 20, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (tokens,), generator=generator)


def step_once(case: Case, model: Any, step: int, rank: int = 0, world: int = 1) -> float:
    """Forward and backward passes of one step of a process that has a part of each batch; the loss."""
    total, part = 0.0, case.tokens // world
    passes = 1 if step == 1 else case.passes  # torch cannot begin a static graph without synchronising
    for number in range(passes):
        x, y = (each[rank * part : (rank + 1) * part] for each in batch(step * 10 + number, case.tokens))
        synchronised = number + 1 == passes or case.sync or world == 1
        with contextlib.nullcontext() if synchronised else model.no_sync():
            loss = nn.functional.cross_entropy(model(x), y) / passes
            loss.backward()
        total += loss.item()
    return total


def outcome(model: nn.Module, losses: list[float], algorithm: Any, **others: Any) -> dict[str, Any]:
    return {
        "positions": [layer.positions().numpy() for layer in sparse_layers(model)],
        "weights": [parameter.detach().numpy().copy() for parameter in model.parameters()],
        "losses": losses,
        "updates": algorithm.last_update,
        **others,
    }


def alone(case: Case, saved: bytes | None = None, seed: int = 0) -> dict[str, Any]:
    """The run of one process with whole batches, from the beginning or from a checkpoint."""
    model, algorithm = case.model(seed), case.algorithm()
    optimizer, first = case.optimize(model, sharded=False), 1
    case.attach(model, algorithm)
    if saved is not None:
        first = load(saved, model, optimizer, algorithm)
    losses = []
    for step in range(first, STEPS + 1):
        optimizer.zero_grad(case.clear)
        losses.append(step_once(case, model, step))
        optimizer.step()
        algorithm.step()
    return outcome(model, losses, algorithm)


def replica(rank: int, case: Case, saved: bytes | None = None) -> dict[str, Any]:
    """The run of one process of several, which saves a checkpoint on its way."""
    group, first, written = case.ddp.get("process_group"), 1, b""
    world, number = dist.get_world_size(group), dist.get_rank(group)
    model, algorithm = case.model(rank), case.algorithm()
    if case.attach_first:
        case.attach(model, algorithm)
    wrapped = DistributedDataParallel(model, **case.ddp)
    if case.hook:
        wrapped.register_comm_hook(None, in_bfloat16)
    if not case.attach_first:
        case.attach(wrapped, algorithm)
    optimizer = case.optimize(model, sharded=True)
    if saved is not None:
        first = load(saved, model, optimizer, algorithm)
    losses = []
    for step in range(first, STEPS + 1):
        optimizer.zero_grad(case.clear)
        mean = torch.tensor(step_once(case, wrapped, step, number, world), dtype=torch.float64)
        optimizer.step()
        algorithm.step()
        dist.all_reduce(mean, group=group)
        losses.append(mean.item() / world)
        if step == SAVED:
            written = save(rank, model, optimizer, algorithm)
    return outcome(model, losses, algorithm, saved=written)


def save(rank: int, *parts: Any) -> bytes:
    """A checkpoint of the first process, which the others help to write."""
    for part in parts[1:]:
        for name in ("consolidate_state_dict", "consolidate"):
            getattr(part, name, lambda: None)()
    file = io.BytesIO()
    if rank == 0:
        torch.save([part.state_dict() for part in parts], file)
    return file.getvalue()


def load(saved: bytes, *parts: Any) -> int:
    """Take back a checkpoint; returns the step that comes next."""
    for part, state in zip(parts, torch.load(io.BytesIO(saved), weights_only=True), strict=True):
        part.load_state_dict(state)
    return SAVED + 1


def replicas(rank: int, cases: dict[str, Case], saved: dict[str, bytes]) -> dict[str, Any]:
    """All runs, one after the other, from a checkpoint where there is one."""
    return {name: replica(rank, case, saved.get(name)) for name, case in cases.items()}
