"""The products of linear layers, of any layout, as torch operators with gradients.

``sparselab::linear`` has two gradients, ``sparselab::linear_input_grad`` and
``sparselab::linear_values_grad``, and all three are differentiable (`sparselab.nn.ops.derivatives`). They are
opaque to torch: `torch.compile` puts them into its graph as they are. They take the two tensors of a topology
(``indptr`` and ``indices``), its ``sizes`` (outputs and inputs of the layer and of a block) and the name of
its layout, and check every operand before a kernel sees it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparselab.nn.ops.checks import (
    DTYPES,
    in_float32,
    refuse_misfits,
    refuse_mixed_devices,
    require_strided,
)
from sparselab.nn.ops.derivatives import Bilinear, product_gradients, register_derivatives
from sparselab.nn.ops.derivatives import input_grad as transformed_input_grad
from sparselab.nn.ops.derivatives import product as transformed_product
from sparselab.nn.ops.inputs.product import product_of_sparse
from sparselab.nn.ops.inputs.tokens import check_sparse
from sparselab.nn.ops.leaves import may_be_shown, shown_form
from sparselab.nn.ops.operands import LinearOperands, is_of_graph
from sparselab.nn.ops.topologies import HasStorage, TensorTopology, find_topology
from sparselab.nn.ops.tracing import is_plain, is_transformed


def product(topology: TensorTopology, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """``y = x W^T + b``.

    Parameters
    ----------
    topology : TensorTopology
    x : (tokens, in_features), any strides
    values : (connections, block_out, block_in), the dtype of x
    bias : (out_features,), the dtype of x, or None

    Returns
    -------
    (tokens, out_features)

    Raises
    ------
    RuntimeError, TypeError
        If an operand does not fit.
    """
    dtype, shape, (rows, columns) = x.dtype, x.shape, topology.shape
    if (
        len(shape) != 2
        or shape[1] != columns
        or values.shape != topology.values_shape
        or values.dtype is not dtype
        or dtype not in DTYPES
        or not (bias is None or (bias.dtype is dtype and bias.shape == topology.bias_shape))
        or not (
            x.is_cpu and values.is_cpu if topology.is_cpu else x.device == values.device == topology.device
        )
    ):
        if wide := in_float32(x, values, bias):
            return product(topology, *wide).to(dtype)
        refuse_misfits(
            topology.device, dtype, x=(x, (None, columns)), values=(values, topology.values_shape),
            bias=(bias, (rows,)),
        )  # fmt: skip
    y: Tensor = topology.products.product(topology, values, x, bias)
    return y


def input_grad(topology: TensorTopology, grad: Tensor, values: Tensor) -> Tensor:
    """``dx = dy W``.

    Parameters
    ----------
    topology : TensorTopology
    grad : (tokens, out_features), any strides
    values : (connections, block_out, block_in), the dtype of grad

    Raises
    ------
    RuntimeError, TypeError
        If an operand does not fit.
    """
    dtype, shape = grad.dtype, grad.shape
    if (
        len(shape) != 2
        or shape[1] != topology.shape[0]
        or values.shape != topology.values_shape
        or values.dtype is not dtype
        or dtype not in DTYPES
        or not (
            grad.is_cpu and values.is_cpu
            if topology.is_cpu
            else grad.device == values.device == topology.device
        )
    ):
        if wide := in_float32(grad, values):
            return input_grad(topology, *wide).to(dtype)
        refuse_misfits(
            topology.device, dtype, grad=(grad, (None, topology.shape[0])),
            values=(values, topology.values_shape),
        )  # fmt: skip
    dx: Tensor = topology.products.input_grad(topology, values, grad)
    return dx


def values_grad(
    topology: TensorTopology, grad: Tensor, x: Tensor, with_bias: bool, is_shown: bool = True
) -> tuple[Tensor, Tensor]:
    """``dW[slot] = sum_t dy[t, i] x[t, j]`` for each weight (i, j), and the bias' gradient.

    The latter, ``sum_t dy[t]``, costs little here, where dy is read anyway; empty if it is not wanted. The
    layer's gradient hook sees the operands first.

    Parameters
    ----------
    topology : TensorTopology
    grad : (tokens, out_features), any strides
    x : (tokens, in_features), any strides, the dtype of grad
    with_bias : bool
    is_shown : bool
        Whether the hook is to see them: not if it is a gradient by something in place of the layer's values.

    Raises
    ------
    RuntimeError, TypeError
        If an operand does not fit.
    """
    dtype, shape, other = grad.dtype, grad.shape, x.shape
    if (
        len(shape) != 2
        or len(other) != 2
        or shape[0] != other[0]
        or (shape[1], other[1]) != topology.shape
        or x.dtype is not dtype
        or dtype not in DTYPES
        or not (grad.is_cpu and x.is_cpu if topology.is_cpu else grad.device == x.device == topology.device)
    ):
        if wide := in_float32(grad, x):
            dvalues, dbias = values_grad(topology, wide[0], wide[1], with_bias, is_shown)
            return dvalues.to(dtype), dbias.to(dtype)
        rows, columns = topology.shape
        refuse_misfits(
            topology.device, dtype, grad=(grad, (None, rows)), x=(x, (shape[0] if shape else 0, columns))
        )
    if is_shown and topology.is_watched:
        topology.show(LinearOperands(x.detach(), grad.detach(), is_of_graph(x)))
    both: tuple[Tensor, Tensor] = topology.products.values_grad(topology, grad, x, with_bias)
    return both


def gradients(
    topology: TensorTopology, grad: Tensor, x: Tensor | None, values: Tensor | None, with_bias: bool,
    is_shown: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:  # fmt: skip
    """What `input_grad` and `values_grad` return, in one call, where both can be had so and operands fit.

    Parameters
    ----------
    topology : TensorTopology
    grad : (tokens, out_features)
    x : (tokens, in_features), or None
        If the gradient by the values is wanted.
    values : (connections, block_out, block_in), or None
        If that by x is.
    with_bias : bool
        Whether that by the bias is.
    is_shown : bool
        Whether the hook is to see the operands.

    Returns
    -------
    tuple of tensor or None, or None
        By x, the values and the bias; None if they must be asked for one by one.
    """
    shape, (rows, columns) = grad.shape, topology.shape
    if len(shape) != 2 or shape[1] != rows or not grad.is_cpu:
        return None
    if values is not None and (values.shape != topology.values_shape or not values.is_cpu):
        return None
    if x is not None and (x.shape != (shape[0], columns) or not x.is_cpu):
        return None
    found: Any = topology.gradients(topology, values, grad, x, with_bias)
    if found is not None and is_shown and x is not None:
        topology.show(LinearOperands(x.detach(), grad.detach(), is_of_graph(x)))
    return found  # type: ignore[no-any-return]


def linear(x: Tensor, values: Tensor, bias: Tensor | None, layer: HasStorage) -> Tensor:
    """``y = x W^T + b`` with gradients, by the shortest way.

    Parameters
    ----------
    x : (tokens, in_features), any strides
    values : (connections, block_out, block_in), the dtype of x
    bias : (out_features,) or None
    layer : HasStorage
        Asked for its topology.
    """
    if not is_plain(x, values, bias):
        if x.layout is not torch.strided and not x.is_nested:
            check_sparse(x)
            return product_of_sparse(x, values, bias, layer)
        indptr, indices, sizes, layout = layer.storage.arguments(layer)
        if is_transformed():
            return transformed_product(x, values, bias, (indptr, indices), LinearForm(sizes, layout))
        return linear_operator(x, values, bias, indptr, indices, sizes, layout)  # type: ignore[no-any-return]
    topology = layer.storage.topology(layer)
    if torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y: Tensor = SparseLinearFunction.apply(x, values, bias, topology)  # type: ignore[no-untyped-call]
        return y
    return product(topology, x, values, bias)


def linear_transposed(x: Tensor, values: Tensor, layer: HasStorage) -> Tensor:
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
    indptr, indices, sizes, layout = layer.storage.arguments(layer)
    if is_transformed():
        return transformed_input_grad(x, values, (indptr, indices), LinearForm(sizes, layout))
    return linear_input_grad(x, values, indptr, indices, sizes, layout)  # type: ignore[no-any-return]


class SparseLinearFunction(torch.autograd.Function):
    """`product` with its gradients, where autograd alone would see the operator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, topology: TensorTopology) -> Tensor:
        """The product; what its gradients need is kept."""
        needs_x, needs_values, *_ = ctx.needs_input_grad
        ctx.topology = topology
        ctx.save_for_backward(x if needs_values else None, values if needs_x else None)
        return product(topology, x, values, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The gradients that are asked for."""
        (grad,), (x, values), topology = grads, ctx.saved_tensors, ctx.topology
        topology.require_unchanged()
        if torch.is_grad_enabled() or not is_plain(grad, x, values):
            form = shown_form(ctx, 1, LinearForm(list(topology.sizes), topology.layout), *topology.tensors)
            needs = ctx.needs_input_grad
            return *product_gradients(needs, grad, (x, values), topology.tensors, form), None
        needs_x, needs_values, needs_bias, _ = ctx.needs_input_grad
        if topology.gradients is not None and (needs_x or needs_values) and (needs_values or not needs_bias):
            both = gradients(
                topology, grad, x, values, needs_bias, needs_values and may_be_shown(ctx, 1, topology)
            )
            if both is not None:
                return *both, None
        dx = input_grad(topology, grad, values) if needs_x else None
        if needs_values:
            dvalues, dbias = values_grad(topology, grad, x, needs_bias, may_be_shown(ctx, 1, topology))
            return dx, dvalues, dbias if needs_bias else None, None
        return dx, None, grad.sum(0) if needs_bias else None, None


@torch.library.custom_op("sparselab::linear", mutates_args=())
def linear_operator(
    x: Tensor, values: Tensor, bias: Tensor | None, indptr: Tensor, indices: Tensor, sizes: list[int],
    layout: str,
) -> Tensor:  # fmt: skip
    """See `product`."""
    require_strided(x=x, values=values, bias=bias, indptr=indptr, indices=indices)
    return product(find_topology(indptr, indices, sizes, layout), x, values, bias)


@torch.library.custom_op("sparselab::linear_input_grad", mutates_args=())
def linear_input_grad(
    grad: Tensor, values: Tensor, indptr: Tensor, indices: Tensor, sizes: list[int], layout: str
) -> Tensor:
    """See `input_grad`."""
    require_strided(grad=grad, values=values, indptr=indptr, indices=indices)
    return input_grad(find_topology(indptr, indices, sizes, layout), grad, values)


@torch.library.custom_op("sparselab::linear_values_grad", mutates_args=())
def linear_values_grad(
    grad: Tensor, x: Tensor, indptr: Tensor, indices: Tensor, sizes: list[int], layout: str, with_bias: bool,
    is_shown: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `values_grad`."""
    require_strided(grad=grad, x=x, indptr=indptr, indices=indices)
    topology = find_topology(indptr, indices, sizes, layout)
    both = values_grad(topology, grad, x, with_bias, False)
    if is_shown and topology.is_watched:
        topology.show_lent(LinearOperands(x.detach(), grad.detach()))
    return both


@linear_operator.register_fake
def _(
    x: Tensor, values: Tensor, bias: Tensor | None, indptr: Tensor, indices: Tensor, sizes: list[int],
    layout: str,
) -> Tensor:  # fmt: skip
    refuse_mixed_devices(x=x, values=values, bias=bias, indptr=indptr, indices=indices)
    return x.new_empty((x.shape[0], sizes[0]))


@linear_input_grad.register_fake
def _(grad: Tensor, values: Tensor, indptr: Tensor, indices: Tensor, sizes: list[int], layout: str) -> Tensor:
    refuse_mixed_devices(grad=grad, values=values, indptr=indptr, indices=indices)
    return grad.new_empty((grad.shape[0], sizes[1]))


@linear_values_grad.register_fake
def _(
    grad: Tensor, x: Tensor, indptr: Tensor, indices: Tensor, sizes: list[int], layout: str, with_bias: bool,
    is_shown: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    refuse_mixed_devices(grad=grad, x=x, indptr=indptr, indices=indices)
    dvalues = grad.new_empty((indices.shape[0], sizes[2], sizes[3]))
    return dvalues, grad.new_empty(sizes[0] if with_bias else 0)


class LinearForm:
    """The products of linear layers, as derivatives want them.

    Parameters
    ----------
    sizes, layout
        As the operators take them.
    is_shown : bool
        Whether the values are a layer's, whose gradient hook sees what their gradient is made of.
    """

    def __init__(self, sizes: list[int], layout: str, is_shown: bool = True) -> None:
        self.sizes, self.layout, self.is_shown = sizes, layout, is_shown

    def product(
        self, x: Tensor, values: Tensor, bias: Tensor | None, indptr: Tensor, indices: Tensor
    ) -> Tensor:
        """See `product`."""
        return linear_operator(x, values, bias, indptr, indices, self.sizes, self.layout)  # type: ignore[no-any-return]

    def input_grad(self, grad: Tensor, values: Tensor, indptr: Tensor, indices: Tensor) -> Tensor:
        """See `input_grad`."""
        return linear_input_grad(grad, values, indptr, indices, self.sizes, self.layout)  # type: ignore[no-any-return]

    def values_grad(
        self, grad: Tensor, x: Tensor, indptr: Tensor, indices: Tensor, with_bias: bool
    ) -> tuple[Tensor, Tensor]:
        """See `values_grad`."""
        both: tuple[Tensor, Tensor] = linear_values_grad(
            grad, x, indptr, indices, self.sizes, self.layout, with_bias, self.is_shown
        )
        return both

    def is_trained(self, leaf: Tensor, indptr: Tensor, indices: Tensor) -> bool:
        """Whether gradients by a leaf are those of a layer's Parameter."""
        return find_topology(indptr, indices, self.sizes, self.layout).is_trained(leaf)

    def hidden(self) -> Bilinear:
        """The same for something in place of the layer's values."""
        return LinearForm(self.sizes, self.layout, False)


def _form(operand: Tensor, sizes: list[int], layout: str, *flags: bool) -> LinearForm:
    return LinearForm(sizes, layout)


register_derivatives(linear_operator, linear_input_grad, linear_values_grad, _form)
