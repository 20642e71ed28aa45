"""The product of a sparse matrix of tokens and a linear layer's weight, with gradients by weights and bias.

``sparselab::sparse_input`` and ``sparselab::sparse_input_values_grad`` take the tokens as three dense tensors
(`TokenRows`). They walk the stored entries where the layout has a product for that and the tokens are sparse
enough; else they make chunks of tokens dense, one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparselab.nn.ops.checks import ACCEPTED, refuse_misfits, refuse_mixed_devices, require_strided
from sparselab.nn.ops.inputs.operands import SparseInputOperands
from sparselab.nn.ops.inputs.sparse import TokenRows, token_rows
from sparselab.nn.ops.leaves import may_be_shown
from sparselab.nn.ops.products import find_products, has_family
from sparselab.nn.ops.topologies import HasStorage, TensorTopology, find_topology
from sparselab.nn.ops.tracing import uncompiled

#: Computed with in float32, in which sums are formed.
_NARROW = (torch.bfloat16, torch.float16)


@uncompiled
def product_of_sparse(x: Tensor, values: Tensor, bias: Tensor | None, layer: HasStorage) -> Tensor:
    """``y = x W^T + b`` of a sparse x, with gradients by values and bias.

    Parameters
    ----------
    x : (tokens, in_features), of any of torch's sparse layouts
    values : (connections, block_out, block_in), the dtype of x
    bias : (out_features,) or None
    layer : HasStorage
        Asked for its topology.

    Returns
    -------
    (tokens, out_features)

    Raises
    ------
    RuntimeError, TypeError
        If x requires a gradient, or an operand does not fit.
    """
    if x.requires_grad:
        raise RuntimeError(
            f"input must not require a gradient if it is sparse, got one of layout {x.layout} that does; "
            "give the layer input.to_dense()"
        )
    topology = layer.storage.topology(layer)
    y: Tensor = SparseInputFunction.apply(*token_rows(x).tensors, values, bias, topology)  # type: ignore[no-untyped-call]
    return y


class SparseInputFunction(torch.autograd.Function):
    """`product_of_sparse` of the tensors of x."""

    @staticmethod
    def forward(
        ctx: Any, starts: Tensor, columns: Tensor, entries: Tensor, values: Tensor, bias: Tensor | None,
        topology: TensorTopology,
    ) -> Tensor:  # fmt: skip
        """The product; x is kept as it is."""
        ctx.topology = topology
        ctx.save_for_backward(starts, columns, entries)
        words = *topology.tensors, list(topology.sizes), topology.layout
        return sparse_input(starts, columns, entries, values, bias, *words)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """The gradients by values and bias that are asked for."""
        topology, dvalues = ctx.topology, None
        topology.require_unchanged()
        if ctx.needs_input_grad[3]:
            words = *topology.tensors, list(topology.sizes), topology.layout
            shown = may_be_shown(ctx, 3, topology)
            dvalues = sparse_input_values_grad(grad, *ctx.saved_tensors, *words, shown)
        return None, None, None, dvalues, grad.sum(0) if ctx.needs_input_grad[4] else None, None


@torch.library.custom_op("sparselab::sparse_input", mutates_args=())
def sparse_input(
    starts: Tensor, columns: Tensor, entries: Tensor, values: Tensor, bias: Tensor | None, indptr: Tensor,
    indices: Tensor, sizes: list[int], layout: str,
) -> Tensor:  # fmt: skip
    """See `product_of_sparse`."""
    require_strided(starts=starts, columns=columns, entries=entries, values=values, bias=bias)
    require_strided(indptr=indptr, indices=indices)
    topology = find_topology(indptr, indices, sizes, layout)
    rows = _checked(topology, starts, columns, entries)
    operands = [("values", values, topology.values_shape)]
    if bias is not None:
        operands.append(("bias", bias, topology.bias_shape))
    _check(topology, entries, operands)
    dtype = entries.dtype
    if dtype in _NARROW:
        rows, values, bias = rows.float(), values.float(), None if bias is None else bias.float()
    if (by_entries := _by_entries(topology, rows)) is not None:
        y: Tensor = by_entries.product(topology, values, rows, bias)
        return y.to(dtype)
    y = values.new_empty(rows.n_tokens, topology.shape[0])
    for tokens, chunk in rows.chunks():
        y[tokens] = topology.products.product(topology, values, chunk, bias)
    return y.to(dtype)


@torch.library.custom_op("sparselab::sparse_input_values_grad", mutates_args=())
def sparse_input_values_grad(
    grad: Tensor, starts: Tensor, columns: Tensor, entries: Tensor, indptr: Tensor, indices: Tensor,
    sizes: list[int], layout: str, is_shown: bool = True,
) -> Tensor:  # fmt: skip
    """``sum_t dy[t, i] x[t, j]`` for each weight (i, j); the layer's gradient hook sees the operands."""
    require_strided(grad=grad, starts=starts, columns=columns, entries=entries)
    require_strided(indptr=indptr, indices=indices)
    topology = find_topology(indptr, indices, sizes, layout)
    rows = _checked(topology, starts, columns, entries)
    _check(topology, entries, [("grad", grad, (rows.n_tokens, topology.shape[0]))])
    if is_shown and topology.is_watched:
        topology.show_lent(SparseInputOperands(rows, grad.detach()))
    dtype = grad.dtype
    if dtype in _NARROW:
        rows, grad = rows.float(), grad.float()
    if (by_entries := _by_entries(topology, rows)) is not None:
        found: Tensor = by_entries.values_grad(topology, grad, rows)
        return found.to(dtype)
    found = grad.new_zeros(topology.values_shape)
    for tokens, chunk in rows.chunks():
        found += topology.products.values_grad(topology, grad[tokens], chunk, False)[0]
    return found.to(dtype)


