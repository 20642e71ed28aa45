"""Rows of a sparse table, looked up by number, as torch operators with gradients.

``sparselab::lookup`` is linear in the values, and so is its gradient ``sparselab::lookup_values_grad`` in the
gradient of the rows: each is the derivative of the other, for every order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparselab.nn.ops.checks import (
    ACCEPTED,
    in_float32,
    refuse_misfits,
    refuse_mixed_devices,
    require_strided,
)
from sparselab.nn.ops.derivatives import each_of_batch
from sparselab.nn.ops.leaves import shown_form
from sparselab.nn.ops.lookup.operands import LookupOperands
from sparselab.nn.ops.products import find_products
from sparselab.nn.ops.topologies import HasStorage, TensorTopology, find_topology
from sparselab.nn.ops.tracing import is_transformed, uncompiled


class Form:
    """What operators take beside tensors; no tuple, which `torch.vmap` would look into.

    Parameters
    ----------
    sizes, layout
        Of the topology.
    is_shown : bool
        Whether the gradient hook may see operands: not where the values are something in place of a layer's,
        a cotangent or a tangent of them.
    """

    def __init__(self, sizes: list[int], layout: str, is_shown: bool = True) -> None:
        self.arguments = sizes, layout, is_shown

    def is_trained(self, leaf: Tensor, indptr: Tensor, indices: Tensor) -> bool:
        """Whether gradients by a leaf are those of a layer's Parameter."""
        return find_topology(indptr, indices, *self.arguments[:2]).is_trained(leaf)

    def hidden(self) -> Form:
        """The same for something in place of the layer's values."""
        sizes, layout, _ = self.arguments
        return Form(sizes, layout, False)


def lookup(tokens: Tensor, values: Tensor, layer: HasStorage, factors: Tensor | None = None) -> Tensor:
    """The rows of a layer with these numbers, dense, with gradients to the values.

    Parameters
    ----------
    tokens : int64 (n,)
    values : (connections, 1, 1)
    layer : HasStorage
        Asked for its topology.
    factors : (n,), optional
        By which the gradient of each row is multiplied.

    Returns
    -------
    (n, columns)

    Raises
    ------
    IndexError
        If a number is no row.
    """
    indptr, indices, sizes, layout = layer.storage.arguments(layer)
    if is_transformed():
        y: Tensor = _Lookup.apply(values, tokens, factors, indptr, indices, Form(sizes, layout))  # type: ignore[no-untyped-call]
        return y
    return lookup_operator(values, tokens, factors, indptr, indices, sizes, layout)  # type: ignore[no-any-return]


@torch.library.custom_op("sparselab::lookup", mutates_args=())
def lookup_operator(
    values: Tensor, tokens: Tensor, factors: Tensor | None, indptr: Tensor, indices: Tensor,
    sizes: list[int], layout: str, is_shown: bool = True,
) -> Tensor:  # fmt: skip
    """See `lookup`."""
    require_strided(values=values, tokens=tokens, factors=factors, indptr=indptr, indices=indices)
    topology = find_topology(indptr, indices, sizes, layout)
    _check_tokens(topology, tokens)
    if values.shape != topology.values_shape or values.dtype not in ACCEPTED or not _on(topology, values):
        refuse_misfits(topology.device, values.dtype, values=(values, topology.values_shape))
    products = find_products("lookup", layout, topology.device.type)
    (wide,) = in_float32(values) or (values,)
    y: Tensor = products.product(topology, wide, tokens)
    return y.to(values.dtype)


@torch.library.custom_op("sparselab::lookup_values_grad", mutates_args=())
def lookup_values_grad(
    grad: Tensor, tokens: Tensor, indptr: Tensor, indices: Tensor, sizes: list[int], layout: str,
    is_shown: bool = True,
) -> Tensor:  # fmt: skip
    """What the gradients of rows have at the connections, added up; the layer's gradient hook sees them."""
    require_strided(grad=grad, tokens=tokens, indptr=indptr, indices=indices)
    topology = find_topology(indptr, indices, sizes, layout)
    _check_tokens(topology, tokens)
    shape = len(tokens), topology.shape[1]
    if grad.shape != shape or grad.dtype not in ACCEPTED or not _on(topology, grad):
        refuse_misfits(topology.device, grad.dtype, grad=(grad, shape))
    if is_shown and topology.is_watched:
        topology.show_lent(LookupOperands(tokens.detach(), grad.detach(), topology.shape[0]))
    products = find_products("lookup", layout, topology.device.type)
    (wide,) = in_float32(grad) or (grad,)
    found: Tensor = products.values_grad(topology, wide, tokens)
    return found.to(grad.dtype)


