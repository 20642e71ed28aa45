"""A deep Q-network that balances a pole: dense, masked and sparse, side by side.

    python examples/dqn.py                    # four agents, a table
    python examples/dqn.py --quick            # a few seconds each: too short to learn much
    python examples/dqn.py --set steps=30000 --set sparsity=0.95

The middle layer is sparse and rewired while the agent learns. The target network follows by
`sparselab.soft_update`, which mixes weights by position: an average slot by slot, as dense agents have it,
would mix the weights of different connections after the first update.

Mnih et al., "Human-level control through deep reinforcement learning", Nature 2015; double Q-learning as van
Hasselt, Guez, Silver, AAAI 2016; soft updates as Lillicrap et al., ICLR 2016.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from arms import ARMS, Arm, attach, live_weights
from cart_pole import CartPole
from options import changed
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

import sparselab


@dataclass(frozen=True)
class Config:
    """What a run is made of."""

    steps: int = 12_000
    width: int = 256
    sparsity: float = 0.9
    batch: int = 64
    memory: int = 10_000
    warmup: int = 500  # random steps before the first update
    gamma: float = 0.99
    lr: float = 5e-4
    tau: float = 0.01  # of the soft updates
    explore: int = 4_000  # steps until nearly all actions are the network's
    update_freq: int = 200  # optimizer steps between two changes of the connections
    drop_fraction: float = 0.3
    seed: int = 0


QUICK = Config(steps=500, warmup=100, explore=300, update_freq=50)


class Memory:
    """The last transitions, drawn from at random."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.states, self.following = (torch.empty(size, 4) for _ in range(2))
        self.actions = torch.empty(size, dtype=torch.int64)
        self.fell = torch.empty(size)
        self.size, self.count, self.rng = size, 0, rng

    def add(self, state: Any, action: int, following: Any, fell: bool) -> None:
        at = self.count % self.size
        self.states[at], self.following[at] = torch.from_numpy(state), torch.from_numpy(following)
        self.actions[at], self.fell[at] = action, float(fell)
        self.count += 1

    def draw(self, n: int) -> tuple[torch.Tensor, ...]:
        at = torch.from_numpy(self.rng.integers(0, min(self.count, self.size), n))
        return self.states[at], self.actions[at], self.following[at], self.fell[at]


class Result(NamedTuple):
    """How an agent did."""

    name: str
    weights: int
    mean_return: float  # of the last 20 episodes
    best: float  # of all means of 20 episodes
    seconds: float


def make_network(agent: Arm, cfg: Config) -> nn.Sequential:
    torch.manual_seed(cfg.seed)
    network = nn.Sequential(
        nn.Linear(4, cfg.width),
        nn.ReLU(),
        nn.Linear(cfg.width, cfg.width),
        nn.ReLU(),
        nn.Linear(cfg.width, 2),
    )
    if agent.layer is not None:
        sparselab.sparsify(network, {"2": {"layer": agent.layer, "sparsity": cfg.sparsity}})
    return network


def learn(
    network: nn.Module, target: nn.Module, draws: tuple[torch.Tensor, ...], gamma: float
) -> torch.Tensor:
    """The loss of double Q-learning; every step that does not fall is worth 1."""
    states, actions, following, fell = draws
    with torch.no_grad():
        best = network(following).argmax(1, keepdim=True)
        wanted = 1 + gamma * (1 - fell) * target(following).gather(1, best)[:, 0]
    return nn.functional.smooth_l1_loss(network(states).gather(1, actions[:, None])[:, 0], wanted)


def train(name: str, cfg: Config) -> Result:
    agent, rng = ARMS[name], np.random.default_rng(cfg.seed)
    network = make_network(agent, cfg)
    target = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=cfg.lr)
    attach(agent, network, optimizer, cfg, stop=cfg.steps)
    world, memory = CartPole(np.random.default_rng(cfg.seed + 1)), Memory(cfg.memory, rng)
    returns: list[float] = []
    state, start = world.reset(), time.perf_counter()
    for step in tqdm(range(cfg.steps), desc=name, leave=False):
        greed = min(1.0, step / cfg.explore) * 0.98
        if step < cfg.warmup or rng.random() > greed:
            action = int(rng.integers(2))
        else:
            with torch.no_grad():
                action = int(network(torch.from_numpy(state)[None].to(memory.states)).argmax())
        following, fell, over = world.step(action)
        memory.add(state, action, following, fell)
        state = following
        if over:
            returns.append(world.n_steps)
            state = world.reset()
        if step >= cfg.warmup:
            optimizer.zero_grad()
            learn(network, target, memory.draw(cfg.batch), cfg.gamma).backward()
            optimizer.step()
            sparselab.soft_update(target, network, cfg.tau)
    means = [float(np.mean(returns[max(0, end - 20) : end])) for end in range(1, len(returns) + 1)]
    return Result(name, live_weights(network), means[-1], max(means), time.perf_counter() - start)


def make_table(results: Sequence[Result], cfg: Config) -> Table:
    table = Table(
        title=f"A pole balanced for at most {CartPole.limit} steps, {cfg.steps} steps of experience"
    )
    for title in ("agent", "live weights", "last 20 episodes", "best 20 episodes", "seconds"):
        table.add_column(title, justify="left" if title == "agent" else "right")
    for each in results:
        numbers = f"{each.weights:,}", f"{each.mean_return:.1f}", f"{each.best:.1f}", f"{each.seconds:.1f}"
        table.add_row(each.name, *numbers)
    return table


def main(options: Sequence[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="few steps: shows that it runs, not that it learns"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting")
    parser.add_argument(
        "--seeds", type=int, default=1, help="runs of each agent, which are averaged (default: 1)"
    )
    args = parser.parse_args(options)
    cfg = changed(QUICK if args.quick else Config(), args.set)
    torch.set_num_threads(1)  # layers of this size gain nothing from more
    results = []
    for name in ARMS:
        runs = [train(name, replace(cfg, seed=cfg.seed + i)) for i in range(args.seeds)]
        means = [float(np.mean(numbers)) for numbers in zip(*(run[2:] for run in runs), strict=True)]
        results.append(Result(name, runs[0].weights, *means))
    Console().print(make_table(results, cfg))
    return results


if __name__ == "__main__":
    main()