def _checked(topology: TensorTopology, starts: Tensor, columns: Tensor, entries: Tensor) -> TokenRows:
    """The tokens, whose numbers a kernel may read by."""
    for name, tensor in (("starts", starts), ("columns", columns), ("entries", entries)):
        if tensor.device != topology.device:
            raise RuntimeError(
                f"{name} must be on the device of the topology, {topology.device}, got {tensor.device}"
            )
    rows = TokenRows(starts, columns, entries.detach(), topology.shape[1])
    rows.check()
    return rows


def _check(topology: TensorTopology, entries: Tensor, operands: list[tuple[str, Tensor, Any]]) -> None:
    """Raise RuntimeError or TypeError unless operands have these shapes and the dtype of the entries."""
    dtype = entries.dtype
    for name, tensor, shape in operands:
        is_fit = tensor.dtype is dtype and tensor.shape == shape and tensor.device == topology.device
        if dtype not in ACCEPTED or not is_fit:
            refuse_misfits(
                topology.device, dtype, entries=(entries, entries.shape), **{name: (tensor, tuple(shape))}
            )


def _by_entries(topology: TensorTopology, rows: TokenRows) -> Any:
    """What walks the stored entries of these tokens; None if nothing does, or it would not pay."""
    family = "sparse_input", topology.layout, topology.device.type
    products = find_products(*family) if has_family(*family) else None
    return products if products is not None and products.pays(rows) else None


@sparse_input.register_fake
def _(
    starts: Tensor, columns: Tensor, entries: Tensor, values: Tensor, bias: Tensor | None, indptr: Tensor,
    indices: Tensor, sizes: list[int], layout: str,
) -> Tensor:  # fmt: skip
    refuse_mixed_devices(
        starts=starts, columns=columns, entries=entries, values=values, bias=bias, indptr=indptr,
        indices=indices,
    )  # fmt: skip
    return values.new_empty((starts.shape[0] - 1, sizes[0]))


@sparse_input_values_grad.register_fake
def _(
    grad: Tensor, starts: Tensor, columns: Tensor, entries: Tensor, indptr: Tensor, indices: Tensor,
    sizes: list[int], layout: str, is_shown: bool = True,
) -> Tensor:  # fmt: skip
    refuse_mixed_devices(
        grad=grad, starts=starts, columns=columns, entries=entries, indptr=indptr, indices=indices
    )
    return grad.new_empty((indices.shape[0], sizes[2], sizes[3]))
