"""What a gradient hook sees of a pass makes up the dense gradient, of whatever order the loss is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparselab import (
    BlockSparseLinear,
    FanInLinear,
    MaskedConv2d,
    MaskedLinear,
    SparseConv2d,
    SparseLinear,
)
from sparselab.nn.layers.base import SparseLayer
from sparselab.nn.ops.operands import GradientOperands

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

F64 = torch.float64
LINEAR: dict[str, Callable[[int, int], SparseLayer]] = {
    "single": lambda *sizes: SparseLinear(*sizes, sparsity=0.5, dtype=F64),
    "without bias": lambda *sizes: SparseLinear(*sizes, False, sparsity=0.5, dtype=F64),
    "fan-in": lambda *sizes: FanInLinear(*sizes, fan_in=2, dtype=F64),
    "blocks": lambda *sizes: BlockSparseLinear(*sizes, sparsity=0.5, block_shape=(2, 2), dtype=F64),
    "masked": lambda *sizes: MaskedLinear(*sizes, sparsity=0.5, dtype=F64),
}
CONV: dict[str, Callable[..., SparseLayer]] = {"conv": SparseConv2d, "masked conv": MaskedConv2d}
kinds = pytest.mark.parametrize("kind", [*LINEAR, *CONV])


def build(kind: str) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    """Two layers with something curved between them, the same of dense layers, and an input."""
    if kind in LINEAR:
        layers = [LINEAR[kind](6, 8), LINEAR[kind](8, 4)]
        x = torch.randn(3, 6, dtype=F64)
    else:
        make = CONV[kind]
        layers = [
            make(2, 4, 2, padding=1, sparsity=0.5, dtype=F64),
            make(4, 2, (2, 1), stride=2, groups=2, sparsity=0.5, dtype=F64),
        ]
        x = torch.randn(2, 2, 3, 3, dtype=F64)
    dense: list[Any] = [layer.to_dense() for layer in layers]
    return (
        nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh()),
        nn.Sequential(dense[0], nn.Tanh(), dense[1], nn.Tanh()),
        x.requires_grad_(),
    )


Weights = list[tuple[Tensor, Tensor]]


def weights_of(model: nn.Sequential) -> list[Tensor]:
    return [layer.stored if isinstance(layer, SparseLayer) else layer.weight for layer in model[::2]]


def gradient_penalty(model: nn.Sequential, x: Tensor, live: Any) -> Tensor:
    (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return model(x).mean() + (dx.flatten(1).norm(dim=1) - 1).square().mean()


def curvature(model: nn.Sequential, x: Tensor, live: Any) -> Tensor:
    (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    return second.sin().sum()


def gradient_norm(model: nn.Sequential, x: Tensor, live: Any) -> Tensor:
    """Of the gradients at the connections there are."""
    grads = torch.autograd.grad(model(x).square().sum(), weights_of(model), create_graph=True)
    return sum((live(each).sin().sum() for each in grads), x.new_zeros(()))


def norm_of_gradient_norm(model: nn.Sequential, x: Tensor, live: Any) -> Tensor:
    """Here a gradient by something in place of the weights comes in, which must not be shown."""
    again = torch.autograd.grad(gradient_norm(model, x, live), weights_of(model), create_graph=True)
    return sum((live(each).square().sum() for each in again), x.new_zeros(()))


def tangent(model: nn.Sequential, x: Tensor, live: Any) -> Tensor:
    y, dy = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    return (y * dy.square()).sum()


def vmapped(model: nn.Sequential, x: Tensor, live: Any) -> Tensor:
    several: Tensor = torch.func.vmap(model)(torch.stack([x, 2 * x]))
    return several.square().sum()


def per_sample_norms(model: nn.Sequential, x: Tensor, live: Any) -> Tensor:
    of_one = torch.func.grad(lambda x: model(x.unsqueeze(0)).sum())
    return torch.func.vmap(of_one)(x).square().sum()  # type: ignore[no-any-return]


def checkpointed(model: nn.Sequential, x: Tensor, live: Any) -> Tensor:
    return gradient_penalty(lambda x: checkpoint(model, x, use_reentrant=False), x, live)  # type: ignore[arg-type]


LOSSES: dict[str, Callable[[nn.Sequential, Tensor, Any], Tensor]] = {
    "plain": lambda model, x, live: model(x).square().sum(),
    "gradient penalty": gradient_penalty,
    "curvature": curvature,
    "gradient norm": gradient_norm,
    "norm of the gradient norm": norm_of_gradient_norm,
    "tangent": tangent,
    "vmap": vmapped,
    "per-sample norms": per_sample_norms,
    "checkpoint": checkpointed,
}


def matrix(layer: SparseLayer, operands: list[GradientOperands]) -> Tensor:
    """G at all positions."""
    G = torch.zeros(layer.shape, dtype=F64)
    for each in operands:
        each.add_rows(0, G)
    return G


@kinds
@pytest.mark.parametrize("how", LOSSES)
def test_the_operands_make_up_the_gradient_of_the_dense_twin(kind: str, how: str) -> None:
    model, dense, x = build(kind)
    masks = {tuple(each.weight.shape): each.weight.detach() != 0 for each in dense[::2]}
    seen: dict[int, list[GradientOperands]] = {0: [], 2: []}
    for i, operands in seen.items():
        model[i].gradient_hook = operands.append
    loss = LOSSES[how](model, x, lambda each: each)
    for operands in seen.values():
        operands.clear()
    loss.backward()
    exact = LOSSES[how](dense, x, lambda each: each * masks[tuple(each.shape)])
    exact.backward()
    torch.testing.assert_close(loss, exact)
    for i, operands in seen.items():
        wanted = dense[i].weight.grad.reshape(model[i].shape)
        assert wanted[~masks[tuple(dense[i].weight.shape)].reshape(wanted.shape)].any()
        torch.testing.assert_close(matrix(model[i], operands), wanted, rtol=1e-10, atol=1e-12)


@kinds
def test_a_cotangent_of_the_weights_is_no_weight(kind: str) -> None:
    """`norm_of_gradient_norm` would not notice if its own operands canceled: they are counted here."""
    model, _, x = build(kind)
    layer = model[2]
    seen: list[GradientOperands] = []
    layer.gradient_hook = seen.append
    y = layer(model[:2](x))
    (dw,) = torch.autograd.grad(y.square().sum(), layer.stored, create_graph=True)
    (again,) = torch.autograd.grad(dw.square().sum(), y, create_graph=True)
    seen.clear()
    # By dw alone, from which `again` was made.
    torch.autograd.grad(again.square().sum(), dw)
    assert not seen


OTHERS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "tensor": lambda own: (leaf := own.detach().clone().requires_grad_(), leaf),
    "Parameter": lambda own: (leaf := nn.Parameter(own.detach().clone()), leaf),
    "cast": lambda own: (leaf := own.detach().float().requires_grad_(), leaf.double()),
    "steps away": lambda own: (leaf := own.detach().clone().requires_grad_(), (2 * leaf - 1).tanh()),
}


@kinds
@pytest.mark.parametrize("how", ["plain", "gradient penalty", "checkpoint", "tangent"])
@pytest.mark.parametrize("other", OTHERS)
def test_weights_in_the_place_of_the_layers_own_are_not_shown(kind: str, how: str, other: str) -> None:
    """Their gradient is not in the Parameter's ``.grad``, though one backward pass forms both."""
    model, _, x = build(kind)
    name = next(name for name, each in model.named_parameters() if each is model[2].stored)
    leaf, values = OTHERS[other](model[2].stored)

    def replaced(x: Tensor) -> Tensor:
        return torch.func.functional_call(model, {name: values}, (x,))  # type: ignore[no-any-return]

    def loss(call: Any) -> Tensor:
        return LOSSES[how](call, x, None)

    seen: list[GradientOperands] = []
    model[2].gradient_hook = seen.append
    loss(model).backward()
    n_own, own = len(seen), model[2].stored.grad.clone()
    assert n_own
    model.zero_grad()
    seen.clear()
    (loss(model) + loss(replaced)).backward()
    assert leaf.grad is not None
    assert leaf.grad.any()
    torch.testing.assert_close(model[2].stored.grad, own)
    assert len(seen) == n_own


