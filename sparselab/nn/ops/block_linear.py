"""The kernels of dense blocks as torch operators with gradients, as those of `functional`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparselab.nn.ops.cpu.block_products import input_grad, product, values_grad
from sparselab.nn.ops.cpu.plans import BlockPlans, BlockSizes, LayerPlans, find_block_plans
from sparselab.nn.ops.linear import call, check_fit, keep_operands, linear_gradients, plain_function


def _block_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    indptr: Tensor,
    indices: Tensor,
    out_features: int,
    plans: int,
) -> Tensor:
    """``y = x W^T + b`` for x (tokens, in_features) and W in compressed rows of blocks.

    Parameters
    ----------
    x : (tokens, in_features), any strides
    values : (blocks, block_out, block_in), the dtype of x
    bias : (out_features,) or None
    indptr : int64 (block rows + 1,)
    indices : uint16, int32 or int64 (blocks,)
    out_features : int
    plans : int
        Number of the `LayerPlans` to use; 0 for none.

    Raises
    ------
    RuntimeError
        If values or bias do not fit the topology or the dtype of x.
    TypeError, ValueError
        If the topology is not valid.
    """
    found = _find(plans, indptr, indices, out_features, x.shape[1], values.shape[1:])
    check_fit(x, values, bias, found.layout, out_features)
    return product(x, values, bias, found)


def _input_grad(
    grad: Tensor, values: Tensor, indptr: Tensor, indices: Tensor, in_features: int, plans: int
) -> Tensor:
    """``dx = dy W`` for dy (tokens, out_features), any strides."""
    found = _find(plans, indptr, indices, grad.shape[1], in_features, values.shape[1:])
    return input_grad(grad, values, found)


def _values_grad(
    grad: Tensor,
    x: Tensor,
    indptr: Tensor,
    indices: Tensor,
    block_shape: list[int],
    plans: int,
    with_bias: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of the blocks, and that of the bias, empty if it is not wanted."""
    found = _find(plans, indptr, indices, grad.shape[1], x.shape[1], block_shape)
    return values_grad(grad, x, found, with_bias)


def _find(
    plans: int, indptr: Tensor, indices: Tensor, out_features: int, in_features: int, block_shape: Any
) -> BlockPlans:
    sizes = BlockSizes((out_features, in_features), (block_shape[0], block_shape[1]))
    return find_block_plans(plans, indptr, indices, sizes)


block_linear = torch.library.custom_op(
    "sparselab::block_linear", _block_linear, mutates_args=(), device_types="cpu"
)
block_linear_input_grad = torch.library.custom_op(
    "sparselab::block_linear_input_grad", _input_grad, mutates_args=(), device_types="cpu"
)
block_linear_values_grad = torch.library.custom_op(
    "sparselab::block_linear_values_grad", _values_grad, mutates_args=(), device_types="cpu"
)


@block_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    indptr: Tensor,
    indices: Tensor,
    out_features: int,
    plans: int,
) -> Tensor:
    return x.new_empty((x.shape[0], out_features))


@block_linear_input_grad.register_fake
def _(grad: Tensor, values: Tensor, indptr: Tensor, indices: Tensor, in_features: int, plans: int) -> Tensor:
    return grad.new_empty((grad.shape[0], in_features))


@block_linear_values_grad.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    indptr: Tensor,
    indices: Tensor,
    block_shape: list[int],
    plans: int,
    with_bias: bool,
) -> tuple[Tensor, Tensor]:
    dvalues = grad.new_empty((indices.shape[0], *block_shape))
    return dvalues, grad.new_empty(grad.shape[1] if with_bias else 0)


def sparse_block_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    indptr: Tensor,
    indices: Tensor,
    out_features: int,
    plans: LayerPlans,
) -> Tensor:
    """As `block_linear`, by the shortest way; see `functional.call`."""
    return call(
        block_linear, _with_gradient, _block_linear, x, values, bias, indptr, indices, out_features,
        plans.number,
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, indptr, indices, _, ctx.plans = inputs
    ctx.in_features, ctx.block_shape = x.shape[1], list(values.shape[1:])
    keep_operands(ctx, x, values, indptr, indices)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    by_input = block_linear_input_grad, _input_grad
    by_values = block_linear_values_grad, _values_grad
    return *linear_gradients(ctx, grad, by_input, by_values, ctx.block_shape), None, None, None, None


_with_gradient = plain_function(_block_linear, _setup_context, _backward)
block_linear.register_autograd(_backward, setup_context=_setup_context)
