"""Attaching, timing, the drop-grow loop and resuming, whichever algorithm it is."""

import gc
import tracemalloc

import numpy as np
import pytest
import torch

from sparselab.dst import (
    SET,
    ConstantSchedule,
    CosineSchedule,
    DynamicSparsityAlgorithm,
    Growth,
    RigL,
    Static,
    UpdateReport,
)
from sparselab.nn import SparseLinear
from tests.dst.fake import FakeSparse
from tests.dst.harness import OPTIMIZERS, assert_topology, backward, build, sparse_layers, train


def steps(algorithm, n):
    """Call step() n times; returns the steps that updated."""
    updated = []
    for step in range(algorithm.steps_done + 1, algorithm.steps_done + n + 1):
        algorithm.last_update = None
        algorithm.step()
        if algorithm.last_update is not None:
            updated.append(step)
    return updated


@pytest.mark.parametrize("algorithm", [Static(), SET(), RigL()], ids=lambda a: type(a).__name__)
def test_step_without_layers_teaches(algorithm):
    torch.nn.Linear(3, 3).apply(algorithm)
    assert algorithm.layers == ()
    with pytest.raises(RuntimeError, match=r"no sparse layer is attached. Call model.apply"):
        algorithm.step()


def test_every_sparse_layer_is_attached_once_and_in_order():
    model = build("fake")
    algorithm = SET()
    model.apply(algorithm)
    model.apply(algorithm)
    algorithm(model)
    assert list(map(id, algorithm.layers)) == list(map(id, sparse_layers(model)))


def test_a_layer_belongs_to_one_algorithm_while_that_lives():
    layer = FakeSparse(8, 8)
    owner = SET()
    layer.apply(owner)
    with pytest.raises(ValueError, match=r"shape \(8, 8\) already belongs to a SET algorithm"):
        layer.apply(RigL())
    del owner
    gc.collect()
    layer.apply(RigL())


def test_a_sparsity_that_is_not_the_layers_own_teaches():
    layer = FakeSparse(20, 10, 0.9)
    layer.apply(Static(0.9))
    with pytest.raises(ValueError, match=r"sparsity=0.8 means 40 connections .*\(10, 20\), but it has 20 "):
        layer.apply(Static(0.8))
    layer.apply(Static(None))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"update_freq": 10}, [10, 20, 30]),
        ({"update": {"freq": 10, "start": 10}}, [10, 20, 30]),
        ({"update": {"freq": 10, "start": 11}}, [20, 30]),
        ({"update": {"freq": 10, "stop": 30}}, [10, 20]),
        ({"update": {"freq": 10, "stop": 31}}, [10, 20, 30]),
        ({"update": {"freq": 1, "start": 4, "stop": 7}}, [4, 5, 6]),
        ({"update": {"freq": 10, "stop": 0}}, []),
    ],
)
def test_updates_fire_on_time(settings, expected):
    algorithm = SET(**settings)
    build("fake").apply(algorithm)
    assert steps(algorithm, 35) == expected
    assert [step for step in range(36) if algorithm.is_update_step(step)] == expected


def test_the_drop_fraction_follows_its_schedule():
    layer = FakeSparse(20, 20, 0.5)
    algorithm = SET(drop_fraction=CosineSchedule(0.4, 4), update_freq=1)
    layer.apply(algorithm)
    dropped = []
    for _ in range(6):
        algorithm.step()
        dropped.append(algorithm.last_update[0].dropped)
    assert dropped == [int(CosineSchedule(0.4, 4)(t) * 200) for t in range(1, 7)]
    assert dropped[-3:] == [0, 0, 0]


def test_reports_count_what_happened():
    layer = FakeSparse(10, 10, 0.5)
    algorithm = SET(drop_fraction=0.3, update_freq=1)
    layer.apply(algorithm)
    before = set(layer.positions().tolist())
    smallest = layer.positions()[layer.weight_values.abs().argsort()[:15]].tolist()
    algorithm.step()
    after = set(layer.positions().tolist())
    (report,) = algorithm.last_update
    assert (report.dropped, report.grown) == (15, 15)
    assert report.regrown == len(after & set(smallest))
    assert len(after - before) == report.grown - report.regrown
    assert before - set(smallest) <= after


