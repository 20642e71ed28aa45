"""The parts of the drop-grow loop: scopes, schedules, redistribution, grown values and states, hooks."""

import numpy as np
import pytest
import torch

from sparselab.dst import (
    SET,
    ByRemaining,
    DynamicSparsityAlgorithm,
    FanInUniform,
    Linear,
    Normal,
    Redistribution,
    RigL,
)
from sparselab.kernels.arrays import n_connections
from sparselab.nn import SparseLinear
from tests.dst.fake import FakeSparse
from tests.dst.harness import OPTIMIZERS, assert_topology, backward, build, by_position, sparse_layers, train


def network(*sparsities, size=20):
    layers = [FakeSparse(size, size, s, seed=i) for i, s in enumerate(sparsities)]
    return torch.nn.ModuleList(layers)


def test_the_network_drops_its_weakest_wherever_they_are():
    model = network(0.5, 0.5)
    with torch.no_grad():
        model[0].weight_values.mul_(1e-6)
    model.apply(algorithm := SET(drop_fraction=0.4, update=1, scope="network"))
    algorithm.step()
    weak, strong = algorithm.last_update
    assert (weak.dropped, weak.grown, weak.nnz) == (160, 160, 200)
    assert (strong.dropped, strong.grown, strong.nnz) == (0, 0, 200)


def test_the_network_leaves_each_layer_one_connection():
    model = network(0.5, 0.9)
    with torch.no_grad():
        model[1].weight_values.mul_(1e-6)
    model.apply(algorithm := DynamicSparsityAlgorithm(Linear(0.7, 0.99, 1), 0.0, update=1, scope="network"))
    algorithm.step()
    assert [layer.nnz for layer in model] == [7, 1]


@pytest.mark.parametrize("scope", ["layer", "network"])
def test_a_sparsity_schedule_is_followed_exactly(scope):
    model = network(0.2, 0.6)
    schedule = Linear(0.3, 0.95, 8)
    model.apply(algorithm := SET(schedule, drop_fraction=0.3, update=2, scope=scope))
    for step in range(1, 13):
        algorithm.step()
        if step % 2 == 0:
            if scope == "network":
                assert sum(layer.nnz for layer in model) == n_connections((1, 800), schedule(step))
            else:
                assert [layer.nnz for layer in model] == 2 * [n_connections((20, 20), schedule(step))]
            for layer, report in zip(model, algorithm.last_update, strict=True):
                assert_topology(layer, report.nnz)


def test_a_schedule_may_also_grow_a_layer():
    model = network(0.9)
    model.apply(algorithm := SET(Linear(0.9, 0.0, 2), update=1))
    algorithm.step()
    assert model[0].nnz == n_connections((20, 20), 0.45)
    algorithm.step()
    assert model[0].nnz == 400


class _ToTheLast(Redistribution):
    def weight(self, vacancy):
        return float(vacancy.view.index)


@pytest.mark.parametrize("scope", ["layer", "network"])
def test_redistribution_moves_connections_between_layers(scope):
    model = network(0.5, 0.5, 0.9)
    rule = _ToTheLast()
    model.apply(algorithm := SET(drop_fraction=0.3, update=1, scope=scope, redistribute=rule))
    algorithm.step()
    dropped = sum(report.dropped for report in algorithm.last_update)
    grown = [report.grown for report in algorithm.last_update]
    assert sum(layer.nnz for layer in model) == 440
    assert sum(grown) == dropped == 132
    assert grown == [0, 44, 88]


def test_what_does_not_fit_goes_to_the_others():
    model = network(0.5, 0.02)
    rule = _ToTheLast()
    model.apply(algorithm := SET(drop_fraction=0.3, update=1, redistribute=rule))
    algorithm.step()
    assert [layer.nnz for layer in model] == [192, 400]


def test_redistribution_by_what_remains():
    model = network(0.25, 0.75)
    model.apply(algorithm := SET(drop_fraction=0.2, update=1, redistribute=ByRemaining()))
    algorithm.step()
    assert [report.grown for report in algorithm.last_update] == [60, 20]


def test_gradients_have_candidates_for_whatever_a_layer_is_given():
    model = build("fake")
    algorithm = RigL(drop_fraction=0.5, update=1, redistribute=_ToTheLast())
    model.apply(algorithm)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    total = sum(layer.nnz for layer in sparse_layers(model))
    train(model, optimizer, algorithm, 1, 3)
    assert sum(layer.nnz for layer in sparse_layers(model)) == total
    assert (
        algorithm.last_update[1].grown == algorithm.last_update[0].dropped + algorithm.last_update[1].dropped
    )


