"""Connections that are shared with another layer, replaced in the middle of a step, or never updated."""

import pytest
import torch
from torch import nn

from sparselab import SET, Group, MaskedLinear, Monitor, RigL, SparseLinear, Static

SHARED = {
    "weights": lambda a, b: setattr(b, "weight_values", a.weight_values),
    "all, by assign": lambda a, b: b.load_state_dict(a.state_dict(), assign=True),
    "columns": lambda a, b: setattr(b, "indices", a.indices),
    "memory": lambda a, b: setattr(b, "weight_values", nn.Parameter(a.weight_values.data)),
}


@pytest.mark.parametrize("how", SHARED)
def test_layers_that_share_tensors_are_refused(how):
    model = nn.Sequential(SparseLinear(12, 12), SparseLinear(12, 12))
    SHARED[how](model[0], model[1])
    algorithm = RigL()
    with pytest.raises(ValueError, match="layers must not share their weights or connections"):
        algorithm.attach(model)
    assert algorithm.layers == ()
    algorithm.attach(model[:1])
    for other in (algorithm, SET()):
        with pytest.raises(ValueError, match="layers must not share their weights or connections"):
            other(model[1])
    algorithm.detach()
    SET()(model[1])


def test_masked_layers_that_share_a_weight_are_refused():
    a, b = MaskedLinear(12, 12), MaskedLinear(12, 12)
    b.weight = a.weight
    with pytest.raises(ValueError, match="layers must not share their weights or connections"):
        RigL().attach(nn.Sequential(a, b))


@pytest.mark.parametrize("make", [RigL, SET])
def test_layers_that_come_to_share_tensors_are_refused_at_the_update(make):
    model = nn.Sequential(SparseLinear(12, 12), SparseLinear(12, 12))
    optimizer = torch.optim.Adam(model.parameters())
    algorithm = make(update_freq=1)
    algorithm.attach(model)
    model[1].load_state_dict(model[0].state_dict(), assign=True)
    before = model[0].positions()
    model(torch.randn(4, 12)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="layers must not share their weights or connections"):
        algorithm.step()
    assert torch.equal(model[0].positions(), before)


def test_a_layer_that_is_left_alone_must_not_share_with_one_that_is_not():
    model = nn.ModuleDict({"s": SparseLinear(12, 12), "t": SparseLinear(12, 12)})
    model["t"].load_state_dict(model["s"].state_dict(), assign=True)
    with pytest.raises(ValueError, match="layers must not share their weights or connections"):
        Group({"s": RigL()}).attach(model)


def test_memory_that_overlaps_is_shared():
    flat = torch.zeros(100)
    model = nn.Sequential(SparseLinear(12, 12, sparsity=0.5), SparseLinear(12, 12, sparsity=0.5))
    for at, layer in enumerate(model):
        layer.weight_values = nn.Parameter(flat[at : at + 72].view(72, 1, 1))
    with pytest.raises(ValueError, match="layers must not share their weights or connections"):
        RigL().attach(model)
    for at, layer in enumerate(model):
        layer.weight_values = nn.Parameter(torch.zeros(200)[at * 72 : at * 72 + 72].view(72, 1, 1))
    RigL().attach(model)


def test_other_models_are_no_concern_of_a_new_one():
    tied = nn.Sequential(SparseLinear(12, 12), SparseLinear(12, 12))
    algorithm = RigL()
    algorithm.attach(tied)
    tied[1].load_state_dict(tied[0].state_dict(), assign=True)
    SET().attach(nn.Sequential(SparseLinear(8, 8)))


def test_layers_whose_weights_are_computed_are_refused():
    layer = SparseLinear(12, 12)
    nn.utils.parametrize.register_parametrization(layer, "weight_values", nn.Identity())
    with pytest.raises(TypeError, match="weight_values must be a Parameter of the layer, got one that is"):
        RigL().attach(nn.Sequential(layer))


def test_what_the_gradient_is_made_of_may_lose_its_memory():
    model = nn.Sequential(nn.Linear(8, 30), SparseLinear(30, 20, sparsity=0.5))
    algorithm = RigL(update_freq=1)
    algorithm.attach(model)
    hidden = model[0](torch.randn(50, 8))
    model[1](hidden).sum().backward()
    hidden.untyped_storage().resize_(64)
    algorithm.step()
    assert algorithm.last_update[0].skipped == "what the gradient is made of was overwritten"


def test_one_module_in_two_places_is_one_layer():
    layer = SparseLinear(12, 12)
    algorithm = RigL()
    algorithm.attach(nn.Sequential(layer, nn.ReLU(), layer))
    assert algorithm.layers == (layer,)


@pytest.mark.parametrize("layer_class", [SparseLinear, MaskedLinear])
def test_connections_replaced_after_the_gradient_are_not_updated_by_it(layer_class):
    """The gradient of growth was summed up for other connections than the layer has at the step."""
    layer, other = layer_class(20, 10, sparsity=0.5), layer_class(20, 10, sparsity=0.5)
    algorithm = RigL(update_freq=1)
    layer.apply(algorithm)
    for replaced in (True, False, True, False):  # held until the step at first, formed in the pass later
        layer.zero_grad()
        layer(torch.randn(6, 20)).square().sum().backward()
        algorithm.grow.settle({id(layer.stored)})
        if replaced:
            layer.load_state_dict(other.state_dict())
        algorithm.step()
        (report,) = algorithm.last_update
        assert report.skipped == ("the connections were replaced after a backward pass" * replaced)
        assert bool(report.grown) != replaced


def test_updates_that_never_come_are_warned_of():
    for arguments in ({"stop": 50}, {"update": [60, 80], "stop": 60}, {"update_freq": 50, "stop": 50}):
        with pytest.warns(UserWarning, match="no update will ever come"):
            RigL(**arguments)
    RigL(stop=101)
    RigL(stop=0)


def test_a_monitor_does_not_tell_of_layers_that_its_algorithm_has_no_more():
    algorithm = SET(update_freq=1)
    SparseLinear(12, 12).apply(algorithm)
    monitor = Monitor(algorithm)
    algorithm.step()
    algorithm.reset()
    SparseLinear(12, 12).apply(algorithm)
    with pytest.raises(RuntimeError, match=r"Monitor must watch the layers .* remove\(\) the monitor"):
        algorithm.step()
    assert len(monitor.history) == 2


@pytest.mark.parametrize("layer_class", [SparseLinear, MaskedLinear])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_of_low_precision_are_not_rewired(layer_class, dtype):
    layer = layer_class(12, 12).to(dtype)
    with pytest.raises(TypeError, match=f"weights of float32 or float64, got {dtype}.*torch.autocast"):
        RigL().attach(nn.Sequential(layer))
    Static().attach(nn.Sequential(layer))
