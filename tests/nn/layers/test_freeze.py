"""A frozen layer computes what it did, and holds less."""

from __future__ import annotations

import copy

import pytest
import torch

from sparselab import SET, SparseLinear, memory_report


def train(layer: SparseLinear) -> torch.Tensor:
    x = torch.randn(64, layer.in_features, requires_grad=True)
    layer(x).square().sum().backward()
    return x


@pytest.mark.parametrize("bias", [True, False])
def test_freezing_lets_go_of_what_training_needs_and_keeps_the_forward_plan(bias: bool) -> None:
    layer = SparseLinear(128, 96, bias=bias)
    SET().attach(layer)
    x = train(layer).detach()
    expected, held = layer(x), layer.plan_bytes()
    plan = layer.topology().kept.forward
    assert layer.gradient_hook is not None or layer.weight_values.grad is not None
    assert layer.freeze() is layer
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert layer.gradient_hook is None
    assert 0 < layer.plan_bytes() < held / 2
    y = layer(x)
    assert not y.requires_grad
    assert torch.equal(y, expected)
    assert layer.topology().kept.forward is plan
    assert memory_report(layer).gradient_bytes == 0


def test_the_gradient_of_the_input_is_still_there() -> None:
    layer = SparseLinear(128, 96)
    x = train(layer)
    expected, held = x.grad, layer.plan_bytes()
    layer.freeze()
    frozen = layer.plan_bytes()
    x.grad = None
    layer(x).square().sum().backward()
    assert torch.equal(x.grad, expected)
    assert layer.weight_values.grad is None
    assert frozen < layer.plan_bytes() < held


def test_a_graph_from_before_still_runs_backward() -> None:
    layer = SparseLinear(128, 96)
    x = train(layer)
    expected, x.grad = x.grad, None
    loss = layer(x).square().sum()
    layer.freeze()
    loss.backward()
    assert torch.equal(x.grad, expected)


def test_freezing_before_any_pass_and_in_a_copy() -> None:
    layer = SparseLinear(128, 96).freeze()
    assert layer.plan_bytes() == 0
    twin = copy.deepcopy(layer)
    assert not twin.weight_values.requires_grad
    x = torch.randn(64, 128)
    assert torch.equal(twin(x), layer(x))


def test_a_frozen_layer_can_be_trained_again() -> None:
    layer = SparseLinear(128, 96)
    train(layer)
    held = layer.plan_bytes()
    layer.freeze().requires_grad_(True)
    train(layer)
    assert layer.weight_values.grad is not None
    assert layer.plan_bytes() == held
