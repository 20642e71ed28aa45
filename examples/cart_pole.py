"""The world of the agents: a pole on a cart."""

from __future__ import annotations

from typing import Any

import numpy as np


class CartPole:
    """A pole on a cart that is pushed left or right; over after 200 steps, or when it falls.

    Barto, Sutton, Anderson, "Neuronlike adaptive elements that can solve difficult learning control
    problems", 1983, with the constants and the Euler steps that are usual since.
    """

    limit = 200

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def reset(self) -> np.ndarray[Any, Any]:
        self.state = self.rng.uniform(-0.05, 0.05, 4)
        self.n_steps = 0
        return self.state.astype(np.float32)

    def step(self, action: int) -> tuple[np.ndarray[Any, Any], bool, bool]:
        """The next state, whether the pole fell, and whether the episode is over."""
        x, v, angle, spin = self.state
        force = 10.0 if action else -10.0
        sin, cos = np.sin(angle), np.cos(angle)
        push = (force + 0.05 * spin**2 * sin) / 1.1
        turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        move = push - 0.05 * turn * cos / 1.1
        self.state = np.array([x + 0.02 * v, v + 0.02 * move, angle + 0.02 * spin, spin + 0.02 * turn])
        self.n_steps += 1
        fell = abs(self.state[0]) > 2.4 or abs(self.state[2]) > 12 * np.pi / 180
        return self.state.astype(np.float32), fell, fell or self.n_steps >= self.limit
