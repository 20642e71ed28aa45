"""What would go wrong silently: each an error or a warning at once, which names the way out."""

import copy
import gc
import re

import numpy as np
import pytest
import torch
from torch import nn

from sparselab.dst import (
    SET,
    ByWeight,
    DropScore,
    DynamicSparsityAlgorithm,
    Group,
    Redistribution,
    RigL,
    Static,
)
from sparselab.nn import SparseLinear, sparsify
from tests.dst.contract_rows import ROWS
from tests.dst.fake import FakeSparse
from tests.dst.harness import OPTIMIZERS, assert_same_state, backward, build, sparse_layers, train
from tests.test_resume import assert_same


def topologies(model):
    return [layer.positions().tolist() for layer in sparse_layers(model)]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_an_algorithm_of_another_model_is_refused_and_reset_begins_anew():
    """The folds of a cross-validation, with one algorithm for all of them."""
    algorithm = RigL(sparsity=0.8, update_freq=2, stop=6)
    runs = []
    for fold in range(2):
        model = build("real")
        if fold:
            with pytest.raises(
                RuntimeError, match=r"without \['layer 0', 'layer 1'\]: this RigL belongs to another .*reset"
            ):
                algorithm.attach(model)
            with pytest.raises(
                RuntimeError, match=r"before the first step, got it after 8 steps .*reset\(\)"
            ):
                model.apply(algorithm)
            assert algorithm.layers == tuple(sparse_layers(runs[0][0]))
            algorithm.reset()
            assert (algorithm.layers, algorithm.steps_done, algorithm.last_update) == ((), 0, None)
        born = topologies(model)
        model.apply(algorithm)
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        train(model, optimizer, algorithm, 1, 8)
        assert topologies(model) != born
        runs.append((model, optimizer))
    assert_same_state(*runs[0], *runs[1])


@pytest.mark.parametrize("name", ROWS)
def test_reset_forgets_everything(name):
    """A second run of an algorithm that was reset is the first run of a new one."""
    row = ROWS[name]
    used, runs = row.make(), []
    for algorithm in (used, used, row.make()):
        algorithm.reset()
        model = row.prepare(build("real", sparsity=row.start))
        model.apply(algorithm)
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        train(model, optimizer, algorithm, 1, 16)
        parts = (model, optimizer, algorithm)
        runs.append(copy.deepcopy([part.state_dict() for part in parts]))
    assert_same(runs[0], runs[2])
    assert_same(runs[1], runs[2])


@pytest.mark.parametrize("name", ROWS)
def test_detach_gives_every_layer_back(name):
    row = ROWS[name]
    model = row.prepare(build("real", sparsity=row.start))
    algorithm = row.make()
    optimizer = sgd(model)
    handle = algorithm.attach(model, optimizer)
    backward(model, 1)
    optimizer.step()
    algorithm.detach()
    algorithm.detach()
    assert algorithm.layers == algorithm.names == ()
    for layer in sparse_layers(model):
        assert layer.gradient_hook is None
        assert layer.forward_mask is None
    optimizer.step()
    assert algorithm.steps_done == 1
    handle.remove()
    Static().attach(model)
    with pytest.raises(RuntimeError, match="no sparse layer is attached"):
        algorithm.step()


def test_after_the_handle_is_removed_layers_stay_and_steps_are_by_hand():
    model = build("real")
    optimizer = sgd(model)
    handle = (algorithm := SET(update_freq=1)).attach(model, optimizer)
    handle.remove()
    handle.remove()
    optimizer.step()
    assert algorithm.steps_done == 0
    assert len(algorithm.layers) == 2
    algorithm.step()
    assert algorithm.steps_done == 1
    algorithm.attach(model, optimizer)
    optimizer.step()
    assert algorithm.steps_done == 2


@pytest.mark.parametrize("make", [SET, Static, lambda: Group({"*": SET()})], ids=["one", "static", "group"])
def test_steps_are_not_counted_twice(make):
    model = build("real")
    optimizer = sgd(model)
    (algorithm := make()).attach(model, optimizer)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"attached with an optimizer: it steps by itself.*remove\(\)"):
        algorithm.step()
    with pytest.raises(
        RuntimeError, match=r"must step along with one optimizer, got another; call remove\(\)"
    ):
        algorithm.attach(model, optimizer)
    each = next(iter(algorithm)) if isinstance(algorithm, Group) else algorithm
    assert each.steps_done == 1


