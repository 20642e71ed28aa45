"""SNFS against a slow update, the shares of layers, the averages of the gradient, and their memory."""

import contextlib
import copy
import doctest
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from sparselab.dst import (
    SET,
    SNFS,
    ByMagnitude,
    ByMomentum,
    ByRemaining,
    LinearSchedule,
    MomentumGrowth,
    RigL,
)
from sparselab.dst.algorithms import snfs
from sparselab.kernels.arrays import n_connections
from sparselab.nn import SparseLinear
from tests.dst.fake import FakeSparse
from tests.dst.harness import assert_topology

SHAPES = ((12, 30), (17, 23), (5, 17))
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
}


def network(kind, sparsities=(0.8, 0.85, 0.7)):
    layers = torch.nn.ModuleList()
    for seed, ((rows, columns), sparsity) in enumerate(zip(SHAPES, sparsities, strict=False)):
        if kind == "fake":
            layers.append(FakeSparse(columns, rows, sparsity, seed=seed, dtype=torch.float64))
        else:
            torch.manual_seed(seed)
            layers.append(SparseLinear(columns, rows, sparsity=sparsity, dtype=torch.float64))
    return layers


def operands(layer, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = layer.shape
    x = torch.randn(6, columns, generator=generator, dtype=torch.float64)
    return x, scale * torch.randn(6, rows, generator=generator, dtype=torch.float64)


def train_step(layers, optimizer, step, scales=(1.0, 1.5, 1.2)):
    """Backward and optimizer step; returns the dense gradient of each layer."""
    optimizer.zero_grad()
    dense = []
    for index, (layer, scale) in enumerate(zip(layers, scales, strict=False)):
        x, dy = operands(layer, 10 * step + index, scale)
        (layer(x) * dy).sum().backward()
        dense.append((dy.T @ x).numpy())
    optimizer.step()
    return dense


def live_momentum(optimizer, layer):
    kept = optimizer.state[layer.weight_values].items()
    state = {name: entry.numpy() for name, entry in kept if isinstance(entry, torch.Tensor)}
    if "momentum_buffer" in state:
        return state["momentum_buffer"]
    return state["exp_avg"] / (np.sqrt(state["exp_avg_sq"]) + 1e-8)


def shares(total, weights):
    """By the largest remainder, where no cap is reached."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_rest[: total - sum(counts)]:
        counts[i] += 1
    return counts


def slow_update(layers, momenta, dense, fraction):
    """Positions of each layer after an update, by sorting everything."""
    kept, n_dropped = [], 0
    for layer in layers:
        positions, weights = layer.positions().tolist(), layer.weight_values.flatten().tolist()
        order = sorted(range(len(positions)), key=lambda slot: (-abs(weights[slot]), slot))
        k = math.ceil(fraction * len(positions))
        n_dropped += k
        kept.append({positions[slot] for slot in order[: len(order) - k]})
    counts = shares(n_dropped, [np.abs(momentum).mean() for momentum in momenta])
    after = []
    for layer_kept, scores, count in zip(kept, dense, counts, strict=True):
        flat = np.abs(scores).ravel()
        free = [p for p in range(flat.size) if p not in layer_kept]
        assert count < len(free)
        after.append(sorted(layer_kept | set(sorted(free, key=lambda p: (-flat[p], p))[:count])))
    return after


def test_the_shares_by_hand():
    assert shares(10, [1, 1, 2]) == [3, 2, 5]
    assert shares(7, [1, 3]) == [2, 5]


@pytest.mark.parametrize("kind", ["fake", "real"])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("averaged", [0, 1, 3])
def test_updates_against_slow_ones(kind, optimizer_name, averaged):
    layers = network(kind)
    budget = sum(rows * columns * 8 for rows, columns in SHAPES[:averaged])
    algorithm = SNFS(drop_fraction=0.3, update_freq=3, momentum_bytes=budget, momentum=0.8)
    optimizer = OPTIMIZERS[optimizer_name](layers.parameters())
    algorithm.attach(layers)
    total = sum(layer.nnz for layer in layers)
    counts = [layer.nnz for layer in layers]
    average = [np.zeros(shape) for shape in SHAPES]
    for step in range(1, 8):
        gradient = train_step(layers, optimizer, step)
        average = [0.8 * old + new for old, new in zip(average, gradient, strict=True)]
        expected = [layer.positions().tolist() for layer in layers]
        if step % 3 == 0:
            dense = average[:averaged] + gradient[averaged:]
            momenta = [live_momentum(optimizer, layer) for layer in layers]
            expected = slow_update(layers, momenta, dense, 0.3)
        algorithm.step()
        assert [layer.positions().tolist() for layer in layers] == expected
        assert sum(layer.nnz for layer in layers) == total
    assert [layer.nnz for layer in layers] != counts


def test_averages_and_gradients_grow_differently():
    after = []
    for budget in (0, 1 << 20):
        layers = network("fake")
        optimizer = OPTIMIZERS["sgd"](layers.parameters())
        layers.apply(algorithm := SNFS(update_freq=4, momentum_bytes=budget))
        for step in range(1, 5):
            train_step(layers, optimizer, step)
            algorithm.step()
        after.append(layers[0].positions().tolist())
    assert after[0] != after[1]


def test_micro_batches_and_parts_of_a_network_add_up():
    x, dy = operands(FakeSparse(30, 12), 0)
    found = []
    for cuts in ([0, 6], [0, 2, 5, 6]):
        layer = FakeSparse(30, 12, 0.8, dtype=torch.float64)
        layer.apply(algorithm := SNFS(update_freq=9, momentum=0.5))
        for _ in range(2):
            for begin, end in pairwise(cuts):
                (layer(x[begin:end]) * dy[begin:end]).sum().backward()
            algorithm.step()
        found.append(algorithm.grow.state_dict()["0"])
    assert torch.allclose(found[0], 1.5 * dy.T @ x, rtol=1e-12)
    assert torch.allclose(found[0], found[1], rtol=1e-12)


def test_gradients_that_are_not_finite_are_left_out():
    layers = network("fake", (0.8,))
    layer = layers[0]
    layers.apply(algorithm := SNFS(update_freq=1, redistribute=None))
    x, dy = operands(layer, 0)
    for bad, words in ((torch.nan, None), (torch.inf, "no layer at its last two updates: no gradient")):
        (layer(x) * dy.index_fill(0, torch.tensor([1]), bad)).sum().backward()
        with pytest.warns(UserWarning, match=words) if words else contextlib.nullcontext():
            algorithm.step()
        assert algorithm.last_update[0].skipped == "no gradient"
    (layer(x) * dy).sum().backward()
    algorithm.step()
    assert algorithm.last_update[0].grown > 0
    assert torch.equal(algorithm.grow.state_dict()["0"], dy.T @ x)


def test_the_budget_goes_to_the_layers_that_fit_in_the_order_of_attachment():
    layers = network("fake")
    sizes = [rows * columns * 8 for rows, columns in SHAPES]
    for budget, expected in [(sum(sizes), "012"), (sum(sizes) - 1, "01"), (sizes[2], "2"), (0, "")]:
        copied = copy.deepcopy(layers)
        copied.apply(algorithm := SNFS(update_freq=9, momentum_bytes=budget))
        assert algorithm.grow.state_dict() == {}
        train_step(copied, OPTIMIZERS["sgd"](copied.parameters()), 1)
        assert sorted(algorithm.grow.state_dict()) == list(expected)


def test_low_precision_is_averaged_in_float32():
    layer = SparseLinear(30, 12, sparsity=0.8).bfloat16()
    growth = MomentumGrowth()
    growth.prepare([layer], None)
    x, dy = (t.bfloat16() for t in operands(layer, 0))
    layer(x).backward(dy)
    growth.prepare([layer], None)
    assert growth.state_dict()["0"].dtype == torch.float32
    assert torch.allclose(growth.state_dict()["0"], dy.float().T @ x.float())


def test_averages_are_resumed_and_must_fit():
    layers = network("fake")
    optimizer = OPTIMIZERS["sgd"](layers.parameters())
    layers.apply(algorithm := SNFS(update_freq=9))
    train_step(layers, optimizer, 1)
    algorithm.step()
    state = algorithm.state_dict()
    again = network("fake")
    again.apply(resumed := SNFS(update_freq=9))
    resumed.load_state_dict(state)
    for name, entries in algorithm.grow.state_dict().items():
        assert torch.equal(resumed.grow.state_dict()[name], entries)
    train_step(layers, optimizer, 2)
    assert torch.equal(resumed.grow.state_dict()["1"], state["parts"]["grow"]["1"])
    state["parts"]["grow"]["1"] = torch.zeros(2, 2)
    state["step"] = 5
    with pytest.raises(ValueError, match=r"averages must be of layers .*'1': \(17, 23\).*'1': \(2, 2\)"):
        resumed.load_state_dict(state)
    assert resumed.steps_done == 1


def set_momentum(layers, optimizer, numbers):
    for layer, number in zip(layers, numbers, strict=True):
        optimizer.state[layer.weight_values]["momentum_buffer"] = torch.full_like(layer.weight_values, number)


@pytest.mark.parametrize(
    ("momenta", "dropped"),
    [((3.0, 1.0), 18), ((1.0, 3.0), 100), ((-3.0, 1.0), 18)],
    ids=["growing", "not growing", "by magnitude"],
)
def test_a_layer_that_grows_dense_drops_no_more_than_it_lacks(momenta, dropped):
    layers = torch.nn.ModuleList([FakeSparse(20, 10, 0.1, seed=0), FakeSparse(20, 20, 0.8, seed=1)])
    counts = [180, 80]
    optimizer = OPTIMIZERS["sgd"](layers.parameters())
    layers.apply(algorithm := SNFS(drop_fraction=100 / 180, update_freq=1, redistribute=ByMomentum()))
    algorithm.track(optimizer)
    _one_gradient(layers)
    set_momentum(layers, optimizer, momenta)
    algorithm.step()
    first, second = algorithm.last_update
    assert first.dropped == dropped
    assert second.dropped == math.ceil(100 / 180 * 80)
    assert first.nnz + second.nnz == sum(counts)


def _one_gradient(layers):
    for layer in layers:
        x, dy = operands(layer, 0)
        (layer(x.float()) * dy.float()).sum().backward()


def test_what_a_full_layer_cannot_take_goes_to_the_others():
    layers = torch.nn.ModuleList([FakeSparse(20, 10, 0.3, seed=i) for i in range(3)])
    optimizer = OPTIMIZERS["sgd"](layers.parameters())
    layers.apply(algorithm := SNFS(drop_fraction=0.5, update_freq=1))
    algorithm.track(optimizer)
    _one_gradient(layers)
    set_momentum(layers, optimizer, (1e6, 2.0, 1.0))
    algorithm.step()
    # 210 to give: 130 to the first, then it is full; the other 80 two to one.
    assert [report.grown for report in algorithm.last_update] == [130, 53, 27]


def test_every_layer_keeps_one_connection():
    layers = torch.nn.ModuleList([FakeSparse(5, 2, 0.9), FakeSparse(20, 20, 0.9)])
    optimizer = OPTIMIZERS["sgd"](layers.parameters())
    layers.apply(algorithm := SNFS(drop_fraction=1.0, update_freq=1))
    algorithm.track(optimizer)
    _one_gradient(layers)
    set_momentum(layers, optimizer, (0.0, 1.0))
    algorithm.step()
    assert [layer.nnz for layer in layers] == [1, 40]
    assert [report.dropped for report in algorithm.last_update] == [0, 39]


def test_a_sparsity_schedule_is_followed_by_the_total():
    layers = network("fake", (0.1, 0.2, 0.15))
    size = [rows * columns for rows, columns in SHAPES]
    optimizer = OPTIMIZERS["sgd"](layers.parameters())
    schedule = LinearSchedule(0.1, 0.8, 6)
    layers.apply(algorithm := SNFS(schedule, drop_fraction=0.4, update_freq=1))
    for step in range(1, 9):
        now = [layer.nnz for layer in layers]
        train_step(layers, optimizer, step)
        algorithm.step()
        target = sum(n_connections((1, n), schedule(step)) for n in size)
        assert sum(layer.nnz for layer in layers) == target, now
        for layer, report in zip(layers, algorithm.last_update, strict=True):
            assert_topology(layer, report.nnz)


@pytest.mark.parametrize("algorithm_type", [SET, RigL])
@pytest.mark.parametrize("rule", [ByMomentum, ByMagnitude, ByRemaining])
def test_the_rules_serve_any_algorithm(algorithm_type, rule):
    layers = network("fake")
    optimizer = OPTIMIZERS["adam"](layers.parameters())
    total = sum(layer.nnz for layer in layers)
    layers.apply(algorithm := algorithm_type(drop_fraction=0.3, update_freq=1, redistribute=rule()))
    train_step(layers, optimizer, 1)
    n_dropped = sum(int(0.3 * layer.nnz) for layer in layers)
    weight = {
        ByMomentum: lambda layer: np.abs(live_momentum(optimizer, layer)).mean(),
        ByMagnitude: lambda layer: layer.weight_values.detach().abs().mean().item(),
        ByRemaining: lambda layer: layer.nnz - int(0.3 * layer.nnz),
    }[rule]
    expected = shares(n_dropped, [weight(layer) for layer in layers])
    algorithm.step()
    assert [report.grown for report in algorithm.last_update] == expected
    assert sum(layer.nnz for layer in layers) == total


def test_an_optimizer_without_momentum_is_an_error_before_anything_changes():
    layers = network("fake")
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    layers.apply(algorithm := SNFS(update_freq=1))
    train_step(layers, optimizer, 1)
    born = [layer.positions().clone() for layer in layers]
    with pytest.raises(RuntimeError, match=r"momentum=0\.9.*redistribute=ByMagnitude\(\)"):
        algorithm.step()
    assert all(torch.equal(layer.positions(), old) for layer, old in zip(layers, born, strict=True))
    assert algorithm.steps_done == 0


def test_a_layer_without_a_usable_momentum_is_skipped():
    layers = network("fake")
    optimizer = OPTIMIZERS["sgd"](layers[1:].parameters())
    layers.apply(algorithm := SNFS(update_freq=1))
    train_step(layers, optimizer, 1)
    optimizer.state[layers[2].weight_values]["momentum_buffer"][3] = torch.nan
    algorithm.step()
    reasons = [report.skipped for report in algorithm.last_update]
    assert reasons == ["no momentum", "", "momentum is not finite"]
    layers.requires_grad_(False)
    algorithm.step()
    assert [report.skipped for report in algorithm.last_update] == ["frozen"] * 3


def test_weights_that_are_not_finite_skip_their_layer():
    layers = network("fake")
    layers.apply(algorithm := SET(update_freq=1, redistribute=ByMagnitude()))
    with torch.no_grad():
        layers[1].weight_values[0] = torch.inf
    algorithm.step()
    assert [report.skipped for report in algorithm.last_update] == ["", "weights are not finite", ""]


def test_no_momentum_is_needed_without_redistribution():
    layers = network("fake")
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    layers.apply(algorithm := SNFS(update_freq=1, redistribute=None))
    counts = [layer.nnz for layer in layers]
    train_step(layers, optimizer, 1)
    algorithm.step()
    assert [layer.nnz for layer in layers] == counts
    assert [report.grown for report in algorithm.last_update] == [math.ceil(0.5 * n) for n in counts]


def test_misuse_is_named():
    for wrong, error, message in [
        ({"momentum_bytes": -1}, ValueError, "momentum_bytes must be at least 0, got -1"),
        ({"momentum_bytes": 0.5}, TypeError, "momentum_bytes must be an integer, got 0.5"),
        ({"momentum": 1.0}, ValueError, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"grad_accumulation": 0}, ValueError, "grad_accumulation must be at least 1"),
    ]:
        with pytest.raises(error, match=message):
            SNFS(**wrong)


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(snfs).attempted > 5
    assert doctest.testmod(snfs).failed == 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_what_was_cleared_before_the_step_is_no_part_of_the_average(set_to_none):
    """As the generator's pass of a GAN, or a step that was skipped."""
    torch.manual_seed(0)
    layer = SparseLinear(30, 12, sparsity=0.8, dtype=torch.float64)
    layer.apply(algorithm := SNFS(update_freq=9, momentum=0.5))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    expected = torch.zeros(12, 30, dtype=torch.float64)
    for step in range(4):
        layer(torch.randn(5, 30, dtype=torch.float64)).square().sum().backward()
        optimizer.zero_grad(set_to_none)
        total = 0
        for _ in range(1 + step % 2):
            x, dy = torch.randn(5, 30, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
            layer(x).backward(dy)
            total = total + dy.T @ x
        expected = 0.5 * expected + total
        optimizer.step()
        layer(x).sum().backward()
        algorithm.step()
        optimizer.zero_grad(set_to_none)
    (average,) = algorithm.grow.state_dict().values()
    torch.testing.assert_close(average, expected)
