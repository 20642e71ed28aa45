"""What is easily done wrong: each must be right, or an error or a warning at once."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

import sparselab
from sparselab.dst import DropScore
from tests.hazards.cases import demand, hazard
from tests.hazards.programs.names import set_, weights


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 32)).square().sum().backward()
        optimizer.step()


def net() -> nn.Module:
    return nn.Sequential(sparselab.SparseLinear(32, 32, sparsity=0.8), nn.ReLU(), nn.Linear(32, 4))


@hazard("misuse", "an algorithm reused over cross-validation folds")
def folds() -> None:
    torch.manual_seed(0)
    algorithm = sparselab.SET(update={"freq": 2, "stop": 6}, drop_fraction=0.5)
    for fold in range(2):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = model[0].positions()
        algorithm.attach(model, optimizer)
        train(model, optimizer, 6)
        demand(not torch.equal(before, model[0].positions()), f"fold {fold} was never rewired")


@hazard("misuse", "attach(model, optimizer) with an optimizer made before sparsify")
def foreign_optimizer() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model = sparselab.sparsify(model, {"0": 0.8}) or model
    sparselab.SET().attach(model, optimizer)
    before = weights(model[0]).detach().clone()
    train(model, optimizer, 3)
    demand(not torch.equal(before, weights(model[0]).detach()), "the sparse layer does not train")


@hazard("misuse", "a deepcopy of an attached model is trained with an optimizer of its own")
def copied() -> None:
    torch.manual_seed(0)
    model = net()
    algorithm = set_(1, drop_fraction=0.5)
    model.apply(algorithm)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    before = model[0].positions()
    train(twin, optimizer, 2)
    algorithm.step()
    demand(torch.equal(before, model[0].positions()), "the original was rewired")


@hazard("misuse", "attach(model, optimizer) and algorithm.step() beside it")
def counted_twice() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    algorithm = set_(100)
    algorithm.attach(model, optimizer)
    for _ in range(3):
        train(model, optimizer, 1)
        algorithm.step()
    demand(algorithm.steps_done == 3, f"{algorithm.steps_done} steps were counted, not 3")


class Scaled(sparselab.SparseLinear):
    """A user's layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


@hazard("misuse", "densify of a subclass")
def dense_subclass() -> None:
    model = nn.Sequential(Scaled(32, 16, sparsity=0.5))
    x = torch.randn(4, 32)
    expected = model(x)
    model = sparselab.densify(model) or model
    demand(torch.allclose(model(x), expected, atol=1e-5), f"off by {(model(x) - expected).abs().max():.2g}")


@hazard("misuse", "to_dense of a subclass")
def to_dense_subclass() -> None:
    layer, x = Scaled(32, 16, sparsity=0.5), torch.randn(4, 32)
    got, expected = layer.to_dense()(x), layer(x)
    demand(torch.allclose(got, expected, atol=1e-5), f"off by {(got - expected).abs().max():.2g}")


def dropped_with(score: Any) -> int:
    layer = sparselab.SparseLinear(32, 64, sparsity=0.9)
    try:
        algorithm = sparselab.SET(drop_fraction=0.3, update={"freq": 1}, drop=score)
    except TypeError:
        algorithm = sparselab.dst.DynamicSparsityAlgorithm(drop=score, drop_fraction=0.3, update={"freq": 1})
    layer.apply(algorithm)
    algorithm.step()
    return int(algorithm.last_update[0].dropped)


class Short(DropScore):
    def __call__(self, view: Any) -> Any:
        return np.zeros(2)


class OfTensor(DropScore):
    def __call__(self, view: Any) -> Any:
        return torch.zeros(view.nnz)


@hazard("misuse", "a DropScore of the wrong length")
def short_score() -> None:
    demand(dropped_with(Short()) == 61, "accepted: another number of connections was dropped")


@hazard("misuse", "a DropScore that returns a tensor")
def tensor_score() -> None:
    try:
        n = dropped_with(OfTensor())
    except TypeError as error:
        demand("OfTensor" in str(error), f"does not name the score: {error}")
        raise
    demand(n == 61, "another number of connections was dropped")


@hazard("misuse", "two default SETs in a Group draw the same positions", refusable=False)
def group_of_two() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: sparselab.SparseLinear(64, 64, sparsity=0.9) for name in "ab"})
    model["b"].load_state_dict(model["a"].state_dict())
    group = sparselab.Group({name: set_(1, drop_fraction=0.5) for name in "ab"})
    group.attach(model)
    group.step()
    demand(not torch.equal(model["a"].positions(), model["b"].positions()), "both drew the same positions")


@hazard("misuse", "Group.load_state_dict changes nothing when a member refuses", refusable=False)
def group_atomic() -> None:
    model = nn.ModuleDict({name: sparselab.SparseLinear(64, 64, sparsity=0.9) for name in "ab"})

    def group(second: float) -> Any:
        new = sparselab.Group({"a": set_(3), "b": set_(3, drop_fraction=second)})
        new.attach(copy.deepcopy(model))
        return new

    saved = group(0.3)
    for _ in range(5):
        saved.step()
    other = group(0.2)
    before = repr(other.state_dict())
    try:
        other.load_state_dict(saved.state_dict())
    except ValueError:
        demand(repr(other.state_dict()) == before, "the first member was changed")
        return
    demand(False, "accepted")
