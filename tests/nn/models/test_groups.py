"""Learning rates by density."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparselab import GMP, LinearSchedule, SparseLinear
from sparselab.nn import parameter_groups


def build():
    return nn.Sequential(
        SparseLinear(20, 10, sparsity=0.5), SparseLinear(10, 20, sparsity=0.9), nn.Linear(20, 2)
    )


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_every_parameter_is_in_one_group_with_the_rate_of_its_density(power):
    model = build()
    groups = parameter_groups(model, 0.1, power=power)
    rates = {id(each): group["lr"] for group in groups for each in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(list(model.parameters()))
    for layer, density in zip(model[:2], (0.5, 0.1), strict=True):
        assert rates[id(layer.stored)] == pytest.approx(0.1 * density**-power)
        assert rates[id(layer.bias)] == 0.1
    assert {rates[id(each)] for each in model[2].parameters()} == {0.1}
    assert [group.get("density") for group in groups] == [None, 0.5, pytest.approx(0.1)]


def test_rates_stay_where_the_density_changes():
    """They may be set by the density that pruning will end with."""
    layer = SparseLinear(20, 10, sparsity=0.0)
    (dense, sparse) = parameter_groups(layer, 0.1, density=0.25)
    assert sparse["params"] == [layer.stored]
    assert (dense["lr"], sparse["lr"]) == (0.1, pytest.approx(0.4))
    optimizer = torch.optim.AdamW([dense, sparse])
    layer.apply(algorithm := GMP(LinearSchedule(0.0, 0.75, stop=2), update_freq=1))
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(4, 20)).square().sum().backward()
        optimizer.step()
        algorithm.step()
    assert layer.density == 0.25
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, pytest.approx(0.4)]


def test_layers_without_connections_get_the_rate_of_dense_ones():
    (group,) = parameter_groups(SparseLinear(20, 10, sparsity=1.0), 0.1)
    assert group["lr"] == 0.1


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"lr": 0.1, "density": 0.0}, {"lr": 0.1, "density": 2.0}])
def test_what_is_out_of_range_is_refused(settings):
    with pytest.raises(ValueError, match="must"):
        parameter_groups(build(), **settings)
