"""Data parallel training of a GPT over a slow network, dense and sparse: tokens a second, bytes on the wire.

Each process runs in a network namespace of its own. Virtual cables (veth) lead from these to a bridge in one
more, and token buckets (tbf of tc) at both ends of each cable let through as many bits per second as ports of
a switch would, both ways at once. No latency is added. What a process sends is what its cable has counted,
headers and all. Linux, root, and iproute2 are needed.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import sparselab
from benchmarks.traffic import LOCAL_STEPS, TOP_K, step_bytes
from benchmarks.turns import TurnError
from examples.gpt_model import GPT, PRESETS
from examples.ranks import in_bfloat16
from sparselab.bench.output import tables

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 256
#: A step in so many updates connections.
UPDATE_EVERY = 100
CARD, PORT = "cable", 29500
#: Seconds until a run counts as stuck.
PATIENCE_S = 1200


# The network


def unable() -> str:
    """Why no slow network can be made here; empty if one can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are of Linux"
    if os.geteuid():
        return "network namespaces need root"
    missing = [each for each in ("ip", "tc") if shutil.which(each) is None]
    if missing:
        return f"no {' and no '.join(missing)} (iproute2)"
    try:
        with network(1) as names:
            limit(names, 100)
    except TurnError as error:
        return str(error)
    return ""


