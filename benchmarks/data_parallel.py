"""What data parallel training sends, dense and sparse, and whether it learns what one process learns.

A perceptron of two hidden layers learns labels that another one gives to random inputs. Every batch is
shared out over processes on this machine, which train replicas under
`torch.nn.parallel.DistributedDataParallel`; one process has the whole batch. What they hand to collectives is
counted, and with it what each process sends: rings send 2 (R - 1) / R times the bytes of a sum over R
processes, and R - 1 times those that each gathers.
"""

from __future__ import annotations

import pickle
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import sparselab
from sparselab import GMP, SET, GraNet, PolynomialSchedule, Replicas, RigL
from sparselab.bench.output import tables

FEATURES, CLASSES = 64, 10
DENSE, STATIC = "dense", "Static"
#: Seconds until a run counts as stuck.
PATIENCE = 1200

#: How many times its bytes each of R processes sends, on average.
SENT: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all_gather": lambda ranks: ranks - 1,
    "gather": lambda ranks: (ranks - 1) / ranks,
    "broadcast": lambda ranks: (ranks - 1) / ranks,
}


@dataclass(frozen=True)
class Plan:
    """What every process is told."""

    sparsity: float
    width: int
    steps: int
    every: int
    tokens: int
    dtype: torch.dtype

    def arms(self) -> dict[str, Any]:
        """Algorithms by name, with what `attach` is told of replicas; none for the dense model."""
        stop = 3 * self.steps // 4
        common = {"update_freq": self.every, "stop": stop}
        last = (stop - 1) // self.every * self.every
        falling = PolynomialSchedule(min(0.5, self.sparsity), self.sparsity, last)
        return {
            DENSE: None,
            STATIC: (sparselab.Static(), Replicas()),
            "SET": (SET(**common), Replicas()),
            "RigL": (RigL(**common), Replicas()),
            "RigL by candidates": (RigL(**common), Replicas(growth="candidates")),
            "GMP": (GMP(falling, **common), Replicas()),
            "GraNet": (GraNet(falling, **common), Replicas()),
        }


@dataclass
class Run:
    """What one process found: the loss, its connections, and bytes sent for gradients and for updates."""

    loss: float
    positions: list[list[int]]
    gradient_bytes: float
    update_bytes: float
    n_updates: int


@contextmanager
def counted(sent: Counter[str]) -> Iterator[Callable[[Any, Any], Any]]:
    """Count what Python hands to collectives; gives a communication hook whose bytes count as gradients."""
    kinds = ["updates"]
    originals = {name: getattr(dist, name) for name in SENT}

    def watch(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            # The tensor of one's own is the second argument where all are gathered in a list.
            tensor = arguments[1 if name == "all_gather" else 0]
            group = settings.get(
                "group", arguments[-1] if isinstance(arguments[-1], dist.ProcessGroup) else None
            )
            sent[kinds[-1]] += round(tensor.nbytes * SENT[name](dist.get_world_size(group)))
            return originals[name](*arguments, **settings)

        return call

    def hook(state, bucket):  # type: ignore[no-untyped-def]
        kinds.append("gradients")
        try:
            return allreduce_hook(state, bucket)
        finally:
            kinds.pop()

    for name in SENT:
        setattr(dist, name, watch(name))
    try:
        yield hook
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def perceptron(plan: Plan, sparsity: float | None, seed: int = 0) -> nn.Module:
    """The network that learns, dense or sparse but for its last layer."""
    torch.manual_seed(seed)
    sizes = (FEATURES, plan.width, plan.width)
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(plan.width, CLASSES)).to(plan.dtype)
    if sparsity is not None:
        sparselab.sparsify(model, {"4": None, "*": sparsity})
    return model


