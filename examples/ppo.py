"""Proximal policy optimization on a cart-pole: dense, masked and sparse, side by side.

    python examples/ppo.py                    # four agents, a table
    python examples/ppo.py --quick            # a few seconds each: too short to learn much
    python examples/ppo.py --set steps=80000 --set sparsity=0.95

The middle layers of the policy and of the value network are sparse and rewired while the agent learns, also
between the epochs on one rollout: the ratio of probabilities then compares two topologies.

Schulman et al., "Proximal policy optimization algorithms", 2017, equation 7; Schulman et
al., "High-dimensional continuous control using generalized advantage estimation", ICLR 2016.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from arms import ARMS, Arm, Result, attach, live_weights, print_results
from cart_pole import CartPole
from options import configured
from torch import Tensor, nn
from tqdm import tqdm

import sparselab


@dataclass(frozen=True)
class Config:
    """What a run is made of."""

    steps: int = 40_000  # of all worlds together
    worlds: int = 8
    horizon: int = 128  # steps of each world in a rollout
    epochs: int = 4  # passes over a rollout
    batch: int = 256
    width: int = 256
    sparsity: float = 0.9
    gamma: float = 0.99
    lam: float = 0.95  # of generalized advantage estimation
    clip: float = 0.2  # of the ratio of probabilities
    value_weight: float = 0.5
    entropy_weight: float = 0.01
    max_norm: float = 0.5  # of the gradient
    lr: float = 1e-3
    update_freq: int = 50  # optimizer steps between two changes of the connections
    drop_fraction: float = 0.3
    seed: int = 0


QUICK = Config(steps=1_024, horizon=32, batch=64, update_freq=5)


class ActorCritic(nn.Module):
    """A policy (logits of two actions) and a value, two networks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.policy, self.value = (
            nn.Sequential(
                nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, n)
            )
            for n in (2, 1)
        )


class Rollout(NamedTuple):
    """What `horizon` steps of all worlds have shown, as tensors (steps, worlds, ...)."""

    states: Tensor
    actions: Tensor
    following: Tensor  # the state that an action led to, also where a new episode begins after it
    fell: Tensor
    over: Tensor


class Player:
    """Worlds that are played together, and how long their episodes were."""

    def __init__(self, cfg: Config) -> None:
        self.worlds = [CartPole(np.random.default_rng((cfg.seed, i))) for i in range(cfg.worlds)]
        self.states = [world.reset() for world in self.worlds]
        self.lengths: list[int] = []
        self.generator = torch.Generator().manual_seed(cfg.seed)

    @torch.no_grad()
    def play(self, policy: nn.Module, horizon: int) -> Rollout:
        rows = []
        for _ in range(horizon):
            states = torch.from_numpy(np.stack(self.states)).to(torch.get_default_dtype())
            actions = torch.multinomial(policy(states).softmax(1), 1, generator=self.generator)
            steps = [world.step(int(a)) for world, a in zip(self.worlds, actions, strict=True)]
            following, fell, over = (np.stack(each) for each in zip(*steps, strict=True))
            self.lengths += [world.n_steps for world, end in zip(self.worlds, over, strict=True) if end]
            self.states = [
                world.reset() if end else state
                for world, end, state in zip(self.worlds, over, following, strict=True)
            ]
            seen = (torch.from_numpy(each) for each in (following, fell, over))
            rows.append((states, actions, *(each.to(states) for each in seen)))
        return Rollout(*(torch.stack(each) for each in zip(*rows, strict=True)))


def advantages(values: Tensor, following: Tensor, fell: Tensor, over: Tensor, cfg: Config) -> Tensor:
    """Generalized advantage estimates, all (steps, worlds); every step is worth 1.

    An episode that ends without a fall was cut short: the value of its last state counts.
    """
    deltas = 1 + cfg.gamma * (1 - fell) * following - values
    found, carried = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        carried = deltas[t] + cfg.gamma * cfg.lam * (1 - over[t]) * carried
        found[t] = carried
    return found


def objective(model: ActorCritic, batch: Sequence[Tensor], cfg: Config) -> Tensor:
    """The clipped objective, the squared error of the value and the entropy, as one loss."""
    states, actions, old, advantage, target = batch
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    log_p = model.policy(states).log_softmax(1)
    ratio = (log_p.gather(1, actions)[:, 0] - old).exp()
    clipped = ratio.clamp(1 - cfg.clip, 1 + cfg.clip)
    gain = torch.minimum(ratio * advantage, clipped * advantage).mean()
    error = (model.value(states)[:, 0] - target).square().mean()
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    return cfg.value_weight * error - gain - cfg.entropy_weight * entropy


def make_model(arm: Arm, cfg: Config) -> ActorCritic:
    torch.manual_seed(cfg.seed)
    model = ActorCritic(cfg.width)
    if arm.layer is not None:
        sparselab.sparsify(model, {"*.2": {"layer": arm.layer, "sparsity": cfg.sparsity}})
    return model


def train(name: str, cfg: Config) -> Result:
    arm, size, start = ARMS[name], cfg.horizon * cfg.worlds, time.perf_counter()
    model, player = make_model(arm, cfg), Player(cfg)
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr)
    rollouts = cfg.steps // size
    attach(arm, model, optimizer, cfg, stop=rollouts * cfg.epochs * -(-size // cfg.batch))
    losses = []
    for _ in tqdm(range(rollouts), desc=name, leave=False):
        seen = player.play(model.policy, cfg.horizon)
        with torch.no_grad():
            old = model.policy(seen.states).log_softmax(-1).gather(-1, seen.actions)[..., 0]
            values, following = (model.value(each)[..., 0] for each in (seen.states, seen.following))
        gains = advantages(values, following, seen.fell, seen.over, cfg)
        whole = [each.flatten(0, 1) for each in (seen.states, seen.actions, old, gains, gains + values)]
        for _ in range(cfg.epochs):
            for at in torch.randperm(size, generator=player.generator).split(cfg.batch):
                optimizer.zero_grad()
                loss = objective(model, [each[at] for each in whole], cfg)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), cfg.max_norm)
                optimizer.step()
                losses.append(loss.item())
    lengths, seconds = player.lengths, time.perf_counter() - start
    means = [float(np.mean(lengths[max(0, end - 20) : end])) for end in range(1, len(lengths) + 1)]
    return Result(name, live_weights(model), (means[-1], max(means)), seconds, losses, model)


def main(options: Sequence[str] | None = None) -> list[Result]:
    cfg = configured(__doc__, Config(), QUICK, options)
    torch.set_num_threads(1)  # layers of this size gain nothing from more
    results = [train(name, cfg) for name in ARMS]
    title = f"A pole balanced for at most {CartPole.limit} steps, {cfg.steps} steps of experience"
    print_results(title, results, {"last 20 episodes": ".1f", "best 20 episodes": ".1f"})
    return results


if __name__ == "__main__":
    main()
