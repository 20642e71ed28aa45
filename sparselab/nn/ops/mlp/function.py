"""Two sparse layers with a nonlinearity between them, with gradients: as one node of autograd's graph.

What is saved of the hidden layer is what the nonlinearity is applied to, once, as the kernels want it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparselab.nn.ops.cpu import mlp
from sparselab.nn.ops.cpu.mlp import Weights
from sparselab.nn.ops.derivatives import product as transformed_product
from sparselab.nn.ops.derivatives import product_gradients
from sparselab.nn.ops.leaves import shown_form
from sparselab.nn.ops.linear import LinearForm
from sparselab.nn.ops.topologies import TensorTopology
from sparselab.nn.ops.tracing import is_plain


def apply_activation(name: str, x: Tensor) -> Tensor:
    """The nonlinearity of that name, of `sparselab.kernels.cpu.simd.activations`."""
    if name == "relu":
        return F.relu(x)
    if name == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def _activation_backward(name: str, grad: Tensor, x: Tensor) -> Tensor:
    """`grad` times the derivative at x, differentiable."""
    aten: Any = torch.ops.aten
    if name == "relu":
        return aten.threshold_backward(grad, x, 0)  # type: ignore[no-any-return]
    if name == "silu":
        gate = x.sigmoid()
        return grad * gate * (1 + x * (1 - gate))
    return aten.gelu_backward(grad, x, approximate="tanh" if name == "gelu_tanh" else "none")  # type: ignore[no-any-return]


def two_layers(x: Tensor, up: Weights, down: Weights, activation: str, out: torch.dtype) -> Tensor:
    """``f(x W^T + b) V^T + c`` in a dtype, with gradients.

    Parameters
    ----------
    x : (tokens, in_features), float32 or bfloat16
    up, down : Weights
        Of float32, for which `mlp.pays`.
    activation : str
    out : torch.dtype
    """
    tensors = x, up.values, down.values, up.bias, down.bias
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors):
        y: Tensor = TwoLayersFunction.apply(*tensors, up.topology, down.topology, activation, out)  # type: ignore[no-untyped-call]
        return y
    return mlp.product(x, up, down, activation, out, False)[0]


class TwoLayersFunction(torch.autograd.Function):
    """`two_layers` with its gradients, by x in the dtype of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up_values: Tensor, down_values: Tensor, up_bias: Tensor | None,
        down_bias: Tensor | None, up: TensorTopology, down: TensorTopology, activation: str, out: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """The output; what its gradients need is kept."""
        ctx.topologies, ctx.activation, ctx.dtypes = (up, down), activation, (x.dtype, out)
        layers = Weights(up, up_values, up_bias), Weights(down, down_values, down_bias)
        y, saved = mlp.product(x, *layers, activation, out, True)
        ctx.save_for_backward(x, up_values, down_values, up_bias, saved)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The gradients that are asked for."""
        (grad,), (x, up_values, down_values, up_bias, saved) = grads, ctx.saved_tensors
        up, down = ctx.topologies
        up.require_unchanged()
        down.require_unchanged()
        if (
            torch.is_grad_enabled()
            or up.is_watched
            or down.is_watched
            or not is_plain(grad, x, up_values, down_values, up_bias, saved)
        ):
            return *_by_rows(ctx, grad, x, up_values, down_values, up_bias), None, None, None, None
        _refuse_misfits(ctx, grad, x, saved)
        needs = ctx.needs_input_grad[:5]
        layers = Weights(up, up_values, up_bias), Weights(down, down_values, None)
        found = mlp.gradients(needs, grad, x, saved, *layers, ctx.activation)
        if needs[4] and not needs[2]:
            found = found._replace(down_bias=grad.sum(0, dtype=torch.float32))
        return *found, None, None, None, None


def _by_rows(
    ctx: Any, grad: Tensor, x: Tensor, up_values: Tensor, down_values: Tensor, up_bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The same by the operators, differentiable; hooks of the layers see what gradients are made of."""
    needs, (up, down) = ctx.needs_input_grad, ctx.topologies
    up_form, down_form = (
        shown_form(ctx, 1 + k, LinearForm(list(each.sizes), each.layout), *each.tensors)
        for k, each in enumerate((up, down))
    )
    rows, grad = x.float(), grad.float()
    h = transformed_product(rows, up_values, up_bias, up.tensors, up_form)
    operands = apply_activation(ctx.activation, h), down_values
    needs_h = any(needs[k] for k in (0, 1, 3))
    da, ddown, ddown_bias = product_gradients(
        (needs_h, needs[2], needs[4]), grad, operands, down.tensors, down_form
    )
    if da is None:
        return None, None, ddown, None, ddown_bias
    dh = _activation_backward(ctx.activation, da, h)
    dx, dup, dup_bias = product_gradients(
        (needs[0], needs[1], needs[3]), dh, (rows, up_values), up.tensors, up_form
    )
    return None if dx is None else dx.to(x.dtype), dup, ddown, dup_bias, ddown_bias


def _refuse_misfits(ctx: Any, grad: Tensor, x: Tensor, saved: Tensor) -> None:
    """Raise RuntimeError if hooks gave back other tensors than were saved, which no kernel would notice."""
    (up, down), (given, out) = ctx.topologies, ctx.dtypes
    width = -(-saved.numel() // max(up.shape[0], 1))
    fits = (
        grad.is_cpu and grad.dtype is out and grad.ndim == 2 and grad.shape[1] == down.shape[0]
        and x.is_cpu and x.dtype is given and x.shape == (len(grad), up.shape[1])
        and saved.is_cpu and saved.dtype is torch.float32 and saved.ndim == 1 and width >= len(grad)
    )  # fmt: skip
    if not fits:
        raise RuntimeError(
            "what was saved for a backward pass must come back as it was, got x of "
            f"{x.dtype} {tuple(x.shape)}, a hidden layer of {saved.dtype} {tuple(saved.shape)} and a "
            f"gradient of {grad.dtype} {tuple(grad.shape)}"
        )
