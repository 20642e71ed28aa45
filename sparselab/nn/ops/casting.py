"""Linear layers under autocast in bfloat16, whose weights and sums stay in float32.

Tokens are read in the dtype they come in and results are rounded to bfloat16 where they are written, in
place of copies of both: half the memory traffic of a product is tokens. The numbers are those of the copies,
bit for bit, but that a NaN may have another sign and payload.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparselab.nn.ops.checks import refuse_misfits
from sparselab.nn.ops.derivatives import product_gradients
from sparselab.nn.ops.leaves import may_be_shown, shown_form
from sparselab.nn.ops.linear import LinearForm
from sparselab.nn.ops.operands import LinearOperands, is_of_graph
from sparselab.nn.ops.topologies import HasStorage, TensorTopology
from sparselab.nn.ops.tracing import is_plain

_TOKENS = (torch.float32, torch.bfloat16)


def casting_topology(x: Any, values: Tensor, bias: Tensor | None, layer: HasStorage) -> TensorTopology | None:
    """The layer's topology if `cast_linear` computes this.

    None if casts and products in float32 are to do it, or to say what is wrong.
    """
    if not (
        isinstance(x, Tensor)
        and is_plain(x, values, bias)
        and x.dtype in _TOKENS
        and values.dtype is torch.float32
        and (bias is None or bias.dtype is torch.float32)
    ):
        return None
    topology = layer.storage.topology(layer)
    fits = (
        getattr(topology.products, "CASTS_TOKENS", False)
        and x.ndim > 0
        and x.shape[-1] == topology.shape[1]
        and values.shape == topology.values_shape
        and (bias is None or bias.shape == topology.bias_shape)
    )
    return topology if fits else None


def cast_linear(x: Tensor, values: Tensor, bias: Tensor | None, topology: TensorTopology) -> Tensor:
    """``x W^T + b`` in bfloat16, with gradients.

    Parameters
    ----------
    x : (tokens, in_features), float32 or bfloat16
    values : (connections, block_out, block_in), float32
    bias : (out_features,), float32, or None
    topology : TensorTopology
        Of `casting_topology`, for these.
    """
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, values, bias)):
        y: Tensor = CastLinearFunction.apply(x, values, bias, topology)  # type: ignore[no-untyped-call]
        return y
    product: Tensor = topology.products.product(topology, values, x, bias, out=torch.bfloat16)
    return product


class CastLinearFunction(torch.autograd.Function):
    """`cast_linear` with its gradients: by x in the dtype of x, by values and bias in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, topology: TensorTopology) -> Tensor:
        """The product; what its gradients need is kept."""
        needs_x, needs_values, *_ = ctx.needs_input_grad
        ctx.topology, ctx.dtype = topology, x.dtype
        ctx.save_for_backward(x if needs_values else None, values if needs_x else None)
        y: Tensor = topology.products.product(topology, values, x, bias, out=torch.bfloat16)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The gradients that are asked for."""
        (grad,), (x, values), topology = grads, ctx.saved_tensors, ctx.topology
        topology.require_unchanged()
        needs_x, needs_values, needs_bias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() or not is_plain(grad, x, values):
            form = shown_form(ctx, 1, LinearForm(list(topology.sizes), topology.layout), *topology.tensors)
            operands = None if x is None else x.float(), values
            dx, dvalues, dbias = product_gradients(
                ctx.needs_input_grad, grad.float(), operands, topology.tensors, form
            )
            return None if dx is None else dx.to(ctx.dtype), dvalues, dbias, None
        _refuse_misfits(topology, grad, x, values, ctx.dtype)
        dx = topology.products.input_grad(topology, values, grad, out=ctx.dtype) if needs_x else None
        if not needs_values:
            return dx, None, grad.sum(0, dtype=torch.float32) if needs_bias else None, None
        if may_be_shown(ctx, 1, topology):
            # A copy is nobody else's to overwrite.
            of_graph = x.dtype is not torch.float32 or is_of_graph(x)
            topology.show(LinearOperands(x.detach().float(), grad.detach().float(), of_graph))
        dvalues, dbias = topology.products.values_grad(topology, grad, x, needs_bias, out=torch.float32)
        return dx, dvalues, dbias if needs_bias else None, None


def _refuse_misfits(
    topology: TensorTopology, grad: Tensor, x: Tensor | None, values: Tensor | None, dtype: torch.dtype
) -> None:
    """Raise RuntimeError if hooks gave back other operands than were saved, which no kernel would notice."""
    rows, columns = topology.shape
    if grad.dtype is not torch.bfloat16 or grad.ndim != 2 or grad.shape[1] != rows or not grad.is_cpu:
        refuse_misfits(topology.device, torch.bfloat16, grad=(grad, (None, rows)))
    n_tokens = len(grad)
    if x is not None and (x.dtype is not dtype or x.shape != (n_tokens, columns) or not x.is_cpu):
        refuse_misfits(topology.device, dtype, x=(x, (n_tokens, columns)))
    if values is not None and (
        values.dtype is not torch.float32 or values.shape != topology.values_shape or not values.is_cpu
    ):
        refuse_misfits(topology.device, torch.float32, values=(values, topology.values_shape))
