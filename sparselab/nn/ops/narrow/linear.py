"""The product of a linear layer whose weights are narrow, as a torch operator with a gradient by the tokens.

``sparselab::narrow_linear`` takes tokens in float32 or bfloat16 and sums in float32. Weights are not trained:
they get no gradient. That of the tokens is the one by the weights that the narrow ones stand for, which exist
in float32 for as long as it takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparselab.nn.ops.checks import refuse_mixed_devices, require_strided
from sparselab.nn.ops.contract import Narrow
from sparselab.nn.ops.derivatives import input_grad as transformed_input_grad
from sparselab.nn.ops.derivatives import product as transformed_product
from sparselab.nn.ops.linear import LinearForm, input_grad, linear, linear_input_grad
from sparselab.nn.ops.narrow.weights import (
    fits,
    refuse_misfits,
    widen,
    widened,
    word,
)
from sparselab.nn.ops.topologies import HasStorage, TensorTopology, find_topology
from sparselab.nn.ops.tracing import is_plain, is_transformed

#: What tokens may be of, and are read in.
TOKENS = torch.float32, torch.bfloat16


def product(
    topology: TensorTopology, x: Tensor, narrow: Narrow, bias: Tensor | None, out: torch.dtype
) -> Tensor:
    """``y = x W^T + b``, with sums in float32.

    Parameters
    ----------
    topology : TensorTopology
    x : (tokens, in_features), float32 or bfloat16, any strides
    narrow : Narrow
    bias : (out_features,), float32, or None
    out : torch.dtype
        Of what is returned.

    Raises
    ------
    RuntimeError, TypeError
        If an operand does not fit.
    """
    if not (
        fits(narrow, topology)
        and x.dtype in TOKENS
        and len(x.shape) == 2
        and x.shape[1] == topology.shape[1]
        and (bias is None or (bias.dtype is torch.float32 and bias.shape == topology.bias_shape))
        and (x.is_cpu if topology.is_cpu else x.device == topology.device)
        and (bias is None or bias.device == x.device)
    ):
        dtype = x.dtype if x.dtype in TOKENS else torch.float32
        refuse_misfits(
            narrow, topology, x=(x, dtype, (None, topology.shape[1])),
            bias=(bias, torch.float32, topology.bias_shape),
        )  # fmt: skip
    if out not in TOKENS:
        return product(topology, x, narrow, bias, torch.float32).to(out)
    by_narrow = getattr(topology.products, "narrow_product", None)
    if by_narrow is not None:
        y: Tensor = by_narrow(topology, narrow, x, bias, None, out)
        return y
    y = topology.products.product(topology, widen(narrow, topology), x.float(), bias)
    return y.to(out)


def narrow_linear(
    x: Tensor, narrow: Narrow, bias: Tensor | None, layer: HasStorage, out: torch.dtype
) -> Tensor:
    """``y = x W^T + b`` with gradients by x and b, by the shortest way.

    Parameters
    ----------
    x : (tokens, in_features), any strides, or sparse
    narrow : Narrow
    bias : (out_features,) or None
    layer : HasStorage
        Asked for its topology.
    out : torch.dtype
        Of what is returned.

    Raises
    ------
    RuntimeError
        If a gradient by the weights is asked for.
    """
    values, scales = narrow
    if values.requires_grad or (scales is not None and scales.requires_grad):
        raise RuntimeError(
            f"weights frozen in {word(values.dtype)} must not require a gradient, got some that do; "
            "layer.freeze(weights=torch.float32) makes a Parameter of them again, which can be trained"
        )
    x = x if x.dtype in TOKENS else x.float()
    bias = bias if bias is None or bias.dtype is torch.float32 else bias.float()
    if not is_plain(x, values, scales, bias):
        return _unusual(x, narrow, bias, layer, out)
    topology = layer.storage.topology(layer)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = NarrowLinearFunction.apply(x, values, scales, bias, topology, out)  # type: ignore[no-untyped-call]
        return y
    return product(topology, x, narrow, bias, out)


def _unusual(x: Tensor, narrow: Narrow, bias: Tensor | None, layer: HasStorage, out: torch.dtype) -> Tensor:
    """The product of sparse tokens, and where torch traces or transforms."""
    indptr, indices, sizes, layout = layer.storage.arguments(layer)
    if x.layout is not torch.strided and not x.is_nested:
        return linear(x.float(), widened(narrow, indptr, sizes), bias, layer).to(out)
    if is_transformed():
        wide, form = widened(narrow, indptr, sizes), LinearForm(sizes, layout)
        return transformed_product(x.float(), wide, bias, (indptr, indices), form).to(out)
    y: Tensor = narrow_operator(x, *narrow, bias, indptr, indices, sizes, layout, out)
    return y


class NarrowLinearFunction(torch.autograd.Function):
    """`product` with its gradients by x, in the dtype of x, and by the bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, scales: Tensor | None, bias: Tensor | None,
        topology: TensorTopology, out: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """The product; of the tokens nothing is kept."""
        ctx.topology, ctx.dtype = topology, x.dtype
        ctx.save_for_backward(*((values, scales) if ctx.needs_input_grad[0] else (None, None)))
        return product(topology, x, Narrow(values, scales), bias, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The gradients that are asked for."""
        grad, dx = grads[0].float(), None
        dbias = grad.sum(0) if ctx.needs_input_grad[3] else None
        if ctx.needs_input_grad[0]:
            topology, narrow = ctx.topology, Narrow(*ctx.saved_tensors)
            topology.require_unchanged()
            if torch.is_grad_enabled() or not is_plain(grad, *narrow):
                form = LinearForm(list(topology.sizes), topology.layout)
                wide = widened(narrow, topology.tensors[0], topology.sizes)
                dx = transformed_input_grad(grad, wide, topology.tensors, form)
            else:
                dx = input_grad(topology, grad, widen(narrow, topology))
            dx = dx.to(ctx.dtype)
        return dx, None, None, dbias, None, None


@torch.library.custom_op("sparselab::narrow_linear", mutates_args=())
def narrow_operator(
    x: Tensor, values: Tensor, scales: Tensor | None, bias: Tensor | None, indptr: Tensor, indices: Tensor,
    sizes: list[int], layout: str, out: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `product`."""
    require_strided(x=x, values=values, scales=scales, bias=bias, indptr=indptr, indices=indices)
    return product(find_topology(indptr, indices, sizes, layout), x, Narrow(values, scales), bias, out)


@narrow_operator.register_fake
def _(
    x: Tensor, values: Tensor, scales: Tensor | None, bias: Tensor | None, indptr: Tensor, indices: Tensor,
    sizes: list[int], layout: str, out: torch.dtype,
) -> Tensor:  # fmt: skip
    refuse_mixed_devices(x=x, values=values, scales=scales, bias=bias, indptr=indptr, indices=indices)
    return x.new_empty((x.shape[0], sizes[0]), dtype=out)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, scales, _, indptr, indices, ctx.sizes, ctx.layout, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(values, scales, indptr, indices)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    values, scales, indptr, indices = ctx.saved_tensors
    grad, dx = grad.float(), None
    if ctx.needs_input_grad[0]:
        wide = widened(Narrow(values, scales), indptr, ctx.sizes)
        dx = linear_input_grad(grad, wide, indptr, indices, ctx.sizes, ctx.layout).to(ctx.dtype)
    return dx, None, None, grad.sum(0) if ctx.needs_input_grad[3] else None, *[None] * 5


narrow_operator.register_autograd(_backward, setup_context=_setup_context)
