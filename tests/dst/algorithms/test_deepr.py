"""DeepR: the walk and the replacement against slow ones, signs, scopes, and the learning rate."""

import doctest

import numpy as np
import pytest
import torch

from sparselab.dst import DeepR, LinearSchedule, UpdateReport
from sparselab.dst.algorithms import deepr
from sparselab.dst.view import LayerView
from sparselab.nn import MaskedLinear, SparseLinear
from tests.dst.fake import FakeSparse
from tests.dst.harness import LAYERS, assert_topology

MAKE = {
    "fake": lambda: FakeSparse(30, 12, 0.8, dtype=torch.float64),
    "real": lambda: SparseLinear(30, 12, sparsity=0.8, dtype=torch.float64),
    "masked": lambda: MaskedLinear(30, 12, sparsity=0.8, dtype=torch.float64),
}


def start(layers, algorithm, lr=0.5):
    """The first step, which takes the signs of the weights; the optimizer only tells its learning rate."""
    layers.apply(algorithm)
    algorithm.track(optimizer := torch.optim.SGD(layers.parameters(), lr=lr))
    layers.optimizer = optimizer  # algorithms hold it weakly
    algorithm.step()
    return optimizer


def weights(layer):
    numbers = layer.per_connection(layer.stored.detach()).tolist()
    return dict(zip(layer.positions().tolist(), numbers, strict=True))


def set_weights(layer, numbers):
    slots = torch.arange(layer.nnz)
    layer.put(layer.stored.detach(), slots, torch.as_tensor(numbers, dtype=layer.stored.dtype))


def signs(algorithm, index=0):
    return algorithm.state_dict()["parts"]["drop"][str(index)].tolist()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_step_against_a_slow_one(kind):
    torch.manual_seed(0)
    layer = MAKE[kind]()
    algorithm = DeepR(temperature=lambda step: 0.01 * step, l1=0.2, seed=4)
    optimizer = start(layer, algorithm)
    optimizer.param_groups[0]["lr"] = 0.1
    before, sign = weights(layer), signs(algorithm)
    noise = np.random.default_rng([4, 0, 2, 11]).standard_normal(72, np.float32).astype(np.float64)
    std = np.sqrt(2 * 0.1 * 0.02)
    walked = {
        position: weight - 0.1 * 0.2 * s + std * z
        for (position, weight), s, z in zip(before.items(), sign, noise, strict=True)
    }
    expected_sign = dict(zip(before, sign, strict=True))
    expected = {p: w for p, w in walked.items() if w * expected_sign[p] >= 0}
    algorithm.step()
    after = weights(layer)
    assert_topology(layer, 72)
    assert 0 < len(expected) < 72
    assert algorithm.last_update[0].dropped == 72 - len(expected)
    for position, weight in expected.items():
        assert after[position] == pytest.approx(weight, rel=1e-12)
    new = after.keys() - expected.keys()
    assert len(new) == 72 - len(expected)
    assert not new & before.keys()
    assert {after[position] for position in new} == {0.0}
    after_sign = dict(zip(after, signs(algorithm), strict=True))
    assert {position: after_sign[position] for position in expected} == {
        position: expected_sign[position] for position in expected
    }
    assert {after_sign[position] for position in new} == {-1, 1}


def test_the_pull_is_towards_zero_and_ends_what_it_carries_across():
    layer = FakeSparse(10, 6, 0.9)
    set_weights(layer, [1.0, -1.0, 0.5, -0.5, 1.0, -1.0])
    optimizer = start(layer, algorithm := DeepR(temperature=0.0, l1=0.5), lr=1.0)
    positions = layer.positions().tolist()
    assert list(weights(layer).values()) == [0.5, -0.5, 0.0, 0.0, 0.5, -0.5]
    assert algorithm.last_update == (UpdateReport(nnz=6, skipped="there was nothing to drop or to grow"),)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    algorithm.step()
    assert algorithm.last_update[0].dropped == algorithm.last_update[0].grown == 2
    after = weights(layer)
    assert [after[positions[slot]] for slot in (0, 1, 4, 5)] == [0.25, -0.25, 0.25, -0.25]
    assert positions[2] not in after
    assert positions[3] not in after


def test_a_zero_weight_gets_a_random_sign():
    layer = FakeSparse(40, 40, 0.5)
    set_weights(layer, torch.zeros(800))
    start(layer, algorithm := DeepR(temperature=0.0, l1=0.0))
    assert 300 < signs(algorithm).count(1) < 500
    assert 0 not in signs(algorithm)
    assert algorithm.last_update == (UpdateReport(nnz=800, skipped="there was nothing to drop or to grow"),)


def test_draws_depend_on_seed_layer_and_step_only():
    def run(seed):
        layers = torch.nn.ModuleList([FakeSparse(20, 10, 0.5), FakeSparse(20, 10, 0.5)])
        start(layers, algorithm := DeepR(temperature=0.1, seed=seed))
        for _ in range(4):
            torch.rand(3)
            algorithm.step()
        return [weights(layer) for layer in layers]

    first, second = run(1)
    assert run(1) == [first, second]
    assert first != second
    assert run(2)[0] != first


@pytest.mark.parametrize("scope", ["layer", "network"])
@pytest.mark.parametrize("seed", range(10))
def test_counts_are_exact(scope, seed):
    layers = torch.nn.ModuleList([FakeSparse(20, 10, 0.3), FakeSparse(5, 8, 0.8), FakeSparse(9, 9, 0.02)])
    counts = [layer.nnz for layer in layers]
    start(layers, algorithm := DeepR(temperature=0.5, seed=seed, scope=scope))
    for _ in range(10):
        algorithm.step()
        now = [layer.nnz for layer in layers]
        assert sum(now) == sum(counts)
        assert now == counts or scope == "network"
        for layer, nnz in zip(layers, now, strict=True):
            assert_topology(layer, nnz)
            assert nnz >= 1
    assert (now == counts) == (scope == "layer")


