"""The product with the transpose of a layer's weight, as an operator of torch with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparselab.nn.ops.checks import refuse_mixed_devices, require_strided
from sparselab.nn.ops.linear import input_grad, linear_operator, linear_values_grad
from sparselab.nn.ops.topologies import find_topology
from sparselab.nn.ops.tracing import refuse_forward_mode


def linear_transposed(x: Tensor, values: Tensor, layer: Any) -> Tensor:
    """``x W`` with gradients: what the gradient of a layer's input is, as a product of its own.

    Parameters
    ----------
    x : (tokens, out_features), any strides
    values : (connections, block_out, block_in), the dtype of x
    layer : HasStorage
        Asked for its topology.

    Returns
    -------
    (tokens, in_features)
    """
    refuse_forward_mode(x, values)
    return _linear_transposed(x, values, *layer.storage.arguments(layer))  # type: ignore[no-any-return]


@torch.library.custom_op("sparselab::linear_transposed", mutates_args=())
def _linear_transposed(
    x: Tensor, values: Tensor, indptr: Tensor, indices: Tensor, sizes: list[int], layout: str
) -> Tensor:
    require_strided(x=x, values=values, indptr=indptr, indices=indices)
    return input_grad(find_topology(indptr, indices, sizes, layout), x, values)


@_linear_transposed.register_fake
def _(x: Tensor, values: Tensor, indptr: Tensor, indices: Tensor, sizes: list[int], layout: str) -> Tensor:
    refuse_mixed_devices(x=x, values=values, indptr=indptr, indices=indices)
    return x.new_empty((x.shape[0], sizes[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.sizes, ctx.layout = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, *topology = ctx.saved_tensors
    arguments = *topology, ctx.sizes, ctx.layout
    needs_x, needs_values, *_ = ctx.needs_input_grad
    dx = linear_operator(grad, values, None, *arguments) if needs_x else None
    # The rows of W go with x and its columns with the gradient, so that is what a gradient hook sees.
    dvalues = linear_values_grad(x, grad, *arguments, False)[0] if needs_values else None
    return dx, dvalues, None, None, None, None


_linear_transposed.register_autograd(_backward, setup_context=_setup_context)
