"""Growth by gradient where the gradient is of another order or mode than one plain backward pass."""

import pytest
import torch
from torch import nn

from sparselab import (
    BlockSparseLinear,
    MaskedLinear,
    RigL,
    SparseConv2d,
    SparseConvTranspose2d,
    SparseLinear,
)
from tests.dst.algorithms.test_rigl import slow_update

F64 = torch.float64
KINDS = {
    "single": (lambda: SparseLinear(12, 10, sparsity=0.6, dtype=F64), (5, 12)),
    "masked": (lambda: MaskedLinear(12, 10, sparsity=0.6, dtype=F64), (5, 12)),
    "blocks": (lambda: BlockSparseLinear(12, 10, sparsity=0.6, block_shape=(1, 1), dtype=F64), (5, 12)),
    "conv": (lambda: SparseConv2d(4, 6, 3, padding=1, sparsity=0.6, dtype=F64), (2, 4, 4, 4)),
    "transposed": (lambda: SparseConvTranspose2d(4, 6, 3, padding=1, sparsity=0.6, dtype=F64), (2, 4, 4, 4)),
}


def gradient_penalty(model, x):
    x = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return model(x).mean() + 10 * (dx.flatten(1).norm(dim=1) - 1).square().mean()


def tangent(model, x):
    y, dy = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    return (y + dy.square()).sum()


LOSSES = {"gradient penalty": gradient_penalty, "tangent": tangent}


def functional(model, x):
    params = {name: each.detach() for name, each in model.named_parameters()}
    call = torch.func.grad(lambda p: torch.func.functional_call(model, p, (3 * x,)).exp().sum())
    assert call(params)


def expected(layer, dense_gradient):
    weights = layer.per_connection(layer.stored.detach()).flatten().tolist()
    return slow_update(layer.positions().tolist(), weights, dense_gradient, int(0.3 * layer.nnz))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", LOSSES)
@pytest.mark.parametrize("aside", [False, True], ids=["alone", "with torch.func beside it"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_rigl_grows_where_the_gradient_of_a_dense_layer_is_largest(kind, how, aside):
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    layer, x = make(), torch.randn(shape, dtype=F64)
    model, dense = nn.Sequential(layer, nn.Tanh()), layer.to_dense()
    algorithm = RigL(drop_fraction=0.3, update_freq=1)
    layer.apply(algorithm)
    LOSSES[how](nn.Sequential(dense, nn.Tanh()), x).backward()
    wanted = expected(layer, dense.weight.grad)
    plain = dense.weight.grad.clone()
    dense.zero_grad()
    dense(x).tanh().mean().backward()
    assert wanted != expected(layer, dense.weight.grad), "the order of the loss must matter"
    if aside:
        functional(model, x)
    LOSSES[how](model, x).backward()
    if aside:
        functional(model, x)
    grad = layer.per_connection(layer.stored.grad).flatten()
    torch.testing.assert_close(grad, plain.reshape(-1)[layer.positions()], rtol=1e-10, atol=1e-12)
    algorithm.step()
    assert layer.positions().tolist() == wanted


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_a_penalty_may_have_its_own_backward_pass(create_graph):
    """With a graph torch adds up gradients in new tensors."""
    torch.manual_seed(0)
    layer, x = SparseLinear(12, 10, sparsity=0.6, dtype=F64), torch.randn(5, 12, dtype=F64)
    dense = layer.to_dense()
    algorithm = RigL(drop_fraction=0.3, update_freq=1, grad_accumulation=2)
    layer.apply(algorithm)
    for each in (dense, layer):
        model = nn.Sequential(each, nn.Tanh())
        model(x).square().sum().backward(create_graph=create_graph)
        gradient_penalty(model, x).backward(create_graph=create_graph)
    wanted = expected(layer, dense.weight.grad)
    algorithm.step()
    assert layer.positions().tolist() == wanted


def test_a_layer_that_differentiates_within_a_functional_call_is_followed_no_further():
    """Energy models take the gradient of their output inside their own forward pass."""

    class Forces(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = SparseLinear(12, 10, sparsity=0.6, dtype=F64)

        def forward(self, x):
            x = x.requires_grad_()
            return torch.autograd.grad(self.layer(x).tanh().sum(), x, create_graph=True)[0]

    torch.manual_seed(0)
    model, x = Forces(), torch.randn(5, 12, dtype=F64)
    dense = model.layer.to_dense()
    algorithm = RigL(drop_fraction=0.3, update_freq=1)
    algorithm.attach(model)
    doubled = {name: 2 * each for name, each in model.named_parameters()}
    torch.func.functional_call(model, doubled, (x.clone(),))
    model(x.clone()).square().sum().backward()
    own = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(dense(own).tanh().sum(), own, create_graph=True)
    dx.square().sum().backward()
    wanted = expected(model.layer, dense.weight.grad)
    algorithm.step()
    assert model.layer.positions().tolist() == wanted