def _check_tokens(topology: TensorTopology, tokens: Tensor) -> None:
    if tokens.dtype != torch.int64 or tokens.ndim != 1 or not _on(topology, tokens):
        raise RuntimeError(
            f"tokens must be int64 of one dimension on {topology.device}, got {tokens.dtype} of shape "
            f"{tuple(tokens.shape)} on {tokens.device}"
        )
    rows = topology.shape[0]
    if len(tokens) and not (int(tokens.min()) >= 0 and int(tokens.max()) < rows):
        raise IndexError(
            f"input must hold numbers of 0..{rows - 1}, got {int(tokens.min())}..{int(tokens.max())}"
        )


def _on(topology: TensorTopology, tensor: Tensor) -> bool:
    return tensor.device == topology.device


@lookup_operator.register_fake
def _(
    values: Tensor, tokens: Tensor, factors: Tensor | None, indptr: Tensor, indices: Tensor,
    sizes: list[int], layout: str, is_shown: bool = True,
) -> Tensor:  # fmt: skip
    refuse_mixed_devices(values=values, tokens=tokens, factors=factors, indptr=indptr, indices=indices)
    return values.new_empty((tokens.shape[0], sizes[1]))


@lookup_values_grad.register_fake
def _(
    grad: Tensor, tokens: Tensor, indptr: Tensor, indices: Tensor, sizes: list[int], layout: str,
    is_shown: bool = True,
) -> Tensor:  # fmt: skip
    refuse_mixed_devices(grad=grad, tokens=tokens, indptr=indptr, indices=indices)
    return grad.new_empty((indices.shape[0], 1, 1))


class _Lookup(torch.autograd.Function):
    """The rows, where `torch.func` or forward mode is at work."""

    @staticmethod
    def forward(
        values: Tensor, tokens: Tensor, factors: Tensor | None, indptr: Tensor, indices: Tensor, form: Form
    ) -> Tensor:
        return lookup_operator(values, tokens, factors, indptr, indices, *form.arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *rest, ctx.form = inputs
        _save(ctx, *rest)

    @staticmethod
    @uncompiled
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        tokens, factors, *topology = ctx.saved_tensors
        form = shown_form(ctx, 0, ctx.form, *topology)
        found = _ValuesGrad.apply(_scaled(grads[0], factors), tokens, *topology, form)  # type: ignore[no-untyped-call]
        return found, None, None, None, None, None

    @staticmethod
    @uncompiled
    def jvp(ctx: Any, *tangents: Any) -> Any:
        # The transpose of `backward`, so that both modes tell the same derivative.
        tokens, factors, *topology = ctx.saved_tensors
        rows = _Lookup.apply(tangents[0], tokens, None, *topology, ctx.form.hidden())  # type: ignore[no-untyped-call]
        return _scaled(rows, factors)

    @staticmethod
    @uncompiled
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return each_of_batch(_Lookup, info.batch_size, in_dims, args)


class _ValuesGrad(torch.autograd.Function):
    """The gradient by the values, likewise."""

    @staticmethod
    def forward(grad: Tensor, tokens: Tensor, indptr: Tensor, indices: Tensor, form: Form) -> Tensor:
        return lookup_values_grad(grad, tokens, indptr, indices, *form.arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *rest, ctx.form = inputs
        _save(ctx, *rest)

    @staticmethod
    @uncompiled
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        tokens, *topology = ctx.saved_tensors
        found = _Lookup.apply(grads[0], tokens, None, *topology, ctx.form.hidden())  # type: ignore[no-untyped-call]
        return found, None, None, None, None

    @staticmethod
    @uncompiled
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _ValuesGrad.apply(tangents[0], *ctx.saved_tensors, ctx.form.hidden())  # type: ignore[no-untyped-call]

    @staticmethod
    @uncompiled
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return each_of_batch(_ValuesGrad, info.batch_size, in_dims, args)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _scaled(rows: Tensor, factors: Tensor | None) -> Tensor:
    if factors is None:
        return rows
    if factors.shape != rows.shape[:1]:  # which torch would repeat
        raise RuntimeError(f"factors must be of shape {tuple(rows.shape[:1])}, got {tuple(factors.shape)}")
    return rows * factors[:, None]


def _lookup_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tokens, factors, indptr, indices, *rest = inputs
    ctx.form = Form(*rest)
    ctx.save_for_backward(tokens, factors, indptr, indices)


def _lookup_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tokens, factors, *topology = ctx.saved_tensors
    form = shown_form(ctx, 0, ctx.form, *topology)
    found = lookup_values_grad(_scaled(grad, factors), tokens, *topology, *form.arguments)
    return found, *[None] * 7


def _values_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tokens, indptr, indices, *rest = inputs
    ctx.form = Form(*rest)
    ctx.save_for_backward(tokens, indptr, indices)


def _values_grad_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tokens, *topology = ctx.saved_tensors
    found = lookup_operator(grad, tokens, None, *topology, *ctx.form.hidden().arguments)
    return found, *[None] * 6


lookup_operator.register_autograd(_lookup_backward, setup_context=_lookup_setup)
lookup_values_grad.register_autograd(_values_grad_backward, setup_context=_values_grad_setup)
