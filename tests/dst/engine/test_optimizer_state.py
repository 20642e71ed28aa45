import gc
import weakref

import numpy as np
import pytest
import torch
from torch.optim import optimizer as torch_optimizer

from sparselab.dst.engine.optimizer_state import OptimizerTracker
from sparselab.nn.follow.state_move import StateMove
from tests.dst.fake import FakeSparse
from tests.dst.harness import assert_followed, by_position

EVERY_ELEMENTWISE_OPTIMIZER = {
    "SGD": {"lr": 0.1},
    "SGD momentum": {"lr": 0.1, "momentum": 0.9},
    "Adam amsgrad": {"amsgrad": True},
    "AdamW": {},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "Adagrad": {},
    "Adadelta": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "ASGD": {},
    "Adafactor": {},
}


@pytest.fixture
def layer():
    return FakeSparse(6, 5, 0.5)


def step(layer, optimizer):
    optimizer.zero_grad()
    layer(torch.randn(4, 6, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimizer.step()


def rewire(layer, optimizers):
    free = sorted(set(range(30)) - set(layer.positions().tolist()))
    dropped = layer.positions()[3].item()
    move = StateMove(layer, optimizers)
    grow = torch.tensor(sorted([free[0], dropped, free[-1]]))
    move.apply(layer.rewrite(torch.tensor([0, 3, 7]), grow))
    return dropped, {free[0], free[-1]}


@pytest.mark.parametrize("name", EVERY_ELEMENTWISE_OPTIMIZER)
def test_state_moves_for_every_elementwise_optimizer(layer, name):
    settings = EVERY_ELEMENTWISE_OPTIMIZER[name]
    optimizer = getattr(torch.optim, name.split()[0])([layer.weight_values], **settings)
    for _ in range(3):
        step(layer, optimizer)
    before = by_position(layer, optimizer)
    scalars = _scalars(optimizer, layer)
    regrown, grown = rewire(layer, [optimizer])
    after = by_position(layer, optimizer)
    if name == "Rprop":
        steps = [numbers.pop("step_size") for numbers in (before, after)]
        assert all(steps[1][at] == np.float32(optimizer.defaults["lr"]) for at in grown)
        assert all(steps[0][at] == steps[1][at] for at in steps[0].keys() & steps[1].keys())
    assert_followed(before, after)
    assert after["value"][regrown] == before["value"][regrown] != 0
    assert grown <= after["value"].keys() - before["value"].keys()
    assert _scalars(optimizer, layer) == scalars
    step(layer, optimizer)


def _scalars(optimizer, layer):
    state = optimizer.state[layer.weight_values]
    return {k: float(v) for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim() == 0}


def test_adam_has_moments_and_they_are_not_zero(layer):
    optimizer = torch.optim.Adam([layer.weight_values])
    step(layer, optimizer)
    moments = by_position(layer, optimizer)
    assert {"exp_avg", "exp_avg_sq", "gradient"} <= moments.keys()
    assert all(any(numbers.values()) for numbers in moments.values())


def test_a_changed_count_gets_new_state_tensors(layer):
    optimizer = torch.optim.SGD([layer.weight_values], lr=0.1, momentum=0.9)
    step(layer, optimizer)
    before = by_position(layer, optimizer)
    move = StateMove(layer, [optimizer])
    move.apply(layer.rewrite(torch.tensor([0, 1]), torch.empty(0, dtype=torch.int64)))
    assert_followed(before, by_position(layer, optimizer))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (torch.zeros(3), r"'extra' has shape \(3,\), not \(15,\)"),
        (torch.zeros(15, 2), r"'extra' has shape \(15, 2\)"),
        ([torch.zeros(15)], "'extra' is a list"),
        ({"a": (torch.zeros(()),)}, "'extra' is a dict"),
    ],
)
def test_state_that_cannot_follow_is_refused(layer, entry, message):
    optimizer = torch.optim.SGD([layer.weight_values], lr=0.1, momentum=0.9)
    step(layer, optimizer)
    optimizer.state[layer.weight_values]["extra"] = entry
    with pytest.raises(RuntimeError, match=message):
        StateMove(layer, [optimizer])


@pytest.mark.parametrize("entry", [None, 3, 0.5, "name", [], [1, 2], torch.zeros(()), torch.zeros(1)])
def test_state_that_is_not_per_connection_is_left_alone(layer, entry):
    optimizer = torch.optim.SGD([layer.weight_values], lr=0.1, momentum=0.9)
    step(layer, optimizer)
    optimizer.state[layer.weight_values]["extra"] = entry
    rewire(layer, [optimizer])
    assert optimizer.state[layer.weight_values]["extra"] is entry


@pytest.mark.parametrize("position", [0, 1])
def test_lbfgs_is_refused_wherever_the_layer_is_among_its_parameters(layer, position):
    other = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS(
        [layer.weight_values, other] if position == 0 else [other, layer.weight_values]
    )
    with pytest.raises(RuntimeError, match=r"LBFGS.*one vector over all parameters"):
        StateMove(layer, [optimizer])
    StateMove(FakeSparse(6, 5, 0.5), [optimizer])


def test_the_tracker_notes_optimizers_of_its_layers_only(layer):
    tracker = OptimizerTracker([layer])
    stranger = FakeSparse(6, 5, 0.5)
    ours, theirs = (torch.optim.SGD([part.weight_values], lr=0.1) for part in (layer, stranger))
    step(layer, ours)
    assert list(tracker._optimizers) == []
    tracker.watch()
    tracker.watch()
    step(layer, ours)
    step(stranger, theirs)
    assert list(tracker._optimizers) == [ours]


def test_the_tracker_keeps_nothing_alive():
    layer = FakeSparse(6, 5, 0.5)
    tracker = OptimizerTracker([layer])
    tracker.watch()
    optimizer = torch.optim.SGD([layer.weight_values], lr=0.1)
    step(layer, optimizer)
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    alive = weakref.ref(tracker)
    del tracker
    gc.collect()
    assert alive() is None


def test_hooks_of_dead_trackers_do_not_pile_up(layer):
    def watch_and_die():
        OptimizerTracker([layer]).watch()
        gc.collect()
        return len(torch_optimizer._global_optimizer_post_hooks)

    gc.collect()
    assert watch_and_die() == watch_and_die() == watch_and_die()


def test_a_tracker_may_die_during_an_optimizer_step(layer):
    trackers = [OptimizerTracker([layer]) for _ in range(3)]
    for tracker in trackers:
        tracker.watch()
    del tracker
    handle = torch_optimizer.register_optimizer_step_post_hook(lambda *args: (trackers.clear(), gc.collect()))
    last = OptimizerTracker([layer])
    last.watch()
    optimizer = torch.optim.SGD([layer.weight_values], lr=0.1)
    step(layer, optimizer)
    handle.remove()
    assert trackers == []
    assert list(last._optimizers) == [optimizer]


def test_only_optimizers_can_be_added(layer):
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer.*got list"):
        OptimizerTracker([layer]).add([])
