"""Sparse convolutions as torch operators with gradients, as `linear` has them of linear layers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from sparselab.nn.ops.checks import (
    DTYPES,
    in_float32,
    refuse_misfits,
    refuse_mixed_devices,
    require_strided,
)
from sparselab.nn.ops.conv.geometry import Geometry, Pair
from sparselab.nn.ops.conv.operands import ConvolutionOperands
from sparselab.nn.ops.derivatives import Bilinear, product_gradients, register_derivatives
from sparselab.nn.ops.derivatives import input_grad as transformed_input_grad
from sparselab.nn.ops.derivatives import product as transformed_product
from sparselab.nn.ops.leaves import may_be_shown, shown_form
from sparselab.nn.ops.operands import is_of_graph
from sparselab.nn.ops.products import find_products
from sparselab.nn.ops.topologies import HasStorage, TensorTopology, find_topology
from sparselab.nn.ops.tracing import is_plain, is_transformed


def product(
    topology: TensorTopology, x: Tensor, values: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """The convolution of images by W, in channels_last if the images are.

    Parameters
    ----------
    topology : TensorTopology
        Its rows are output channels.
    x : (n, in_channels, height, width), any strides
    values : (nnz, 1, 1), the dtype of x
    bias : (out_channels,), the dtype of x, or None
    geometry : Geometry

    Returns
    -------
    (n, out_channels, rows, columns)

    Raises
    ------
    RuntimeError, TypeError, ValueError
        If an operand does not fit.
    """
    outputs = _outputs(topology, geometry, x)
    dtype, values_shape = x.dtype, topology.values_shape
    if (
        dtype not in DTYPES
        or x.shape[1] != geometry.in_channels
        or values.shape != values_shape
        or values.dtype is not dtype
        or not (bias is None or (bias.dtype is dtype and bias.shape == topology.shape[:1]))
        or not (x.device == values.device == topology.device)
    ):
        if wide := in_float32(x, values, bias):
            return product(topology, wide[0], wide[1], wide[2], geometry).to(dtype)
        refuse_misfits(
            topology.device, dtype, x=(x, (None, geometry.in_channels, *x.shape[2:])),
            values=(values, values_shape), bias=(bias, topology.shape[:1]),
        )  # fmt: skip
    if min(outputs) < 1:
        raise RuntimeError(f"x must be as large as the kernel, {geometry.kernel}, got {tuple(x.shape)}")
    return _products(topology).product(topology, values, x, bias, geometry)  # type: ignore[no-any-return]


def input_grad(
    topology: TensorTopology, grad: Tensor, values: Tensor, geometry: Geometry, size: Pair
) -> Tensor:
    """The gradient by images of that size.

    Parameters
    ----------
    topology : TensorTopology
    grad : (n, out_channels, rows, columns), any strides
    values : (nnz, 1, 1), the dtype of grad
    geometry : Geometry
    size : (int, int)

    Raises
    ------
    RuntimeError, TypeError, ValueError
        If an operand does not fit.
    """
    _check_geometry(topology, geometry)
    shape = topology.shape[0], *_positive(geometry, size)
    dtype = grad.dtype
    if (
        dtype not in DTYPES
        or grad.shape[1:] != shape
        or values.shape != topology.values_shape
        or values.dtype is not dtype
        or not (grad.device == values.device == topology.device)
    ):
        if wide := in_float32(grad, values):
            return input_grad(topology, wide[0], wide[1], geometry, size).to(dtype)
        refuse_misfits(
            topology.device, dtype, grad=(grad, (None, *shape)), values=(values, topology.values_shape)
        )
    return _products(topology).input_grad(topology, values, grad, geometry, size)  # type: ignore[no-any-return]


def values_grad(
    topology: TensorTopology, grad: Tensor, x: Tensor, geometry: Geometry, is_shown: bool = True
) -> Tensor:
    """The gradient by the values, (nnz, 1, 1); the layer's gradient hook sees the operands first.

    Parameters
    ----------
    topology : TensorTopology
    grad : (n, out_channels, rows, columns), any strides
    x : (n, in_channels, height, width), any strides, the dtype of grad
    geometry : Geometry
    is_shown : bool
        As of `sparselab.nn.ops.linear.values_grad`.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        If an operand does not fit.
    """
    outputs = _outputs(topology, geometry, x)
    shape = x.shape[0], topology.shape[0], *outputs
    dtype = grad.dtype
    if (
        dtype not in DTYPES
        or grad.shape != shape
        or x.shape[1] != geometry.in_channels
        or x.dtype is not dtype
        or not (grad.device == x.device == topology.device)
    ):
        if wide := in_float32(grad, x):
            return values_grad(topology, wide[0], wide[1], geometry, is_shown).to(dtype)
        refuse_misfits(
            topology.device, dtype, grad=(grad, shape), x=(x, (None, geometry.in_channels, *x.shape[2:]))
        )
    if is_shown and topology.is_watched:
        topology.show(ConvolutionOperands(x.detach(), grad.detach(), geometry, is_of_graph(x)))
    return _products(topology).values_grad(topology, grad, x, geometry)  # type: ignore[no-any-return]


def _check_geometry(topology: TensorTopology, geometry: Geometry) -> None:
    rows, columns = topology.shape
    if columns != geometry.columns or rows % geometry.groups:
        raise ValueError(
            f"geometry must have {columns} columns and groups that divide {rows} outputs, as the topology, "
            f"got {geometry.columns} and {geometry.groups}"
        )


def _outputs(topology: TensorTopology, geometry: Geometry, x: Tensor) -> Pair:
    _check_geometry(topology, geometry)
    if x.ndim != 4:
        raise RuntimeError(f"x must have shape (n, in_channels, height, width), got {tuple(x.shape)}")
    return geometry.outputs((x.shape[2], x.shape[3]))


def _positive(geometry: Geometry, size: Pair) -> Pair:
    outputs = geometry.outputs(size)
    if min(*size, *outputs) < 1:
        raise RuntimeError(f"size must be that of images with outputs, got {size}")
    return outputs


def _products(topology: TensorTopology) -> Any:
    return find_products("conv2d", topology.layout, topology.device.type)


def conv2d(x: Tensor, values: Tensor, bias: Tensor | None, layer: HasStorage, geometry: Geometry) -> Tensor:
    """The convolution of images by W with gradients, by the shortest way.

    Parameters
    ----------
    x : (n, in_channels, height, width), any strides
    values : (nnz, 1, 1), the dtype of x
    bias : (out_channels,) or None
    layer : HasStorage
        Asked for its topology.
    geometry : Geometry
    """
    if not is_plain(x, values, bias):
        indptr, indices, sizes, layout = layer.storage.arguments(layer)
        if is_transformed():
            form = ConvolutionForm(sizes, layout, geometry.numbers, (x.shape[2], x.shape[3]))
            return transformed_product(x, values, bias, (indptr, indices), form)
        return conv2d_operator(x, values, bias, indptr, indices, sizes, layout, geometry.numbers)  # type: ignore[no-any-return]
    topology = layer.storage.topology(layer)
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, values, bias)):
        y: Tensor = SparseConv2dFunction.apply(x, values, bias, topology, geometry)  # type: ignore[no-untyped-call]
        return y
    return product(topology, x, values, bias, geometry)


def conv2d_transposed(x: Tensor, values: Tensor, layer: HasStorage, geometry: Geometry, size: Pair) -> Tensor:
    """What the gradient of a convolution's input is, as a product of its own: the transposed convolution.

    Parameters
    ----------
    x : (n, out_channels, rows, columns), any strides
    values : (nnz, 1, 1), the dtype of x
    layer : HasStorage
        Asked for its topology.
    geometry : Geometry
        Of the convolution.
    size : (int, int)
        Of the result.

    Returns
    -------
    (n, in_channels, *size)
    """
    if is_plain(x, values):
        topology = layer.storage.topology(layer)
        if not (torch.is_grad_enabled() and (x.requires_grad or values.requires_grad)):
            return input_grad(topology, x, values, geometry, size)
    indptr, indices, sizes, layout = layer.storage.arguments(layer)
    if is_transformed():
        form = ConvolutionForm(sizes, layout, geometry.numbers, size)
        return transformed_input_grad(x, values, (indptr, indices), form)
    return conv2d_input_grad(  # type: ignore[no-any-return]
        x, values, indptr, indices, sizes, layout, geometry.numbers, *size
    )


class SparseConv2dFunction(torch.autograd.Function):
    """`product` with its gradients, where autograd alone would see the operator."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, topology: TensorTopology, geometry: Geometry
    ) -> Tensor:
        """The convolution; what its gradients need is kept."""
        needs_x, needs_values, *_ = ctx.needs_input_grad
        ctx.topology, ctx.geometry, ctx.size = topology, geometry, (x.shape[2], x.shape[3])
        ctx.save_for_backward(x if needs_values else None, values if needs_x else None)
        return product(topology, x, values, bias, geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The gradients that are asked for."""
        (grad,), (x, values) = grads, ctx.saved_tensors
        topology, geometry, size = ctx.topology, ctx.geometry, ctx.size
        topology.require_unchanged()
        if torch.is_grad_enabled() or not is_plain(grad, x, values):
            form: Any = ConvolutionForm(list(topology.sizes), topology.layout, geometry.numbers, size)
            form = shown_form(ctx, 1, form, *topology.tensors)
            needs = ctx.needs_input_grad
            return *product_gradients(needs, grad, (x, values), topology.tensors, form), None, None
        needs_x, needs_values, needs_bias, *_ = ctx.needs_input_grad
        dx = input_grad(topology, grad, values, geometry, size) if needs_x else None
        dvalues = (
            values_grad(topology, grad, x, geometry, may_be_shown(ctx, 1, topology)) if needs_values else None
        )
        return dx, dvalues, grad.sum((0, 2, 3)) if needs_bias else None, None, None


@torch.library.custom_op("sparselab::conv2d", mutates_args=())
def conv2d_operator(
    x: Tensor, values: Tensor, bias: Tensor | None, indptr: Tensor, indices: Tensor, sizes: list[int],
    layout: str, geometry: list[int],
) -> Tensor:  # fmt: skip
    """See `product`; the geometry as `Geometry.numbers`."""
    require_strided(x=x, values=values, bias=bias, indptr=indptr, indices=indices)
    topology = find_topology(indptr, indices, sizes, layout)
    return product(topology, x, values, bias, Geometry.of(geometry)).contiguous()


@torch.library.custom_op("sparselab::conv2d_input_grad", mutates_args=())
def conv2d_input_grad(
    grad: Tensor, values: Tensor, indptr: Tensor, indices: Tensor, sizes: list[int], layout: str,
    geometry: list[int], height: int, width: int,
) -> Tensor:  # fmt: skip
    """See `input_grad`."""
    require_strided(grad=grad, values=values, indptr=indptr, indices=indices)
    topology = find_topology(indptr, indices, sizes, layout)
    return input_grad(topology, grad, values, Geometry.of(geometry), (height, width)).contiguous()


@torch.library.custom_op("sparselab::conv2d_values_grad", mutates_args=())
def conv2d_values_grad(
    grad: Tensor, x: Tensor, indptr: Tensor, indices: Tensor, sizes: list[int], layout: str,
    geometry: list[int], is_shown: bool = True,
) -> Tensor:  # fmt: skip
    """See `values_grad`."""
    require_strided(grad=grad, x=x, indptr=indptr, indices=indices)
    topology = find_topology(indptr, indices, sizes, layout)
    how = Geometry.of(geometry)
    dvalues = values_grad(topology, grad, x, how, False)
    if is_shown and topology.is_watched:
        topology.show_lent(ConvolutionOperands(x.detach(), grad.detach(), how))
    return dvalues


@conv2d_operator.register_fake
def _(
    x: Tensor, values: Tensor, bias: Tensor | None, indptr: Tensor, indices: Tensor, sizes: list[int],
    layout: str, geometry: list[int],
) -> Tensor:  # fmt: skip
    refuse_mixed_devices(x=x, values=values, bias=bias, indptr=indptr, indices=indices)
    rows, columns = Geometry.of(geometry).outputs((x.shape[2], x.shape[3]))
    return x.new_empty((x.shape[0], sizes[0], rows, columns))


@conv2d_input_grad.register_fake
def _(
    grad: Tensor, values: Tensor, indptr: Tensor, indices: Tensor, sizes: list[int], layout: str,
    geometry: list[int], height: int, width: int,
) -> Tensor:  # fmt: skip
    refuse_mixed_devices(grad=grad, values=values, indptr=indptr, indices=indices)
    return grad.new_empty((grad.shape[0], Geometry.of(geometry).in_channels, height, width))


@conv2d_values_grad.register_fake
def _(
    grad: Tensor, x: Tensor, indptr: Tensor, indices: Tensor, sizes: list[int], layout: str,
    geometry: list[int], is_shown: bool = True,
) -> Tensor:  # fmt: skip
    refuse_mixed_devices(grad=grad, x=x, indptr=indptr, indices=indices)
    return grad.new_empty((indices.shape[0], 1, 1))


class ConvolutionForm:
    """The products of convolutions, as derivatives want them.

    Parameters
    ----------
    sizes, layout, geometry
        As the operators take them.
    size : (int, int)
        Height and width of the images.
    is_shown : bool
        As of `sparselab.nn.ops.linear.LinearForm`.
    """

    def __init__(
        self, sizes: list[int], layout: str, geometry: list[int], size: Pair, is_shown: bool = True
    ) -> None:
        self.rest, self.size, self.is_shown = (sizes, layout, geometry), size, is_shown

    def product(
        self, x: Tensor, values: Tensor, bias: Tensor | None, indptr: Tensor, indices: Tensor
    ) -> Tensor:
        """See `product`."""
        return conv2d_operator(x, values, bias, indptr, indices, *self.rest)  # type: ignore[no-any-return]

    def input_grad(self, grad: Tensor, values: Tensor, indptr: Tensor, indices: Tensor) -> Tensor:
        """See `input_grad`."""
        return conv2d_input_grad(grad, values, indptr, indices, *self.rest, *self.size)  # type: ignore[no-any-return]

    def values_grad(
        self, grad: Tensor, x: Tensor, indptr: Tensor, indices: Tensor, with_bias: bool
    ) -> tuple[Tensor, Tensor]:
        """See `values_grad`."""
        dvalues = conv2d_values_grad(grad, x, indptr, indices, *self.rest, self.is_shown)
        return dvalues, grad.sum((0, 2, 3)) if with_bias else grad.new_empty(0)

    def is_trained(self, leaf: Tensor, indptr: Tensor, indices: Tensor) -> bool:
        """Whether gradients by a leaf are those of a layer's Parameter."""
        return find_topology(indptr, indices, *self.rest[:2]).is_trained(leaf)

    def hidden(self) -> Bilinear:
        """The same for something in place of the layer's values."""
        return ConvolutionForm(*self.rest, self.size, False)


def _form(images: Tensor | None, sizes: list[int], layout: str, geometry: list[int], *rest: Any) -> Bilinear:
    size = rest if images is None else (images.shape[2], images.shape[3])
    return ConvolutionForm(sizes, layout, geometry, cast(Pair, size))


register_derivatives(conv2d_operator, conv2d_input_grad, conv2d_values_grad, _form)