@kinds
def test_weights_computed_from_the_layers_own_are_shown(kind: str) -> None:
    """As those of an inner step are, whose gradient arrives at the Parameter."""
    model, _, x = build(kind)
    own = model[2].stored
    name = next(name for name, each in model.named_parameters() if each is own)
    seen: list[GradientOperands] = []
    model[2].gradient_hook = seen.append
    torch.func.functional_call(model, {name: own - 0.1 * own.detach()}, (x,)).sum().backward()
    assert len(seen) == 1
    assert own.grad is not None


@kinds
@pytest.mark.parametrize("transform", ["grad", "per-sample", "jacfwd"])
def test_transforms_leave_nothing_in_grad(kind: str, transform: str) -> None:
    """RigL sees what makes up ``.grad`` alone: see also ``tests/dst/parts/test_passes.py``."""
    model, _, x = build(kind)
    params = {name: each.detach() for name, each in model.named_parameters()}

    def call(params: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (x,)).square().sum()  # type: ignore[no-any-return]

    how: dict[str, Callable[[], Any]] = {
        "grad": lambda: torch.func.grad(call)(params, x),
        "per-sample": lambda: torch.func.vmap(torch.func.grad(call), (None, 0))(params, torch.stack([x, x])),
        "jacfwd": lambda: torch.func.jacfwd(call)(params, x),
    }
    found = itertools.chain(how[transform]().values())
    assert all(bool(each.any()) for each in found)
    assert all(each.grad is None for each in model.parameters())
