"""A layer whose number of connections changes under a live graph, a gradient or an optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparselab import SparseLinear

NOTHING = torch.empty(0, dtype=torch.int64)

RESIZE: dict[str, Callable[[SparseLinear], object]] = {
    "shrunk": lambda layer: layer.rewrite(torch.arange(7), NOTHING),
    "grown": lambda layer: layer.rewrite(NOTHING, free(layer)[:7]),
    "loaded": lambda layer: layer.load_state_dict(SparseLinear(20, 10, sparsity=0.8).state_dict()),
}


def free(layer: SparseLinear) -> Tensor:
    mask = torch.ones(layer.in_features * layer.out_features, dtype=torch.bool)
    mask[layer.positions()] = False
    return mask.nonzero().flatten()


def dense_gradient(layer: SparseLinear, x: Tensor) -> Tensor:
    dense = layer.to_dense()
    dense(x).square().sum().backward()
    assert dense.weight.grad is not None
    return dense.weight.grad.reshape(-1)[layer.positions()].view(-1, 1, 1)


@pytest.mark.parametrize("how", RESIZE)
def test_trains_on_while_the_last_loss_is_held(how: str) -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    x = torch.randn(4, 20)
    held = layer(x).square().sum()
    held.backward()
    before = layer.nnz
    RESIZE[how](layer)
    assert layer.nnz != before
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.weight_values.grad, dense_gradient(layer, x))
    assert held.requires_grad


@pytest.mark.parametrize("how", RESIZE)
def test_hooks_on_the_parameter_stay(how: str) -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    shapes: list[torch.Size] = []
    layer.weight_values.register_hook(lambda gradient: shapes.append(gradient.shape))
    layer.weight_values.register_post_accumulate_grad_hook(
        lambda parameter: shapes.append(parameter.grad.shape)
    )
    RESIZE[how](layer)
    layer(torch.randn(4, 20)).sum().backward()
    assert shapes == [(layer.nnz, 1, 1)] * 2


def test_the_gradient_goes_with_its_positions_when_another_count_is_loaded() -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    layer(torch.randn(4, 20)).sum().backward()
    before = dict(zip(layer.positions().tolist(), layer.weight_values.grad.flatten().tolist(), strict=True))
    RESIZE["loaded"](layer)
    assert layer.weight_values.grad.flatten().tolist() == [
        before.get(at, 0.0) for at in layer.positions().tolist()
    ]


@pytest.mark.parametrize("how", RESIZE)
def test_a_layer_resized_in_inference_mode_can_train(how: str) -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    with torch.inference_mode():
        RESIZE[how](layer)
    x = torch.randn(4, 20)
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.weight_values.grad, dense_gradient(layer, x))


@pytest.mark.parametrize("how", RESIZE)
def test_a_backward_pass_of_the_old_count_is_refused(how: str) -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    loss = layer(torch.randn(4, 20)).sum()
    RESIZE[how](layer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_optimizer_goes_on_after_its_state_is_loaded_too() -> None:
    source, target = SparseLinear(20, 10, sparsity=0.8), SparseLinear(20, 10, sparsity=0.5)
    x = torch.randn(4, 20)
    optimizers = [torch.optim.AdamW(layer.parameters()) for layer in (source, target)]
    for layer, optimizer in zip((source, target), optimizers, strict=True):
        layer(x).square().sum().backward()
        optimizer.step()
    target.load_state_dict(source.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for layer, optimizer in zip((source, target), optimizers, strict=True):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(source.weight_values, target.weight_values)


def test_a_state_that_was_taken_before_the_count_changed_stays_whole() -> None:
    layer = SparseLinear(20, 12, sparsity=0.5)
    x, state, dense = torch.randn(3, 20), layer.state_dict(), layer.to_dense()
    layer.rewrite(torch.arange(30), torch.empty(0, dtype=torch.int64))
    other = SparseLinear(20, 12, sparsity=0.9)
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), dense(x))


def test_memory_that_nothing_was_written_to_is_refused_with_advice() -> None:
    layer = SparseLinear(20, 12, device="meta").to_empty(device="cpu")
    layer.indptr.fill_(7)
    with pytest.raises(ValueError, match=r"load a state, or call sparselab\.materialize"):
        layer(torch.randn(3, 20))
