"""Gradients of feed-forward blocks: of higher order, transformed, saved elsewhere, seen by hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from sparselab.nn.layers.composed import mlp as _mlp
from sparselab.nn.ops.cpu import mlp as _kernels
from tests.nn.layers.composed.blocks import apart, gradients, is_fused, make, of_two_kinds, tokens


@pytest.fixture(autouse=True)
def _pays_for_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mlp, "pays", _kernels.serves)


@of_two_kinds
@pytest.mark.parametrize("activation", ["gelu", "silu", "gelu_tanh"])
def test_second_derivatives(kind: str, activation: str) -> None:
    block, x = make(kind, activation=activation), tokens(70, 12)
    results = []
    for y in (block(x), apart(block, x)):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), [x, *block.parameters()]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@of_two_kinds
def test_transforms(kind: str) -> None:
    block, x = make(kind), torch.randn(3, 70, 12)
    parameters = dict(block.named_parameters())

    def loss(weights: Any, batch: Tensor) -> Tensor:
        return functional_call(block, weights, batch).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    for name, parameter in parameters.items():
        (expected,) = torch.autograd.grad(apart(block, x[1]).square().sum(), parameter)
        torch.testing.assert_close(each[name][1], expected, atol=1e-4, rtol=1e-4)
    y = block(tokens(70, 12))
    assert is_fused(y)
    basis = torch.randn(2, *y.shape)
    batched = torch.autograd.grad(y, block.up.weight_values, basis, is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(y, block.up.weight_values, basis[1])
    torch.testing.assert_close(batched[0][1], one, atol=2e-5, rtol=2e-5)


@of_two_kinds
def test_checkpoints_and_saved_tensors_elsewhere(kind: str) -> None:
    block, x = make(kind), tokens(70, 12)
    dy = torch.randn(70, 10)
    leaves = [x, *block.parameters()]
    expected = gradients(block(x), dy, *leaves)
    again = checkpoint(block, x, use_reentrant=False)
    with torch.autograd.graph.saved_tensors_hooks(_unaligned, lambda t: t):
        moved = block(x)
    for y in (again, moved):
        for one, other in zip(gradients(y, dy, *leaves), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t[:1]):
        wrong = block(x)
    with pytest.raises(RuntimeError, match="must come back as it was"):
        gradients(wrong, dy, *leaves)


def _unaligned(saved: Tensor) -> Tensor:
    memory = torch.empty(saved.numel() + 1)[1:].view(saved.shape)
    return memory.copy_(saved.detach())


def test_changes_between_the_passes_are_seen() -> None:
    block, x = make("single"), tokens(70, 12)
    y = block(x)
    with torch.no_grad():
        block.down.weight_values.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = block(x)
    block.up.rewrite(
        torch.tensor([0]), torch.tensor([int(np.setdiff1d(np.arange(444), block.up.positions())[0])])
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@of_two_kinds
def test_a_hook_that_comes_between_the_passes(kind: str) -> None:
    """It sees what it would have seen of the layers: their inputs and the gradients of their outputs."""
    block, x = make(kind), tokens(70, 12)
    dy = torch.randn(70, 10)
    seen: dict[str, Any] = {}
    y = block(x)
    assert is_fused(y)
    found = {}
    for name in ("up", "down"):
        getattr(block, name).gradient_hook = lambda operands, name=name: seen.update({name: operands})
    leaves = [x, *block.parameters()]
    results = [gradients(y, dy, *leaves)]
    found = {name: each.tensors for name, each in seen.items()}
    seen.clear()
    results.append(gradients(block(x), dy, *leaves))
    for name, each in seen.items():
        for one, other in zip(found[name], each.tensors, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert set(found) == {"up", "down"}
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