@contextmanager
def network(ranks: int) -> Iterator[list[str]]:
    """Namespaces of a switch and of so many processes, which it joins; gone in the end."""
    names = [f"slow{os.getpid()}-{end}" for end in ("switch", *range(ranks))]
    switch, *ends = names
    try:
        for name in names:
            tool("ip", "netns", "add", name)
            tool("ip", "-n", name, "link", "set", "lo", "up")
        tool("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        tool("ip", "-n", switch, "link", "set", "bridge", "up")
        for rank, end in enumerate(ends):
            port = f"port{rank}"
            tool("ip", "-n", end, "link", "add", CARD, "type", "veth", "peer", "name", port, "netns", switch)
            tool("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            tool("ip", "-n", end, "address", "add", f"{address(rank)}/24", "dev", CARD)
            tool("ip", "-n", end, "link", "set", CARD, "up")
        yield names
    finally:
        for name in names:  # and what is in them
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def limit(names: list[str], mbit: float) -> None:
    """Let through so many Mbit/s at both ends of every cable of a network."""
    switch, *ends = names
    burst = max(16_000, round(mbit * 1e6 / 8 / 250))  # what comes within a tick of the clock
    for rank, end in enumerate(ends):
        for name, card in ((end, CARD), (switch, f"port{rank}")):
            bucket = f"root tbf rate {round(mbit * 1e6)}bit burst {burst} latency 100ms"
            tool("tc", "-n", name, "qdisc", "replace", "dev", card, *bucket.split())


def tool(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TurnError(f"{' '.join(command)}: {done.stderr.strip()}")


def address(rank: int) -> str:
    return f"10.77.0.{rank + 1}"


# What each process does


@dataclass(frozen=True)
class Plan:
    """What every process is told."""

    model: str
    sparsity: float
    tokens: int
    rounds: int
    ways: list[str]


class Trainer:
    """A GPT in one of several processes, dense or sparse, and how they average what they have found."""

    def __init__(self, plan: Plan, sparsity: float, way: str, growth: Any = "exact") -> None:
        torch.manual_seed(0)
        shape = PRESETS[plan.model]
        model: nn.Module = GPT(256, CONTEXT, shape.n_layer, shape.d_model, shape.d_ff, shape.n_head)
        if sparsity:  # embeddings, norms and the output stay dense
            model = sparselab.sparsify(model, {"*.attn.*": sparsity, "*.mlp.*": sparsity})
        self.model, self.sparsity, self.way = model, sparsity, way
        self.net = model if way == "local SGD" else DistributedDataParallel(model)
        self.n_parameters = sum(each.numel() for each in model.parameters())
        if way == "bfloat16":
            self.net.register_comm_hook(None, in_bfloat16)
        elif way == "top-k":
            sparselab.TopKCompression(self.net, TOP_K)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.updates = bool(sparsity) and way != "local SGD"
        if self.updates:  # after a step to begin with, and those that are timed
            algorithm = sparselab.RigL(update_freq=plan.rounds + 2)
            algorithm.attach(self.net, self.optimizer, replicas=sparselab.Replicas(growth=growth))
        self._windows = max(1, plan.tokens // CONTEXT), min(CONTEXT, plan.tokens)
        self._draw = torch.Generator().manual_seed(dist.get_rank())

    def step(self) -> None:
        """One step of the process, which with some ways it takes with the others."""
        x, y = torch.randint(256, (2, *self._windows), generator=self._draw)
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(x).flatten(0, 1), y.flatten()).backward()
        self.optimizer.step()

    def average(self) -> None:
        """Average weights, with the way that does."""
        if self.way == "local SGD":
            sparselab.average_over_ranks(self.model)

    def expected(self, world: int) -> float:
        """Bytes that a process sends for a step by the formulas of ``docs/scaling.md``."""
        return step_bytes(self.way, [each.numel() for each in self.model.parameters()], world)


def sent() -> int:
    """Bytes that have left this process's cable."""
    return int(Path(f"/sys/class/net/{CARD}/statistics/tx_bytes").read_text())


@dataclass
class Taken:
    """What something has taken: seconds, and bytes that were sent."""

    seconds: float
    n_bytes: float


def timed(call: Callable[[], Any]) -> Taken:
    """A call that all processes begin together, until all have ended it."""
    dist.barrier()
    start, before = time.perf_counter(), sent()
    call()
    dist.barrier()
    return Taken(time.perf_counter() - start, sent() - before)


def median(samples: list[Taken]) -> Taken:
    return Taken(*(statistics.median(column) for column in zip(*map(astuple, samples), strict=True)))


def work(plan: Plan) -> dict[str, Any]:
    """What each process does: all arms in turns, once the network is slow; returns what it has found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    arms = [Trainer(plan, sparsity, way) for way in plan.ways for sparsity in (0.0, plan.sparsity)]
    proposing = Trainer(plan, plan.sparsity, "whole", "candidates")
    for each in (*arms, proposing):
        each.step()
        each.average()
    print("ready", flush=True)
    sys.stdin.readline()
    numbers = torch.zeros(1 << 20)
    link = timed(lambda: dist.broadcast(numbers, 0))
    steps: list[list[Taken]] = [[] for _ in arms]
    averages: list[list[Taken]] = [[] for _ in arms]
    for _ in range(plan.rounds):
        for number, each in enumerate(arms):
            steps[number].append(timed(each.step))
            averages[number].append(timed(each.average) if each.way == "local SGD" else Taken(0, 0))
    rows = [_row(*each) for each in zip(arms, map(median, steps), map(median, averages), strict=True)]
    for _ in range(plan.rounds):
        proposing.step()
    candidates = timed(proposing.step)
    dist.destroy_process_group()
    return {"mbit": 8 * link.n_bytes / link.seconds / 1e6, "rows": rows, "candidates": asdict(candidates)}


def _row(arm: Trainer, step: Taken, average: Taken) -> dict[str, Any]:
    """What an arm takes for a step, on average where some are others."""
    share = LOCAL_STEPS if arm.way == "local SGD" else 1
    return {
        "sparsity": arm.sparsity,
        "way": arm.way,
        "parameters": arm.n_parameters,
        "step": asdict(Taken(step.seconds + average.seconds / share, step.n_bytes + average.n_bytes / share)),
        "expected_bytes": arm.expected(dist.get_world_size()),
        "update": asdict(timed(arm.step)) if arm.updates else None,
    }


# The command


def run(plan: Plan, ranks: int, mbit: float) -> dict[str, Any]:
    """What the first of so many processes has found over cables of so many Mbit/s.

    Raises
    ------
    TurnError
        If there can be no such network, or a process fails.
    """
    with network(ranks) as names:
        workers = [_start(plan, rank, ranks, name) for rank, name in enumerate(names[1:])]
        try:
            for each in workers:
                if each.stdout.readline() != "ready\n":
                    raise TurnError(f"a process failed: {each.communicate()[1][-2000:]}")
            limit(names, mbit)
            said = []
            for each in workers:
                each.stdin.write("go\n")
                each.stdin.flush()
            for each in workers:
                out, err = each.communicate(timeout=PATIENCE_S)
                if each.returncode:
                    raise TurnError(f"a process failed: {err[-2000:]}")
                said.append(out)
        finally:
            for each in workers:
                each.kill()
                each.wait()
    found: dict[str, Any] = json.loads(said[0])
    return found


def _start(plan: Plan, rank: int, ranks: int, name: str) -> subprocess.Popen[str]:
    """A process in a namespace, which is told the plan and what torch asks of the environment."""
    told = {"MASTER_ADDR": address(0), "MASTER_PORT": PORT, "RANK": rank, "WORLD_SIZE": ranks}
    settings = {**told, "GLOO_SOCKET_IFNAME": CARD, "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT}
    return subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, "-m", "benchmarks.slow_link", json.dumps(asdict(plan))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, **{key: str(value) for key, value in settings.items()}},
    )  # fmt: skip


def report(options: Namespace, console: Console) -> list[dict[str, Any]]:
    """The subcommand: run, print a table; returns the rows for ``--json``."""
    if why := unable():
        raise TurnError(f"no slow network can be made here: {why}")
    plan = Plan(options.model, options.sparsity, options.tokens, options.rounds, options.ways)
    found = run(plan, options.ranks, options.mbit)
    title = (
        f"{plan.model}, {options.ranks} processes of one thread, {plan.tokens} tokens each, cables of "
        f"{options.mbit:g} Mbit/s ({found['mbit']:.1f} measured); local SGD: each {LOCAL_STEPS} steps"
    )
    header = ["", "sent", "parameters", "MB a step", "by formula", "ms a step", "tokens/s"]
    header += ["of the first", "ms with an update", f"tokens/s, one in {UPDATE_EVERY}"]
    tokens = plan.tokens * options.ranks
    first = tokens / found["rows"][0]["step"]["seconds"]
    console.print(tables.plain(title, header, [_cells(row, tokens, first) for row in found["rows"]]))
    for row in found["rows"]:
        if row["update"] and row["way"] == "whole":
            exact, few = row["update"], found["candidates"]
            console.print(
                f"A step with an update sends {exact['n_bytes'] / 1e6:.1f} MB; by candidates "
                f"{few['n_bytes'] / 1e6:.1f} MB, in {1e3 * few['seconds']:,.0f} ms"
            )
    return [{"mbit": found["mbit"], **row} for row in found["rows"]]


def _cells(row: dict[str, Any], tokens: int, first: float) -> list[str]:
    """A line of the table."""
    seconds, update = row["step"]["seconds"], row["update"]
    cells = [
        f"{row['sparsity']:.0%}" if row["sparsity"] else "dense", row["way"], f"{row['parameters']:,}",
        f"{row['step']['n_bytes'] / 1e6:.2f}", f"{row['expected_bytes'] / 1e6:.2f}",
        f"{1e3 * seconds:,.0f}", f"{tokens / seconds:,.0f}", f"{tokens / seconds / first:.2f}x",
    ]  # fmt: skip
    if update is None:
        return [*cells, "", ""]
    mean = seconds + (update["seconds"] - seconds) / UPDATE_EVERY
    return [*cells, f"{1e3 * update['seconds']:,.0f}", f"{tokens / mean:,.0f}"]


if __name__ == "__main__":
    print(json.dumps(work(Plan(**json.loads(sys.argv[1])))))