@pytest.mark.parametrize("make", [RigL, lambda: Group({"*": SET()})], ids=["one", "group"])
def test_an_optimizer_made_before_sparsify_is_refused(make):
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    optimizer = sgd(model)
    model = sparsify(model, {"*": 0.8})
    algorithm = make()
    with pytest.raises(ValueError, match=r"optimizer must hold the weights .* without those of \['0', '2'\]"):
        algorithm.attach(model, optimizer)
    assert algorithm.layers == ()
    model.apply(Static())  # nothing was attached


def test_an_optimizer_of_some_layers_is_refused_unless_the_others_are_frozen():
    model = build("real")
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"without those of \['2'\]"):
        SET().attach(model, optimizer)
    model[2].requires_grad_(False)
    (algorithm := SET(update_freq=1)).attach(model, optimizer)
    optimizer.step()
    assert [report.skipped for report in algorithm.last_update] == ["", "frozen"]


def test_an_optimizer_inside_another_is_found():
    """As accelerate wraps them: an optimizer by type, whose hooks nobody calls."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            self.optimizer.step()

    model = build("real")
    wrapper = Wrapper(sgd(model))
    (algorithm := SET()).attach(model, wrapper)
    wrapper.step()
    assert algorithm.steps_done == 1


def test_training_a_copy_does_not_rewire_the_original():
    model = build("real")
    model.apply(algorithm := SET(update_freq=1))
    twin = copy.deepcopy(model)
    born = topologies(model)
    optimizer = sgd(twin)
    backward(twin, 1)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"SET.step\(\) must follow .* got only SGD with other .*copy"):
        algorithm.step()
    assert topologies(model) == topologies(twin) == born
    assert algorithm.steps_done == 0
    twin.apply(SET())


def test_training_a_copy_of_a_trained_model_is_warned_of():
    model = build("real")
    model.apply(algorithm := SET())
    train(model, ours := sgd(model), algorithm, 1, 2)
    twin = copy.deepcopy(model)
    other = sgd(twin)
    backward(twin, 3)
    other.step()
    with pytest.warns(UserWarning, match=r"SET.step\(\) must follow a step of the optimizer that trains"):
        algorithm.step()
    # Several optimizers in one loop are no mistake, whichever order they step in.
    for optimizers in ((ours, other), (other, ours)):
        for optimizer in optimizers:
            optimizer.step()
        algorithm.step()


def test_an_optimizer_that_torch_does_not_report_may_be_named():
    model = build("fake")
    model.apply(algorithm := SET(update_freq=1))

    class Plain:
        param_groups = ({"params": [layer.weight_values for layer in sparse_layers(model)]},)
        state = {}  # noqa: RUF012

    algorithm.track(named := Plain())
    sgd(nn.Linear(2, 2)).step()
    algorithm.step()
    assert algorithm.last_update[0].grown > 0
    del named


class _Returns(DropScore):
    def __init__(self, scores):
        self.scores = scores

    def __call__(self, view):
        return self.scores(view.weights)


@pytest.mark.parametrize(
    ("scores", "error", "came"),
    [
        (lambda w: w.abs()[:-1].numpy(), ValueError, r"one for each connection, got shape (49,)"),
        (lambda w: w.abs(), TypeError, "got a Tensor; convert it with .numpy()"),
        (lambda w: w.abs().numpy()[:, None], ValueError, "got shape (50, 1)"),
        (lambda w: w.int().numpy(), TypeError, "got dtype int32"),
        (lambda w: w.tolist(), TypeError, "got a list"),
    ],
)
def test_a_score_of_another_kind_is_named(scores, error, came):
    layer = FakeSparse(10, 10, 0.5)
    layer.apply(algorithm := SET(update_freq=1, drop=_Returns(scores)))
    expected = "_Returns must return a NumPy array of floats of shape (50,)"
    with pytest.raises(error, match=f"{re.escape(expected)}.*{re.escape(came)}"):
        algorithm.step()
    assert layer.nnz == 50


class _Shares(Redistribution):
    def __init__(self, result):
        self.result = result

    def shares(self, updates, n_grow, caps):
        return self.result


class _Weight(ByWeight):
    def __init__(self, result):
        self.result = result

    def weight(self, update):
        return self.result


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (_Shares([30]), TypeError, r"_Shares.shares must return an integer for each of 2 layers, got \[30\]"),
        (_Shares([15.0, 15.0]), TypeError, "an integer for each of 2 layers"),
        (_Shares([30, 30]), ValueError, r"must return 30 connections in all.*got \[30, 30\]"),
        (_Shares([31, -1]), ValueError, r"30 connections in all, and at most \[65, 65\] for each"),
        (
            _Weight(-1.0),
            ValueError,
            r"_Weight.weight must return a finite number.*got -1.0 for layer number 0",
        ),
        (_Weight(float("nan")), ValueError, "got nan"),
        (_Weight("much"), ValueError, "got 'much'"),
    ],
)
def test_a_redistribution_of_another_kind_is_named(rule, error, message):
    layers = nn.ModuleList([FakeSparse(10, 10, 0.5), FakeSparse(10, 10, 0.5)])
    layers.apply(algorithm := SET(update_freq=1, redistribute=rule))
    with pytest.raises(error, match=message):
        algorithm.step()
    assert [layer.nnz for layer in layers] == [50, 50]


def test_a_refused_layer_leaves_none_attached():
    model = nn.Sequential(SparseLinear(20, 30, sparsity=0.8), SparseLinear(30, 10, sparsity=0.5))
    algorithm = RigL(sparsity=0.8)
    with pytest.raises(ValueError, match=r"sparsity=0\.8 means 60 connections"):
        algorithm.attach(model)
    assert algorithm.layers == ()
    group = Group({"0": SET(0.8), "*": SET(0.8)})
    with pytest.raises(ValueError, match=r"sparsity=0\.8 means 60 connections"):
        group.attach(model)
    assert group.layers == ()
    RigL().attach(model)


def test_a_part_of_ones_own_is_told_of_every_layer():
    class Counting(DropScore):
        def __init__(self):
            self.n_layers = 0

        def attach(self, layer):
            self.n_layers += 1

        def detach(self, layers):
            self.n_layers -= len(list(layers))

        def __call__(self, view):
            return np.zeros(view.nnz)

    algorithm = DynamicSparsityAlgorithm(drop=(drop := Counting()))
    algorithm.attach(build("fake"))
    assert drop.n_layers == 2
    algorithm.detach()
    assert drop.n_layers == 0


@pytest.mark.parametrize("algorithm", [SET, RigL])
def test_a_step_that_is_counted_twice_is_told(algorithm):
    model = nn.Sequential(SparseLinear(20, 20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.apply(driver := algorithm(update_freq=100))
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 20)).sum().backward()
        if step != 1:  # as a GradScaler skips one
            optimizer.step()
        driver.step()
    with pytest.warns(UserWarning, match="called again without a step of the optimizer or a backward pass"):
        driver.step()


def test_another_optimizer_may_take_the_place_of_one_that_is_gone():
    model = nn.Sequential(SparseLinear(20, 20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    algorithm = SET(update_freq=2)
    algorithm.attach(model, optimizer)
    del optimizer
    gc.collect()
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    algorithm.attach(model, other)
    for _ in range(2):
        other.step()
    assert algorithm.last_update is not None
    with pytest.raises(RuntimeError, match="must step along with one optimizer"):
        algorithm.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_every_algorithm_and_group_tells_of_its_last_update():
    model = nn.Sequential(SparseLinear(20, 20), SparseLinear(20, 20))
    group = Group({"0": Static(), "1": SET(update_freq=1)})
    group.attach(model)
    assert group.last_update is None
    assert Static().last_update is None
    both = Group({"0": SET(update_freq=1), "1": SET(update_freq=1)})
    group.detach()
    both.attach(model)
    both.step()
    assert [report.grown > 0 for report in both.last_update] == [True, True]
