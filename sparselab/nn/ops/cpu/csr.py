"""The products of single connections on CPU tensors, each by the variant that suits it.

Operands have been checked; see `sparselab.nn.ops.products.LinearProducts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from sparselab.kernels.arrays import Array, address
from sparselab.kernels.cpu.csr.dense_rows import collect_rows, expand_rows
from sparselab.kernels.cpu.csr.order import into_order
from sparselab.kernels.cpu.csr.plan import (
    GRADIENT,
    PRODUCT_T,
    SLOTS,
    Segments,
    TransposePlan,
    gradient_plan,
    product_plan,
    transpose_plan,
)
from sparselab.kernels.cpu.csr.sddmm_dw import GradientCut, cut_gradient, sample_cut
from sparselab.kernels.cpu.csr.skinny import multiply_skinny
from sparselab.kernels.cpu.csr.skinny_dw import sample_skinny
from sparselab.kernels.cpu.csr.spmm import ProductCut, cut_product, multiply_cut
from sparselab.kernels.cpu.narrow import expand
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.nn.ops.contract import Narrow, OnTensors
from sparselab.nn.ops.cpu.dense_parts import takes_gradient, takes_product
from sparselab.nn.ops.cpu.dense_parts import values_grad as values_grad_by_unit
from sparselab.nn.ops.cpu.memory import (
    LIKE,
    SUMMED,
    Cuts,
    as_matrix,
    as_vector,
    as_weights,
    in_order,
    zeros,
)
from sparselab.nn.ops.cpu.programs.base import Gradients
from sparselab.nn.ops.cpu.programs.rows import RowPrograms
from sparselab.nn.ops.cpu.threads import use_torch_threads
from sparselab.nn.ops.cpu.variants import SINGLE, Variant, choose, choose_name, possible

#: Tokens and results may be of bfloat16 beside weights in float32: functions take a dtype `out`.
CASTS_TOKENS = True

_BLOCK_BYTES = 8 << 20


class Rows(Protocol):
    """Connections in compressed rows: row i is the slots ``begin[i] : end[i]``."""

    shape: tuple[int, int]
    begin: Array
    end: Array
    indices: Array


@dataclass
class _Turned:
    """The rows of W^T."""

    shape: tuple[int, int]
    begin: Array
    end: Array
    indices: Array


class RowProducts:
    """What the products of one topology read again and again, and their plans once they are made."""

    def __init__(self, topology: RowTopology) -> None:
        self.all = rows = topology.rows
        self.topology, self.shape, self.indices = topology, topology.shape, rows.indices
        self.begin, self.end = rows.indptr[:-1], rows.indptr[1:]
        self.density = topology.density
        #: For contiguous tokens of the dtype of the weights.
        self.programs = RowPrograms(topology)
        self.forward: Segments | None = None
        self.transpose: TransposePlan | None = None
        self.gradient: Segments | None = None
        #: How products of so many tokens, on so many threads, in a dtype are cut.
        self.products: Cuts[ProductCut] = Cuts()
        self.input_grads: Cuts[ProductCut] = Cuts()
        self.gradients: Cuts[GradientCut] = Cuts()


def _rows(topology: OnTensors) -> RowProducts:
    """What is kept, made when it is first needed."""
    own: Any = topology.own
    kept: RowProducts = RowProducts(own)
    topology.kept = kept
    return kept


def product(
    topology: OnTensors, values: Tensor, x: Tensor, bias: Tensor | None, variant: str | None = None,
    out: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """``x W^T + b``, by a variant or the one that suits it, in a dtype or that of x."""
    rows: RowProducts = topology.kept or _rows(topology)
    if variant is None and out is None and topology.measured is None:
        found = rows.programs.product(values, x, bias)
        if found is not None:
            return found
    given, n_tokens = x.dtype, x.shape[0]
    out = given if out is None else out
    dtype = SUMMED[given]
    n_threads = use_torch_threads()
    n_rows = rows.shape[0]
    y = torch.empty((n_tokens, n_rows), dtype=out)
    if y.numel() == 0:
        return y
    by_unit = variant is None and out is torch.bfloat16 and takes_product(rows.shape, rows.density, n_tokens)
    if variant is None and topology.measured is not None:
        variant = topology.measured.name(n_tokens)
    if variant is None:
        variant = choose_name("forward", n_tokens, rows.density, SINGLE)
    if by_unit:
        offsets = None if bias is None else bias.to(out)
        return _product_of_blocks(rows, values, x.to(out), offsets, y)
    if bias is not None and bias.dtype is not dtype:
        bias = bias.detach().to(dtype)
    if variant != "tiles" and not (given is dtype is out):
        return product(topology, values, x.to(dtype), bias, variant).to(out)
    if variant == "dense blocks":
        return _product_of_blocks(rows, values, x, bias, y)
    X, Y = as_matrix(x), (y.data_ptr(), (1, n_rows), (n_rows, n_tokens), LIKE[out])
    weights = values if values.is_contiguous() else values.contiguous()
    offsets = zeros(n_rows, dtype) if bias is None else bias.contiguous()
    if variant == "skinny":
        multiply_skinny(
            (weights.data_ptr(), LIKE[values.dtype], None if values.dtype is dtype else 0), rows.indices,
            rows.begin, rows.end, offsets.data_ptr(), LIKE[dtype], X, Y, n_threads,
        )  # fmt: skip
        return y
    plan = rows.forward
    if plan is None:
        plan = rows.forward = product_plan(rows.topology)
    key = n_tokens, n_threads, dtype
    cut = rows.products.get(key) or rows.products.add(
        key, cut_product(plan, rows.shape, n_tokens, dtype.itemsize)
    )
    multiply_cut(
        weights.data_ptr(), LIKE[values.dtype], rows.indices, plan, X, Y, offsets.data_ptr(),
        LIKE[dtype].dtype, cut,
    )  # fmt: skip
    return y


def narrow_product(
    topology: OnTensors, narrow: Narrow, x: Tensor, bias: Tensor | None, variant: str | None,
    out: torch.dtype,
) -> Tensor:  # fmt: skip
    """``x W^T + b`` with weights in bfloat16 or int8: few tokens read them, for more they are expanded."""
    rows: RowProducts = topology.kept or _rows(topology)
    n_threads, n_tokens, n_rows = use_torch_threads(), len(x), rows.shape[0]
    if variant is None and topology.measured is not None:
        variant = topology.measured.name(n_tokens)
    if variant is None:
        variant = choose_name("forward", n_tokens, rows.density, SINGLE)
    held = narrow.in_order()
    if variant != "skinny":
        wide = expand(as_weights(*held), rows.begin, rows.end, (1, 1), n_rows, n_threads)
        values = torch.from_numpy(wide[: held.values.numel()]).view(topology.values_shape)
        return product(topology, values, x, bias, variant, out)
    dtype = torch.float32
    tokens, y = x if x.dtype is dtype else x.to(dtype), torch.empty((n_tokens, n_rows), dtype=dtype)
    offsets = zeros(n_rows, dtype) if bias is None else bias.contiguous()
    multiply_skinny(
        as_weights(*held), rows.indices, rows.begin, rows.end, offsets.data_ptr(), LIKE[dtype],
        as_matrix(tokens), (y.data_ptr(), (1, n_rows), (n_rows, n_tokens), LIKE[dtype]), n_threads,
    )  # fmt: skip
    return y if out is dtype else y.to(out)


def widen(topology: OnTensors, narrow: Narrow) -> Tensor:
    """Weights in float32, a new tensor."""
    rows: RowProducts = topology.kept or _rows(topology)
    wide, held = torch.empty(topology.values_shape, dtype=torch.float32), narrow.in_order()
    place, n_threads = as_vector(wide), use_torch_threads()
    expand(as_weights(*held), rows.begin, rows.end, (1, 1), rows.shape[0], n_threads, place)
    return wide


def _product_of_blocks(rows: Rows, values: Tensor, x: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    x, b = x.detach(), None if bias is None else bias.detach()
    for row0, row1, block in dense_blocks(values, rows, x):
        part = y[:, row0:row1]
        if b is None:
            torch.mm(x, block.T, out=part)
        else:
            torch.addmm(b[row0:row1], x, block.T, out=part)
    return y


def input_grad(topology: OnTensors, values: Tensor, grad: Tensor, out: torch.dtype | None = None) -> Tensor:
    """``dy W``, in a dtype or that of dy."""
    rows: RowProducts = topology.kept or _rows(topology)
    if out is None and (found := rows.programs.gradients(values, grad, None, False)) is not None:
        return found[0]  # type: ignore[return-value]
    given, n_tokens = grad.dtype, grad.shape[0]
    out = given if out is None else out
    dtype = SUMMED[given]
    n_threads = use_torch_threads()
    n_rows, n_columns = rows.shape
    dx = torch.empty((n_tokens, n_columns), dtype=out)
    if n_rows == 0 or dx.numel() == 0:
        return dx.zero_()
    if given is torch.bfloat16 and takes_product(rows.shape, rows.density, n_tokens):
        return _input_grad_by_unit(rows, values, grad).to(out)
    variant = choose_name("input_grad", n_tokens, rows.density, SINGLE)
    if variant != "tiles" and not (given is dtype is out):
        return input_grad(topology, values, grad.to(dtype)).to(out)
    if variant == "dense blocks":
        for row0, row1, block in dense_blocks(values, rows, grad):
            torch.addmm(dx, grad[:, row0:row1], block, beta=min(row0, 1), out=dx)
        return dx
    plan = rows.transpose
    if plan is None:
        plan = rows.transpose = transpose_plan(rows.topology)
    like, held, offsets = LIKE[dtype], in_order(values), zeros(n_columns, dtype)
    weights = into_order(held.data_ptr(), LIKE[values.dtype], rows.all, plan.order, like.dtype)
    DY, DX = as_matrix(grad), (dx.data_ptr(), (1, n_columns), (n_columns, n_tokens), LIKE[out])
    if variant == "skinny":
        multiply_skinny(
            (address(weights), like, None), plan.indices, plan.indptr[:-1], plan.indptr[1:],
            offsets.data_ptr(), like, DY, DX, n_threads,
        )  # fmt: skip
        return dx
    key = n_tokens, n_threads, dtype
    cut = rows.input_grads.get(key) or rows.input_grads.add(
        key, cut_product(plan.segments, (n_columns, n_rows), n_tokens, dtype.itemsize)
    )
    multiply_cut(
        address(weights), like, plan.indices, plan.segments, DY, DX, offsets.data_ptr(), like.dtype, cut
    )
    return dx


def gradients(
    topology: OnTensors, values: Tensor | None, grad: Tensor, x: Tensor | None, with_bias: bool
) -> Gradients | None:
    """What `input_grad` and `values_grad` return, at once; None if they must be asked one by one."""
    rows: RowProducts = topology.kept or _rows(topology)
    return rows.programs.gradients(values, grad, x, with_bias)


def _input_grad_by_unit(rows: RowProducts, values: Tensor, grad: Tensor) -> Tensor:
    """``dy W`` in bfloat16. Each output is of one product, since a sum of several would be rounded often."""
    n_rows, n_columns = rows.shape
    dx = grad.new_empty((len(grad), n_columns))
    if len(list(row_ranges(rows, grad))) == 1:
        for _, _, block in dense_blocks(values, rows, grad):
            torch.mm(grad, block, out=dx)
        return dx
    plan = rows.transpose
    if plan is None:
        plan = rows.transpose = transpose_plan(rows.topology)
    held, dtype = in_order(values), LIKE[torch.float32].dtype
    ordered = into_order(held.data_ptr(), LIKE[values.dtype], rows.all, plan.order, dtype)
    turned = _Turned((n_columns, n_rows), plan.indptr[:-1], plan.indptr[1:], plan.indices)
    return _product_of_blocks(turned, torch.from_numpy(ordered), grad, None, dx)


def values_grad(
    topology: OnTensors, grad: Tensor, x: Tensor, with_bias: bool, out: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """``sum_t dy[t, i] x[t, j]`` for each connection (i, j), and ``sum_t dy[t]`` or an empty tensor.

    In a dtype or that of dy.
    """
    rows: RowProducts = topology.kept or _rows(topology)
    if out is None and (found := rows.programs.gradients(None, grad, x, with_bias)) is not None:
        return found[1], grad.new_empty(0) if found[2] is None else found[2]  # type: ignore[return-value]
    given, n_tokens = grad.dtype, grad.shape[0]
    out = given if out is None else out
    dtype = SUMMED[given]
    if out is not dtype:
        wide = values_grad(topology, grad, x, with_bias, dtype)
        return wide[0].to(out), wide[1].to(out)
    n_threads = use_torch_threads()
    if given is torch.bfloat16 and takes_gradient((1, 1), rows.shape, rows.density, n_tokens):
        return values_grad_by_unit(
            topology.values_shape, rows.shape, (1, 1), rows.indices, rows.begin, rows.end, grad, x, with_bias
        )
    variant = choose_name("values_grad", n_tokens, rows.density, SINGLE)
    if variant != "tiles" and not (given is x.dtype is dtype):
        return values_grad(topology, grad.to(dtype), x.to(dtype), with_bias)
    if variant == "dense blocks":
        result = torch.empty(topology.values_shape, dtype=dtype)
        flat: Array = result.view(-1).numpy()
        for row0, row1, block in row_blocks(rows, grad):
            torch.mm(grad[:, row0:row1].T, x, out=block)
            dense = block.view(-1).numpy()
            collect_rows(dense, rows.indices, rows.begin, rows.end, row0, row1, rows.shape[1], flat)
        return result, grad.sum(0) if with_bias else grad.new_empty(0)
    result = torch.zeros(topology.values_shape, dtype=dtype)
    sums = torch.empty(rows.shape[0] if with_bias else 0, dtype=dtype)
    if n_tokens == 0 or result.numel() + sums.numel() == 0:
        return result, sums.zero_()
    if variant == "skinny":
        tokens = in_order(x)
        sample_skinny(
            rows.indices, rows.begin, rows.end, as_matrix(grad), as_matrix(tokens), result.data_ptr(),
            sums.data_ptr(), LIKE[dtype], n_threads,
        )  # fmt: skip
        return result, sums
    plan = rows.gradient
    if plan is None:
        plan = rows.gradient = gradient_plan(rows.topology)
    key = n_tokens, n_threads, dtype
    cut = rows.gradients.get(key) or rows.gradients.add(
        key, cut_gradient(plan, rows.shape, n_tokens, dtype.itemsize)
    )
    sample_cut(
        rows.indices, plan, as_matrix(grad), as_matrix(x), result.data_ptr(), sums.data_ptr(),
        LIKE[dtype].dtype, cut,
    )  # fmt: skip
    return result, sums


def variant(topology: OnTensors, operation: str, n_tokens: int) -> Variant:
    """Which way a product of so many tokens takes, and why."""
    return choose(operation, n_tokens, topology.own.density, topology.measured, SINGLE)


def ways(
    topology: OnTensors, values: Tensor, x: Tensor, bias: Tensor | None
) -> dict[str, Callable[[], Tensor]]:
    """Every way to compute `product`, by the name of its variant."""
    return {name: partial(product, topology, values, x, bias, name) for name in possible(len(x), SINGLE)}


def narrow_ways(
    topology: OnTensors, narrow: Narrow, x: Tensor, bias: Tensor | None
) -> dict[str, Callable[[], Tensor]]:
    """Every way to compute `narrow_product`, by the name of its variant."""
    names = possible(len(x), SINGLE)
    return {name: partial(narrow_product, topology, narrow, x, bias, name, x.dtype) for name in names}


def keep_forward(topology: OnTensors) -> None:
    """Let go of the plans of backward passes; they are made anew if they are needed."""
    topology.own.forget(lambda key: key not in (PRODUCT_T, GRADIENT, SLOTS))
    if topology.kept is not None:
        topology.kept.transpose = topology.kept.gradient = None
        topology.kept.programs.forget_gradients()


def row_blocks(rows: Rows, like: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Rows and uninitialised dense blocks for them, all in the same memory."""
    ranges = list(row_ranges(rows, like))
    memory = like.new_empty((max((row1 - row0 for row0, row1 in ranges), default=0), rows.shape[1]))
    for row0, row1 in ranges:
        yield row0, row1, memory[: row1 - row0]


def row_ranges(rows: Rows, like: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose dense blocks take so much memory at most, or of one row."""
    n_rows, n_columns = rows.shape
    height = max(1, min(n_rows, _BLOCK_BYTES // max(1, n_columns * like.element_size())))
    for row0 in range(0, n_rows, height):
        yield row0, min(n_rows, row0 + height)


def dense_blocks(values: Tensor, rows: Rows, like: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Rows and their dense weights; a block is lent until the next one is made."""
    weights = as_vector(values)
    for row0, row1, block in row_blocks(rows, like):
        flat = as_vector(block)
        expand_rows(weights, rows.indices, rows.begin, rows.end, row0, row1, rows.shape[1], flat)
        yield row0, row1, block