def test_ties_drop_the_higher_positions():
    layer = FakeSparse(10, 10, 0.9)
    with torch.no_grad():
        layer.weight_values.zero_()
    kept = layer.positions()[:7].tolist()
    algorithm = SET(drop_fraction=0.3, update_freq=1)
    layer.apply(algorithm)
    algorithm.step()
    assert set(kept) <= set(layer.positions().tolist())
    assert layer.nnz == 10


def test_nan_weights_do_not_break_the_count():
    layer = FakeSparse(10, 10, 0.9)
    with torch.no_grad():
        layer.weight_values[[1, 4]] = torch.nan
    algorithm = SET(drop_fraction=0.2, update_freq=1)
    layer.apply(algorithm)
    rotten = set(layer.positions()[[1, 4]].tolist())
    algorithm.step()
    assert layer.nnz == 10
    assert not rotten & set(layer.positions().tolist()) or algorithm.last_update[0].regrown


@pytest.mark.parametrize("sparsity", [0.0, 1.0, 0.99], ids=["full", "empty", "one connection"])
def test_extreme_layers_keep_their_count(sparsity):
    layer = FakeSparse(10, 10, sparsity)
    nnz = layer.nnz
    algorithm = SET(drop_fraction=1.0, update_freq=1)
    layer.apply(algorithm)
    algorithm.step()
    assert layer.nnz == nnz
    assert algorithm.last_update[0].dropped == nnz


def test_a_frozen_layer_is_left_alone():
    model = build("fake")
    algorithm = SET(update_freq=1)
    model.apply(algorithm)
    model[0].weight_values.requires_grad_(False)
    born = model[0].positions().clone()
    algorithm.step()
    assert torch.equal(model[0].positions(), born)
    frozen, trained = algorithm.last_update
    assert frozen == UpdateReport(skipped="frozen", nnz=model[0].nnz)
    assert trained.dropped > 0


def test_state_that_cannot_move_is_refused_before_any_layer_changes():
    model = build("fake")
    algorithm = SET(update_freq=1)
    model.apply(algorithm)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    backward(model, 1)
    optimizer.step()
    optimizer.state[model[2].weight_values]["extra"] = torch.zeros(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="cannot follow its connections"):
        algorithm.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert algorithm.steps_done == 0


def test_a_tracked_optimizer_follows_without_having_stepped():
    layer = FakeSparse(10, 10, 0.5)
    algorithm = SET(update_freq=1)
    layer.apply(algorithm)
    optimizer = torch.optim.SGD([layer.weight_values], lr=0.1, momentum=0.9)
    optimizer.state[layer.weight_values]["momentum_buffer"] = torch.ones(50)
    algorithm.track(optimizer)
    algorithm.step()
    fresh = 50 - optimizer.state[layer.weight_values]["momentum_buffer"].sum()
    (report,) = algorithm.last_update
    assert fresh == report.grown - report.regrown > 0


class _Careless(Growth):
    def __init__(self, positions):
        self.positions = positions

    def choose(self, update):
        return self.positions


@pytest.mark.parametrize(
    ("positions", "error", "came"),
    [
        (np.empty(0, np.int64), ValueError, r"array of 15 positions, got shape \(0,\)"),
        (np.zeros(15), TypeError, "positions, which are integers, got float64"),
        (torch.arange(15), TypeError, "got Tensor"),
    ],
)
def test_a_growth_that_returns_something_else_is_stopped(positions, error, came):
    layer = FakeSparse(10, 10, 0.5)
    layer.apply(algorithm := DynamicSparsityAlgorithm(update_freq=1, grow=_Careless(positions)))
    with pytest.raises(error, match=rf"_Careless.choose must return a NumPy .*{came}"):
        algorithm.step()
    assert layer.nnz == 50


def test_set_draws_depend_on_seed_layer_and_step_only():
    def drawn(seed, n_updates):
        model = torch.nn.ModuleList([FakeSparse(10, 10, 0.5), FakeSparse(10, 10, 0.5)])
        model.apply(algorithm := SET(update_freq=1, seed=seed))
        torch.manual_seed(n_updates)
        np.random.seed(n_updates)  # noqa: NPY002
        for _ in range(n_updates):
            algorithm.step()
        return [layer.positions().tolist() for layer in model]

    first, second = drawn(0, 1)
    assert first != second
    assert drawn(0, 1) == [first, second]
    assert drawn(1, 1) != [first, second]
    assert drawn(0, 2) == drawn(0, 2) != drawn(0, 1)


