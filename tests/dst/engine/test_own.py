"""Parts and algorithms from outside the package; the contract tests put the same one through everything."""

import numpy as np
import torch

from sparselab.dst import DynamicSparsityAlgorithm, Exchange, SparsityAlgorithm
from tests.dst.fake import FakeSparse
from tests.dst.harness import build, sparse_layers
from tests.dst.own import Mixed, Own


def test_a_growth_of_ones_own_sees_the_gradient():
    layer = FakeSparse(10, 8, 0.5, dtype=torch.float64)
    layer.apply(algorithm := DynamicSparsityAlgorithm(Exchange(None, 0.5), update_freq=1, grow=Mixed()))
    x, dy = torch.randn(5, 10, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    kept = set(layer.live[layer.weight_values.abs().argsort()[20:]].tolist())
    (layer(x) * dy).sum().backward()
    algorithm.step()
    steep = (dy.T @ x).abs().reshape(-1).numpy()
    free = [position for position in np.argsort(-steep) if position not in kept]
    assert kept | set(free[:10]) <= set(layer.live.tolist())
    assert not set(free[:20]) <= set(layer.live.tolist())
    assert layer.nnz == 40


def test_its_arguments_are_shown_and_compared():
    assert repr(Own(0.8, seed=3)).startswith("Own(sparsity=0.8, drop_fraction=0.3, update_freq=100, seed=3)")
    configs = [Own(**given).state_dict()["config"] for given in ({}, {"seed": 1}, {"drop_fraction": 0.2})]
    assert all(configs.count(config) == 1 for config in configs)


class Bare(SparsityAlgorithm):
    """Not of parts: the three methods that the base class calls."""

    def __init__(self, sparsity=None, *, label="bare"):
        super().__init__(sparsity)
        self.label = label
        self.calls = []

    def _check_layer(self, layer):
        self.calls.append("check")

    def _before_step(self, step):
        self.calls.append(f"before {step}")

    def _after_step(self, step):
        self.calls.append(f"after {step}")


def test_an_algorithm_without_parts_is_called_when_it_is_told():
    model = build("fake")
    algorithm = Bare(0.5)
    algorithm.attach(model)
    algorithm.step()
    algorithm.step()
    assert algorithm.calls == ["check", "check", "before 1", "after 1", "before 2", "after 2", "before 3"]
    other = Bare(0.5)
    other.attach(build("fake"))
    other.load_state_dict(algorithm.state_dict())
    assert other.calls[-1] == "before 3"
    assert repr(algorithm) == "Bare(sparsity=0.5, label='bare') of 2 layers after 2 steps"
    algorithm.detach()
    assert len(sparse_layers(model)) == 2
    model.apply(other.__class__())
