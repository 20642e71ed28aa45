"""DSR against a slow update, its threshold, and what happens where layers are nearly empty or nearly full."""

import doctest

import numpy as np
import pytest
import torch

from sparselab.dst import DSR, LinearSchedule, UpdateReport
from sparselab.dst.algorithms import dsr
from sparselab.nn import SparseLinear
from tests.dst.fake import FakeSparse
from tests.dst.harness import assert_topology

SHAPES = ((12, 30), (17, 12), (5, 17))
COUNTS = (90, 60, 20)


def network(kind, counts=COUNTS):
    layers = torch.nn.ModuleList()
    for seed, ((rows, columns), nnz) in enumerate(zip(SHAPES, counts, strict=True)):
        sparsity = 1 - nnz / (rows * columns)
        if kind == "fake":
            layers.append(FakeSparse(columns, rows, sparsity, seed=seed, dtype=torch.float64))
        else:
            torch.manual_seed(seed)
            layers.append(SparseLinear(columns, rows, sparsity=sparsity, dtype=torch.float64))
    assert [layer.nnz for layer in layers] == list(counts)
    return layers


def fill(layer, number):
    with torch.no_grad():
        layer.weight_values.fill_(number)


def slow_shares(total, weights, caps):
    """One after the other to whoever is furthest below its share: exact where no cap is reached."""
    exact = [total * weight / sum(weights) for weight in weights]
    assert all(share < cap for share, cap in zip(exact, caps, strict=True))
    counts = [int(share) for share in exact]
    while sum(counts) < total:
        counts[int(np.argmax([share - count for share, count in zip(exact, counts, strict=True)]))] += 1
    return counts


@pytest.mark.parametrize("kind", ["fake", "real"])
def test_one_update_against_a_slow_one(kind):
    layers = network(kind)
    layers.apply(algorithm := DSR(update_freq=1, threshold=0.1, n_prune=25))
    before = [
        dict(zip(w.positions().tolist(), w.weight_values.flatten().tolist(), strict=True)) for w in layers
    ]
    kept = [{p: w for p, w in layer.items() if abs(w) >= 0.1} for layer in before]
    pruned = [before[i].keys() - kept[i].keys() for i in range(3)]
    n_pruned = sum(map(len, pruned))
    assert n_pruned > 5
    grown = slow_shares(n_pruned, [len(layer) for layer in kept], [1000] * 3)
    algorithm.step()
    for i, layer in enumerate(layers):
        after = dict(zip(layer.positions().tolist(), layer.weight_values.flatten().tolist(), strict=True))
        assert kept[i].items() <= after.items()
        new = after.keys() - kept[i].keys()
        assert len(new) == grown[i]
        assert not new & before[i].keys(), "a connection that was just pruned grew back"
        assert {after[position] for position in new} <= {0.0}
    factor = 0.5 if n_pruned > 27.5 else 2.0 if n_pruned < 22.5 else 1.0
    assert algorithm.current_threshold == 0.1 * factor
    assert [report.dropped for report in algorithm.last_update] == list(map(len, pruned))


@pytest.mark.parametrize(
    ("n_below", "expected"), [(0, 2.0), (89, 2.0), (90, 1.0), (100, 1.0), (110, 1.0), (111, 0.5), (150, 0.5)]
)
@pytest.mark.parametrize("n_prune", [100, 100 / 400])
def test_the_threshold_doubles_and_halves(n_below, expected, n_prune):
    layer = FakeSparse(40, 20, 0.5)
    fill(layer, 5.0)
    with torch.no_grad():
        layer.weight_values[:n_below] = -0.5
    layer.apply(algorithm := DSR(update_freq=1, threshold=1.0, n_prune=n_prune))
    algorithm.step()
    assert algorithm.last_update[0].dropped == n_below
    assert algorithm.current_threshold == expected


def test_the_threshold_never_gets_stuck():
    layer = FakeSparse(8, 8, 0.5)
    layer.apply(algorithm := DSR(update_freq=1, n_prune=10))
    for number, far in ((0.0, 1e-30), (1e35, 1e30)):
        for _ in range(2500):
            fill(layer, number)
            algorithm.step()
        assert algorithm.current_threshold == far