def saved_state():
    algorithm = SET(update_freq=5, drop_fraction=CosineSchedule(0.3, 100))
    build("fake").apply(algorithm)
    steps(algorithm, 7)
    return algorithm.state_dict()


def test_load_restores_the_step():
    algorithm = SET(update_freq=5, drop_fraction=CosineSchedule(0.3, 100))
    build("fake").apply(algorithm)
    algorithm.load_state_dict(saved_state())
    assert algorithm.steps_done == 7
    assert steps(algorithm, 10) == [10, 15]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("step"), r"lacks \['step'\]"),
        (lambda s: s.update(algorithm="RigL"), "saved by RigL, but this is SET"),
        (lambda s: s["config"].update(update_freq=6), "update_freq was 6 and is 5"),
        (
            lambda s: s["config"].update(drop_fraction="ConstantSchedule(0.3)"),
            r"drop_fraction was 'ConstantSchedule\(0.3\)'",
        ),
        (lambda s: s["layers"].pop(), "saved for layers"),
        (lambda s: s["layers"][0].update(nnz=3), "saved for layers"),
        (lambda s: s.update(step=-1), r"state\['step'\] must be at least 0, got -1"),
    ],
)
def test_load_refuses_another_run(change, message):
    state = saved_state()
    change(state)
    algorithm = SET(update_freq=5, drop_fraction=CosineSchedule(0.3, 100))
    build("fake").apply(algorithm)
    with pytest.raises(ValueError, match=message):
        algorithm.load_state_dict(state)
    assert algorithm.steps_done == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SET(sparsity=1.5), ValueError, r"sparsity must lie in \[0, 1\].*got 1.5"),
        (lambda: SET(sparsity="high"), TypeError, "sparsity must be a number .*got 'high'"),
        (lambda: Static(sparsity=float("nan")), ValueError, "sparsity must be finite"),
        (lambda: SET(drop_fraction=1.1), ValueError, r"drop_fraction must lie in \[0, 1\], got 1.1"),
        (lambda: SET(drop_fraction=ConstantSchedule(-0.1)), ValueError, "drop_fraction must lie"),
        (lambda: SET(update_freq=0), ValueError, "freq.* must be at least 1, got 0"),
        (lambda: SET(update_freq=2.5), TypeError, "update_freq must be an integer, got 2.5"),
        (lambda: SET(update={"freq": 1, "start": -1}), ValueError, "start.*must be at least 0"),
        (lambda: SET(update={"freq": 1, "stop": True}), TypeError, "stop.*must be an integer, got True"),
        (lambda: SET(seed=-1), ValueError, "seed must be at least 0"),
        (lambda: RigL(grad_accumulation=0), ValueError, "grad_accumulation must be at least 1"),
    ],
)
def test_misuse_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_schedule_that_leaves_the_range_is_named_when_it_does():
    algorithm = SET(drop_fraction=lambda step: step / 2, update_freq=1)
    FakeSparse(10, 10).apply(algorithm)
    layer = FakeSparse(10, 10)
    layer.apply(algorithm)
    steps(algorithm, 2)
    with pytest.raises(ValueError, match=r"drop_fraction must lie in \[0, 1\], got 1.5 at step 3"):
        algorithm.step()


def test_static_counts_and_changes_nothing():
    model = build("fake")
    algorithm = Static(0.8)
    model.apply(algorithm)
    born = [layer.positions().clone() for layer in sparse_layers(model)]
    train(model, OPTIMIZERS["sgd"](model.parameters()), algorithm, 1, 5)
    assert algorithm.steps_done == 5
    assert all(torch.equal(a, layer.positions()) for a, layer in zip(born, sparse_layers(model), strict=True))


def test_a_layer_of_more_positions_than_32_bits_count():
    torch.manual_seed(0)
    size = 2**17
    layer = SparseLinear(size, size, bias=False, sparsity=1 - 2**-24)
    layer.apply(algorithm := SET(drop_fraction=0.5, update_freq=1))
    algorithm.step()  # compiles, which takes memory of its own
    tracemalloc.start()
    algorithm.step()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_topology(layer, 1024)
    assert layer.positions()[-1] > 2**33
    assert peak < 64 * size
