"""Connections that are shared with another layer, replaced in the middle of a step, or never updated."""

import pytest
import torch
from torch import nn

from sparselab import SET, MaskedLinear, Monitor, RigL, SparseLinear

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
    for replaced in (False, True, False):
        layer.zero_grad()
        layer(torch.randn(6, 20)).square().sum().backward()
        algorithm.grow.settle({id(layer.stored)})
        if replaced:
            layer.load_state_dict(other.state_dict())
        algorithm.step()
        (report,) = algorithm.last_update
        assert report.skipped == ("the connections were replaced after the gradient was formed" * replaced)
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