def batch(plan: Plan, step: int, teacher: nn.Module, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(size, FEATURES, generator=torch.Generator().manual_seed(step)).to(plan.dtype)
    with torch.no_grad():
        return x, teacher(x).argmax(1)


def train(plan: Plan, arm: str) -> Run:
    """One process of those in the group: its part of every batch."""
    rank, world, chosen = dist.get_rank(), dist.get_world_size(), plan.arms()[arm]
    falls = arm in ("GMP", "GraNet")
    model = perceptron(plan, None if chosen is None else min(0.5, plan.sparsity) if falls else plan.sparsity)
    teacher, sent, n_updates = perceptron(plan, None, seed=1), Counter[str](), 0
    net = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if chosen is not None:
        algorithm, replicas = chosen
        algorithm.attach(net, optimizer, replicas=replicas)
    with counted(sent) as hook:
        net.register_comm_hook(None, hook)
        for step in range(1, plan.steps + 1):
            x, y = batch(plan, step, teacher, plan.tokens)
            part = slice(rank * plan.tokens // world, (rank + 1) * plan.tokens // world)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
            n_updates += chosen is not None and getattr(algorithm, "is_update_step", lambda _: False)(step)
    x, y = batch(plan, 0, teacher, 4096)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(x), y).item()
    positions = [layer.positions().tolist() for _, layer in sparselab.nn.find_sparse(model)]
    return Run(loss, positions, sent["gradients"] / plan.steps, sent["updates"], n_updates)


def work(rank: int, world: int, folder: Path, plans: list[Plan], arms: list[str]) -> None:
    """What each process does: all runs, one after the other."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    found = {(arm, plan.dtype): train(plan, arm) for plan in plans for arm in arms}
    (folder / str(rank)).write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def run(world: int, plans: list[Plan], arms: list[str]) -> dict[tuple[str, torch.dtype], Run]:
    """What the first of so many processes found; all must have the same connections.

    Raises
    ------
    RuntimeError
        If a process ended without a result, or others have other connections.
    """
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=work, args=(rank, world, folder, plans, arms), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + PATIENCE
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        for process in processes:
            process.kill()
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"{world} processes ended with {[process.exitcode for process in processes]}")
        every = [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(world)]
    if any(each[key].positions != found.positions for each in every for key, found in every[0].items()):
        raise RuntimeError(f"the replicas of {world} processes have other connections than each other")
    first: dict[tuple[str, torch.dtype], Run] = every[0]
    return first


def report(options: Namespace, console: Console) -> list[dict[str, Any]]:
    """The subcommand: run, print tables; returns the rows for ``--json``."""
    plans = [
        Plan(options.sparsity, options.width, options.steps, options.every, options.tokens, dtype)
        for dtype in (torch.float64, torch.float32)
    ]
    arms = list(plans[0].arms())
    found = {world: run(world, plans, arms) for world in (1, *options.ranks)}
    for world in options.ranks:
        console.print(_wire(world, found[world], options))
    console.print(_losses(found, options))
    return [
        {"arm": arm, "dtype": str(dtype), "ranks": world, **asdict(each), "positions": None}
        for world, runs in found.items()
        for (arm, dtype), each in runs.items()
    ]


def _wire(world: int, runs: dict[tuple[str, torch.dtype], Run], options: Namespace) -> Any:
    """KiB that each process sends, in float32."""
    dense = runs[DENSE, torch.float32].gradient_bytes
    rows = []
    for (arm, dtype), each in runs.items():
        if dtype == torch.float32:
            update = each.update_bytes / max(each.n_updates, 1)
            whole = each.gradient_bytes + update / 100
            cells = (each.gradient_bytes, update, whole)
            rows.append([arm, *(f"{cell / 1024:.1f}" for cell in cells), f"{whole / dense:.1%}"])
    title = (
        f"KiB that each of {world} processes sends, {FEATURES} -> {options.width} -> {options.width} -> "
        f"{CLASSES}, {options.sparsity:.0%} sparse (GMP, GraNet: in the end), float32"
    )
    header = ["", "gradients of a step", "an update", "a step, with an update every 100", "of dense"]
    return tables.plain(title, header, rows)


def _losses(found: dict[int, dict[tuple[str, torch.dtype], Run]], options: Namespace) -> Any:
    """Loss of one process, and how far off those of several are, and their connections."""
    rows = []
    for (arm, dtype), alone in found[1].items():
        cells = [arm, str(dtype).removeprefix("torch."), f"{alone.loss:.6f}"]
        for world in options.ranks:
            other = found[world][arm, dtype]
            pairs = zip(alone.positions, other.positions, strict=True)
            n_other = sum(len(set(ours) - set(theirs)) for ours, theirs in pairs)
            share = n_other / max(1, sum(map(len, alone.positions)))
            cells.append(f"{other.loss - alone.loss:+.1e} ({share:.1%} other connections)")
        rows.append(cells)
    title = (
        f"Loss after {options.steps} steps of {options.tokens} tokens, with an update every {options.every}"
    )
    return tables.plain(
        title, ["", "", "1 process", *(f"{world} processes" for world in options.ranks)], rows
    )
