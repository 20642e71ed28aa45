"""The kernels of dense blocks as torch operators with gradients, as those of `functional`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparselab.nn._block_products import input_grad, product, values_grad
from sparselab.nn._plans import BlockPlans, BlockSizes, LayerPlans, find_block_plans
from sparselab.nn.factors import LinearFactors
from sparselab.nn.functional import calls_directly, check_fit, plain_gradient, refuse_forward_mode, watcher_of


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
    check_fit(x, values, bias, (found.matrix.nnz, *found.block_shape), out_features)
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
    """As `block_linear`; without torch's dispatcher where nobody would see it."""
    tensors = (x, values) if bias is None else (x, values, bias)
    arguments = x, values, bias, indptr, indices, out_features, plans.number
    y: Tensor
    if not torch.compiler.is_compiling():
        refuse_forward_mode(*tensors)
        run = calls_directly(tensors, _BlockLinear.apply, _block_linear)
        if run is not None:
            y = run(*arguments)
            return y
    y = block_linear(*arguments)
    return y


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, indptr, indices, _, ctx.plans = inputs
    needs_x, needs_values = ctx.needs_input_grad[:2]
    ctx.in_features, ctx.block_shape = x.shape[1], list(values.shape[1:])
    ctx.watcher = watcher_of(needs_values)
    ctx.save_for_backward(x if needs_values else None, values if needs_x else None, indptr, indices)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, indptr, indices = ctx.saved_tensors
    needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
    dx = dvalues = dbias = None
    if ctx.watcher is not None:
        ctx.watcher.backward_seen(LinearFactors(x.detach(), grad.detach()))
    direct = plain_gradient(grad, x, values)
    if needs_x:
        by_input = _input_grad if direct else block_linear_input_grad
        dx = by_input(grad, values, indptr, indices, ctx.in_features, ctx.plans)
    if needs_values:
        by_values = _values_grad if direct else block_linear_values_grad
        dvalues, sums = by_values(grad, x, indptr, indices, ctx.block_shape, ctx.plans, needs_bias)
        dbias = sums if needs_bias else None
    elif needs_bias:
        dbias = grad.sum(0)
    return dx, dvalues, dbias, None, None, None, None


class _BlockLinear(torch.autograd.Function):
    """`block_linear` with its gradients, known to autograd alone."""

    forward = staticmethod(_block_linear)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


block_linear.register_autograd(_backward, setup_context=_setup_context)