@pytest.mark.parametrize("kind", ["fake", "real", "masked"])
@pytest.mark.parametrize("grown_value", [0.25, Normal(0.1), FanInUniform()], ids=["0.25", "normal", "fan-in"])
def test_grown_weights_start_as_asked(kind, grown_value):
    model = build(kind)
    layer = sparse_layers(model)[0]
    model.apply(algorithm := SET(update=1, grown_value=grown_value))
    old = dict(zip(layer.positions().tolist(), layer.per_connection(layer.stored).tolist(), strict=True))
    algorithm.step()
    new = dict(zip(layer.positions().tolist(), layer.per_connection(layer.stored).tolist(), strict=True))
    grown = [new[position] for position in new.keys() - old.keys()]
    assert len(grown) == algorithm.last_update[0].grown - algorithm.last_update[0].regrown > 5
    assert all(new[position] == old[position] for position in new.keys() & old.keys())
    if grown_value == 0.25:
        assert set(grown) == {0.25}
    else:
        assert 0 not in grown
        assert len(set(grown)) == len(grown)
        assert max(map(abs, grown)) < 1


def test_another_grown_value_is_another_setting():
    model = network(0.5)
    model.apply(algorithm := SET(grown_value=Normal(0.1)))
    state = algorithm.state_dict()
    for value, told in [(0.0, "None"), (0.1, r"Same\(weight=0.1\)"), (FanInUniform(), r"FanInUniform\(\)")]:
        network(0.5).apply(other := SET(grown_value=value))
        with pytest.raises(ValueError, match=rf"grown_value was 'Normal\(std=0.1\)' and is '{told}'"):
            other.load_state_dict(state)


def test_grown_state_may_start_at_the_mean_of_the_survivors():
    model = build("real")
    model.apply(algorithm := SET(update=2, grown_state="mean"))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, algorithm, 1, 1)
    optimizer.zero_grad()
    backward(model, 2)
    optimizer.step()
    layer = model[0]
    before = by_position(layer, optimizer)
    algorithm.step()
    after = by_position(layer, optimizer)
    for name in ("exp_avg", "exp_avg_sq"):
        kept = before[name].keys() & after[name].keys()
        mean = np.mean([before[name][position] for position in kept])
        grown = [after[name][position] for position in after[name].keys() - kept]
        assert np.allclose(grown, mean, rtol=1e-5)
        assert all(after[name][position] == before[name][position] for position in kept)


def test_hooks_run_after_updates_only_and_can_be_removed():
    model = network(0.5)
    model.apply(algorithm := SET(update=3))
    seen = []
    handle = algorithm.register_update_hook(lambda a: seen.append((a.steps_done, a.last_update[0].grown)))
    for _ in range(7):
        algorithm.step()
    handle.remove()
    for _ in range(3):
        algorithm.step()
    assert seen == [(3, 60), (6, 60)]


def test_attaching_with_an_optimizer_updates_by_itself():
    by_hand, by_itself = build("real"), build("real")
    optimizers = [OPTIMIZERS["adamw"](model.parameters()) for model in (by_hand, by_itself)]
    first, second = SET(update=1, seed=1), SET(update=1, seed=1)
    by_hand.apply(first)
    handle = second.attach(by_itself, optimizers[1])
    for step in range(1, 4):
        for model, optimizer in zip((by_hand, by_itself), optimizers, strict=True):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
        first.step()
    assert second.names == ("0", "2")
    assert second.steps_done == 3
    assert torch.equal(by_hand[0].positions(), by_itself[0].positions())
    assert torch.equal(by_hand[0].weight_values, by_itself[0].weight_values)
    handle.remove()
    optimizers[1].step()
    assert second.steps_done == 3


def test_misuse_of_the_parts_is_named():
    with pytest.raises(ValueError, match="scope must be one of"):
        SET(scope="galaxy")
    with pytest.raises(TypeError, match="grown_value must be a number or a function"):
        SET(grown_value="big")
    with pytest.raises(ValueError, match=r"grown_state must be one of .*, got 'old'"):
        SET(grown_state="old")
    with pytest.raises(ValueError, match="std must be positive"):
        Normal(0.0)
    with pytest.raises(ValueError, match=r"model must have sparse layers for SET to attach to, got a Linear"):
        SET().attach(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got int"):
        SET().attach(SparseLinear(8, 8), 3)
