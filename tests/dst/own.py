"""An algorithm as a user would write one: a class made of parts, of which some are the user's own."""

from __future__ import annotations

import numpy as np
import torch

from sparselab.dst import DropScore, DynamicSparsityAlgorithm, Exchange, GradientGrowth, random_free


class AveragedSensitivity(DropScore):
    """``|w| * M`` with ``M <- M / 2 + |g|`` of each connection, taken at the updates; M follows it."""

    def __init__(self):
        self.averages = {}

    def reason_to_skip(self, view):
        return "no gradient" if view.gradient is None else ""

    def __call__(self, view):
        average = view.gradient.abs()
        if view.index in self.averages:
            average = average + self.averages[view.index] / 2
        self.averages[view.index] = average
        return (view.weights.abs() * average).numpy()

    def follow(self, view, source):
        if view.index in self.averages:
            old = torch.cat((self.averages[view.index], torch.zeros(1)))
            self.averages[view.index] = old[source]

    def detach(self, layers):
        self.averages.clear()

    def state_dict(self):
        return {str(index): average.clone() for index, average in self.averages.items()}

    def load_state_dict(self, state):
        self.averages = {int(index): average.clone() for index, average in state.items()}


class Mixed(GradientGrowth):
    """Half of the positions by gradient, the others anywhere."""

    by_row = False
    of_blocks = False

    def choose(self, update):
        view, half = update.view, update.n_grow // 2
        steep = self.gradient(view).best(view.matrix, update.drop, half)
        taken = np.union1d(update.kept, steep)
        return np.union1d(steep, random_free(view.rng(), taken, view.size, update.n_grow - half))


class Own(DynamicSparsityAlgorithm):
    """All there is to it."""

    def __init__(self, sparsity=None, *, drop_fraction=0.3, update_freq=100, seed=0):
        super().__init__(
            Exchange(sparsity, drop_fraction),
            update_freq=update_freq,
            seed=seed,
            drop=AveragedSensitivity(),
            grow=Mixed(),
        )
