"""A sparse model trains as its masked dense twin does: topology by topology, weight by weight."""

from __future__ import annotations

import pytest
import torch

from tests.dst.contract_rows import ROWS
from tests.dst.harness import CONVOLUTIONS, OPTIMIZERS, backward, build, sparse_layers
from tests.shared import n_steps, usual

#: Of whom every run tries both optimizers: they move weights, their moments, several layers at a time.
FIRST = "set", "rigl", "snfs", "gmp"


def assert_same_model(sparse, masked):
    """Equal topologies, and weights as near as sums of another order can be."""
    for ours, theirs in zip(sparse_layers(sparse), sparse_layers(masked), strict=True):
        assert torch.equal(ours.positions(), theirs.positions()), "the topologies differ"
        assert_near(ours.per_connection(ours.stored), theirs.per_connection(theirs.stored))
    others = [
        [p for p in model.parameters() if all(p is not layer.stored for layer in sparse_layers(model))]
        for model in (sparse, masked)
    ]
    for ours, theirs in zip(*others, strict=True):
        assert_near(ours, theirs)


def assert_near(ours, theirs):
    assert ours.shape == theirs.shape
    error = float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())
    assert error <= 1e-9, f"the weights differ by {error:.1e} of the largest"


def start(kind, algorithm_name, optimizer_name):
    row = ROWS[algorithm_name]
    model = row.prepare(build(kind, torch.float64, sparsity=row.start))
    model.apply(algorithm := row.make())
    return model, OPTIMIZERS[optimizer_name](model.parameters()), algorithm


@pytest.mark.parametrize("algorithm_name", ["set", "rigl", "srigl", "snfs", "gse grabo", "topkast", "chts"])
def test_a_sparse_convolution_trains_as_its_masked_twin(algorithm_name):
    train_twins(("conv", "masked conv"), algorithm_name, "sgd", 60)


@pytest.mark.parametrize("algorithm_name", ["set by row", "rigl", "srigl"])
@pytest.mark.parametrize("kind", [kind for kind in CONVOLUTIONS if kind != "conv"])
def test_other_convolutions_train_as_their_masked_twins(kind, algorithm_name):
    # Later on two positions whose gradients differ by rounding alone compete in one of them.
    train_twins((kind, f"masked {kind}"), algorithm_name, "adamw", 26)


@pytest.mark.parametrize("algorithm_name", ["set", "snfs", "gse grabo", "topkast", "chts", "deepr", "granet"])
def test_a_sparse_transposed_convolution_trains_as_its_masked_twin(algorithm_name):
    train_twins(("transposed", "masked transposed"), algorithm_name, "sgd", 40)


@pytest.mark.parametrize("algorithm_name", [name for name, row in ROWS.items() if row.keeps_fan_in])
def test_a_fan_in_model_trains_as_its_masked_twin(algorithm_name):
    train_twins(("fan-in", "masked fan-in"), algorithm_name, "adamw", n_steps(60, 120))


@pytest.mark.parametrize(
    ("algorithm_name", "optimizer_name"),
    [usual(name in FIRST or each == "adamw", name, each) for name in ROWS for each in OPTIMIZERS],
)
def test_a_sparse_model_trains_as_its_masked_twin(algorithm_name, optimizer_name):
    train_twins(("real", "masked"), algorithm_name, optimizer_name, n_steps(46, 120))


def train_twins(kinds, algorithm_name, optimizer_name, steps):
    """Train both, and compare them after every step."""
    twins = [start(kind, algorithm_name, optimizer_name) for kind in kinds]
    (sparse, *_), (masked, *_) = twins
    born = [layer.positions().clone() for layer in sparse_layers(sparse)]
    assert_same_model(sparse, masked)
    for step in range(1, steps + 1):
        for model, optimizer, algorithm in twins:
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
            algorithm.step()
        assert_same_model(sparse, masked)
    now = [layer.positions() for layer in sparse_layers(sparse)]
    same = all(torch.equal(old, new) for old, new in zip(born, now, strict=True))
    assert same == (algorithm_name == "static")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda layer: layer.stored.data.mul_(1 + 2e-9), "the weights differ by 2.0e-09"),
        (lambda layer: layer.bias.data.add_(1e-6), "the weights differ"),
        (lambda layer: layer.rewrite(torch.tensor([0]), free(layer)), "the topologies differ"),
        (lambda layer: layer.stored.data.fill_(torch.nan), "the weights differ by nan"),
    ],
)
def test_the_comparison_sees_a_difference(spoil, message):
    sparse, masked = build("real", torch.float64), build("masked", torch.float64)
    assert_same_model(sparse, masked)
    spoil(masked[2])
    with pytest.raises(AssertionError, match=message):
        assert_same_model(sparse, masked)


def free(layer):
    return (~layer.mask).reshape(-1).nonzero()[0]