def test_the_network_grows_where_it_is_empty():
    layers = torch.nn.ModuleList([FakeSparse(100, 100, 0.5), FakeSparse(100, 100, 0.9)])
    start(layers, algorithm := DeepR(temperature=0.0, l1=0.0, scope="network"))
    set_weights(layers[0], -layers[0].weight_values)
    algorithm.step()
    grown = [report.grown for report in algorithm.last_update]
    assert sum(grown) == algorithm.last_update[0].dropped == 4999
    assert layers[0].nnz == 1 + grown[0]
    # 5000 of 14000 empty positions are here: 1785 expected, with a standard deviation below 34.
    assert abs(grown[0] - 1785) < 170


def test_the_last_of_a_layer_stays_in_a_network_and_moves_in_a_layer():
    for scope, replaced in (("network", 0), ("layer", 1)):
        layers = torch.nn.ModuleList([FakeSparse(2, 5, 0.9), FakeSparse(10, 10, 0.5)])
        start(layers, algorithm := DeepR(temperature=0.0, l1=0.0, scope=scope))
        set_weights(layers[0], -layers[0].weight_values)
        algorithm.step()
        assert [report.dropped for report in algorithm.last_update] == [replaced, 0]


@pytest.mark.parametrize("scope", ["layer", "network"])
def test_where_little_is_empty_those_furthest_beyond_zero_go(scope):
    layer = FakeSparse(10, 10, 0.03)
    set_weights(layer, np.arange(1.0, 98.0))
    start(layer, algorithm := DeepR(temperature=0.0, l1=0.0, scope=scope))
    last = layer.positions()[-3:].tolist()
    set_weights(layer, -layer.weight_values)
    algorithm.step()
    assert algorithm.last_update == (UpdateReport(3, 3, 0, 97),)
    assert not set(last) & set(layer.positions().tolist())


def test_nan_ends_a_connection():
    layer = FakeSparse(10, 10, 0.5)
    start(layer, algorithm := DeepR(temperature=0.0))
    set_weights(layer, [torch.nan, *layer.weight_values.flatten().tolist()[1:]])
    algorithm.step()
    assert algorithm.last_update[0].dropped == 1
    assert bool(layer.weight_values.isfinite().all())


def test_the_walk_goes_on_between_updates():
    layer = FakeSparse(10, 10, 0.5)
    start(layer, algorithm := DeepR(temperature=0.0, l1=0.25, update_freq=3), lr=1.0)
    set_weights(layer, signs(algorithm))
    born = layer.positions().clone()
    algorithm.step()
    assert algorithm.steps_done == 2
    assert torch.equal(layer.weight_values.detach().abs(), torch.full((50,), 0.75))
    assert torch.equal(layer.positions(), born)
    set_weights(layer, -layer.weight_values)
    algorithm.step()
    assert algorithm.last_update[0].dropped == 50


def test_frozen_layers_do_not_walk():
    layer = FakeSparse(10, 10, 0.5)
    start(layer, algorithm := DeepR(temperature=1.0))
    layer.weight_values.requires_grad_(False)
    before = weights(layer)
    algorithm.step()
    assert algorithm.last_update == (UpdateReport(nnz=50, skipped="frozen"),)
    assert weights(layer) == before


def test_a_step_without_a_learning_rate_is_an_error():
    layers = torch.nn.ModuleList([FakeSparse(10, 10, 0.5), FakeSparse(10, 10, 0.5)])
    layers.apply(algorithm := DeepR(temperature=1.0))
    algorithm.track(optimizer := torch.optim.SGD(layers[0].parameters(), lr=0.1))
    before = weights(layers[0])
    with pytest.raises(RuntimeError, match=r"DeepR takes the learning rate .* is known for layer 1\. Call"):
        algorithm.step()
    assert weights(layers[0]) == before
    assert algorithm.steps_done == 0
    optimizer.add_param_group({"params": layers[1].parameters()})
    algorithm.step()
    assert weights(layers[0]) != before


def test_views_tell_of_the_optimizer_that_stepped_last():
    layer = FakeSparse(4, 4, 0.5)
    layer.apply(algorithm := DeepR())
    first, second = (torch.optim.SGD(layer.parameters(), lr=lr) for lr in (0.1, 0.2))
    for optimizer, expected in ((first, 0.1), (second, 0.2), (first, 0.1)):
        layer.weight_values.grad = torch.ones(8)
        optimizer.step()
        assert algorithm.views(1)[0].group["lr"] == expected
    assert LayerView(0, 1, 0, layer).group == {}


def test_misuse_is_named():
    for wrong, error, message in [
        (
            {"sparsity": LinearSchedule(0.5, 0.9, 10)},
            TypeError,
            "the number of connections is kept, got a LinearSchedule",
        ),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and not negative, got -1.0"),
        ({"temperature": "hot"}, TypeError, "got 'hot'"),
        ({"l1": -1e-5}, ValueError, "l1 must not be negative, got -1e-05"),
        ({"l1": None}, TypeError, "l1 must be a number, got None"),
        ({"scope": "row"}, ValueError, "scope must be one of"),
    ]:
        with pytest.raises(error, match=message):
            DeepR(**wrong)


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(deepr).attempted > 5
    assert doctest.testmod(deepr).failed == 0
