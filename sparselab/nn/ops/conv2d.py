"""Sparse convolutions as torch operators with gradients, as `functional` has them of linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparselab.nn.ops.conv_operands import ConvolutionFactors
from sparselab.nn.ops.cpu.convolution import ConvolutionPlans, Geometry, input_grad, product, values_grad
from sparselab.nn.ops.cpu.plans import LayerPlans, find_plans
from sparselab.nn.ops.linear import call, check_fit, keep_operands, plain_function, plain_gradient


def _conv2d(
    x: Tensor, values: Tensor, bias: Tensor | None, indptr: Tensor, indices: Tensor, plans: int,
    geometry: list[int],
) -> Tensor:  # fmt: skip
    """The convolution of x (n, in_channels, height, width), any strides, by W in compressed rows; contiguous.

    Parameters
    ----------
    x, values, bias, indptr, indices, plans
        As of `functional.linear`; rows of W are output channels.
    geometry : list of int
        Of `Geometry.numbers`.

    Raises
    ------
    RuntimeError
        If values or bias do not fit the topology or the dtype of x.
    TypeError, ValueError
        If the topology is not valid.
    """
    found = _plans_of(indptr, indices, plans, geometry)
    check_fit(x, values, bias, found.indices.shape, found.shape[0])
    return product(x, values, bias, found)


def _input_grad(
    grad: Tensor, values: Tensor, indptr: Tensor, indices: Tensor, plans: int, geometry: list[int],
    height: int, width: int,
) -> Tensor:  # fmt: skip
    return input_grad(grad, values, _plans_of(indptr, indices, plans, geometry), (height, width))


def _values_grad(
    grad: Tensor, x: Tensor, indptr: Tensor, indices: Tensor, plans: int, geometry: list[int]
) -> Tensor:
    return values_grad(grad, x, _plans_of(indptr, indices, plans, geometry))


def _plans_of(indptr: Tensor, indices: Tensor, plans: int, numbers: list[int]) -> ConvolutionPlans:
    geometry = Geometry.of(numbers)
    topology = find_plans(plans, indptr, indices, geometry.columns)
    found = topology.others.get(geometry)
    if found is None:
        found = topology.others[geometry] = ConvolutionPlans(topology, geometry)
    assert isinstance(found, ConvolutionPlans)
    return found


conv2d = torch.library.custom_op("sparselab::conv2d", _conv2d, mutates_args=(), device_types="cpu")
conv2d_input_grad = torch.library.custom_op(
    "sparselab::conv2d_input_grad", _input_grad, mutates_args=(), device_types="cpu"
)
conv2d_values_grad = torch.library.custom_op(
    "sparselab::conv2d_values_grad", _values_grad, mutates_args=(), device_types="cpu"
)


@conv2d.register_fake
def _(
    x: Tensor, values: Tensor, bias: Tensor | None, indptr: Tensor, indices: Tensor, plans: int,
    geometry: list[int],
) -> Tensor:  # fmt: skip
    rows, columns = Geometry.of(geometry).outputs((x.shape[2], x.shape[3]))
    return x.new_empty((x.shape[0], indptr.shape[0] - 1, rows, columns))


@conv2d_input_grad.register_fake
def _(
    grad: Tensor, values: Tensor, indptr: Tensor, indices: Tensor, plans: int, geometry: list[int],
    height: int, width: int,
) -> Tensor:  # fmt: skip
    return grad.new_empty((grad.shape[0], Geometry.of(geometry).in_channels, height, width))


@conv2d_values_grad.register_fake
def _(grad: Tensor, x: Tensor, indptr: Tensor, indices: Tensor, plans: int, geometry: list[int]) -> Tensor:
    return grad.new_empty(indices.shape[0])


def sparse_conv2d(
    x: Tensor, values: Tensor, bias: Tensor | None, indptr: Tensor, indices: Tensor, plans: LayerPlans,
    geometry: Geometry,
) -> Tensor:  # fmt: skip
    """As `conv2d`, by the shortest way; see `functional.call`."""
    return call(
        conv2d, _with_gradient, _conv2d, x, values, bias, indptr, indices, plans.number, geometry.numbers
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, indptr, indices, ctx.plans, ctx.geometry = inputs
    ctx.size = x.shape[2], x.shape[3]
    keep_operands(ctx, x, values, indptr, indices)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, indptr, indices = ctx.saved_tensors
    needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
    dx = dvalues = None
    if ctx.watcher is not None:
        geometry = Geometry.of(ctx.geometry)
        ctx.watcher.backward_seen(ConvolutionFactors(x.detach(), grad.detach(), geometry))
    direct = plain_gradient(grad, x, values)
    if needs_x:
        by_input = _input_grad if direct else conv2d_input_grad
        dx = by_input(grad, values, indptr, indices, ctx.plans, ctx.geometry, *ctx.size)
    if needs_values:
        by_values = _values_grad if direct else conv2d_values_grad
        dvalues = by_values(grad, x, indptr, indices, ctx.plans, ctx.geometry)
    dbias = grad.sum((0, 2, 3)) if needs_bias else None
    return dx, dvalues, dbias, None, None, None, None


_with_gradient = plain_function(_conv2d, _setup_context, _backward)
conv2d.register_autograd(_backward, setup_context=_setup_context)