@pytest.mark.parametrize("kind", ["fake", "real"])
def test_every_layer_keeps_its_best(kind):
    layers = network(kind)
    fill(layers[2], 1e-9)
    with torch.no_grad():
        layers[2].weight_values[7] = -2e-9
        layers[2].weight_values[3] = torch.nan
    best = layers[2].positions()[7].item()
    layers.apply(algorithm := DSR(update_freq=1))
    algorithm.step()
    assert algorithm.last_update[2].dropped == 19
    assert best in layers[2].positions()
    assert sum(layer.nnz for layer in layers) == sum(COUNTS)


def test_what_a_full_layer_cannot_take_goes_to_the_others():
    layers = network("fake", (358, 60, 20))
    with torch.no_grad():
        layers[1].weight_values[:30] = 0
    layers.apply(algorithm := DSR(update_freq=1, threshold=1e-12))
    algorithm.step()
    assert layers[0].nnz == 360
    assert sum(layer.nnz for layer in layers) == 438


def test_no_more_are_dropped_than_there_are_empty_positions():
    layers = network("fake", (350, 200, 83))
    with torch.no_grad():
        for layer in layers:
            layer.weight_values.copy_(torch.linspace(1, 2, layer.nnz))
        layers[1].weight_values[50:60] = 1e-9
        layers[0].weight_values[50:60] = 1e-8
    lost = set(layers[1].positions()[50:60].tolist())
    layers.apply(algorithm := DSR(update_freq=1, threshold=5.0))
    algorithm.step()
    assert [report.dropped for report in algorithm.last_update] == [6, 10, 0]
    assert [layer.nnz for layer in layers] == [354, 194, 85]
    assert not lost & set(layers[1].positions().tolist())


def test_a_dense_network_stays():
    layers = network("fake", (360, 204, 85))
    layers.apply(algorithm := DSR(update_freq=1, threshold=100.0))
    algorithm.step()
    assert [(r.dropped, r.grown, r.nnz) for r in algorithm.last_update] == [(0, 0, n) for n in (360, 204, 85)]


@pytest.mark.parametrize("seed", range(20))
def test_random_growth_is_exact(seed):
    layers = network("fake", (200, 60, 40))
    layers.apply(algorithm := DSR(update_freq=1, threshold=0.3, seed=seed))
    for _ in range(3):
        algorithm.step()
        for layer, report in zip(layers, algorithm.last_update, strict=True):
            assert_topology(layer, report.nnz)
        assert sum(layer.nnz for layer in layers) == 300


def test_frozen_layers_neither_give_nor_take():
    layers = network("fake")
    layers[0].weight_values.requires_grad_(False)
    layers.apply(algorithm := DSR(update_freq=1, threshold=0.3))
    algorithm.step()
    assert algorithm.last_update[0] == UpdateReport(nnz=90, skipped="frozen")
    assert layers[1].nnz + layers[2].nnz == 80
    layers.requires_grad_(False)
    algorithm.step()
    assert [report.skipped for report in algorithm.last_update] == ["frozen"] * 3


def test_the_threshold_is_resumed():
    layers = network("fake")
    layers.apply(algorithm := DSR(update_freq=1, threshold=0.5))
    algorithm.step()
    again = network("fake", tuple(layer.nnz for layer in layers))
    again.apply(resumed := DSR(update_freq=1, threshold=0.5))
    resumed.load_state_dict(algorithm.state_dict())
    assert resumed.current_threshold == algorithm.current_threshold != 0.5
    state = algorithm.state_dict()
    state["parts"]["selection"]["threshold"] = "high"
    with pytest.raises(TypeError, match="the saved threshold must be a number, got 'high'"):
        resumed.load_state_dict(state)


def test_misuse_is_named():
    for wrong, error, message in [
        (
            {"sparsity": LinearSchedule(0.5, 0.9, 10)},
            TypeError,
            "the number of connections is kept, got a LinearSchedule",
        ),
        ({"n_prune": 0}, ValueError, "n_prune must be at least 1, got 0"),
        ({"n_prune": 1.0}, ValueError, r"n_prune must be a whole number, or a fraction in \(0, 1\), got 1.0"),
        ({"n_prune": True}, TypeError, "n_prune must be an integer, got True"),
        ({"n_prune": "all"}, TypeError, "n_prune must be a number of connections"),
        ({"threshold": 0.0}, ValueError, "threshold must be positive"),
        ({"tolerance": 1.0}, ValueError, r"tolerance must lie in \[0, 1\), got 1.0"),
    ]:
        with pytest.raises(error, match=message):
            DSR(**wrong)


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(dsr).attempted > 5
    assert doctest.testmod(dsr).failed == 0
