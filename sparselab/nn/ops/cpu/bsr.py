"""The products of dense blocks on CPU tensors, each by the variant that suits it.

Operands have been checked; see `sparselab.nn.ops.products.LinearProducts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparselab.kernels.arrays import Array, for_kernels
from sparselab.kernels.cpu.bsr.plan import block_plan_key, plan_key, wants_transpose
from sparselab.kernels.cpu.bsr.products import multiply, sample
from sparselab.kernels.cpu.bsr.skinny import multiply_skinny_blocks
from sparselab.kernels.cpu.narrow import expand
from sparselab.kernels.layouts.block_csr import BlockTopology
from sparselab.nn.ops.contract import Narrow, OnTensors
from sparselab.nn.ops.cpu import narrow_blocks
from sparselab.nn.ops.cpu.dense_parts import takes_gradient
from sparselab.nn.ops.cpu.dense_parts import values_grad as values_grad_by_unit
from sparselab.nn.ops.cpu.memory import (
    LIKE,
    SUMMED,
    as_array,
    as_matrix,
    as_vector,
    as_weights,
    zeros,
)
from sparselab.nn.ops.cpu.narrow_blocks import is_native
from sparselab.nn.ops.cpu.programs.base import Gradients
from sparselab.nn.ops.cpu.programs.blocks import BlockPrograms
from sparselab.nn.ops.cpu.threads import use_torch_threads
from sparselab.nn.ops.cpu.variants import BLOCKS, Variant, choose, choose_name, possible
from sparselab.nn.ops.cutting import cut, join

#: Tokens and results may be of bfloat16 beside weights in float32: functions take a dtype `out`.
CASTS_TOKENS = True

_CHUNK_BYTES = 8 << 20


def _programs(topology: OnTensors) -> BlockPrograms:
    """What is kept, made when it is first needed."""
    own: Any = topology.own
    kept = topology.kept = BlockPrograms(own, density(own))
    return kept


def product(
    topology: OnTensors, values: Tensor, x: Tensor, bias: Tensor | None, variant: str | None = None,
    out: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """``x W^T + b``, by a variant or the one that suits it, in a dtype or that of x."""
    if variant is None and out is None and topology.measured is None:
        programs: BlockPrograms = topology.kept or _programs(topology)
        if (y := programs.product(values, x, bias)) is not None:
            return y
    given, n_tokens = x.dtype, x.shape[0]
    out = given if out is None else out
    dtype = SUMMED[given]
    own: BlockTopology = topology.own  # type: ignore[assignment]
    n_threads = use_torch_threads()
    if values.dtype is torch.bfloat16:
        if variant is None and is_native(own.block_shape):
            return narrow_blocks.product(own, values, x, bias)
        values = values.float()
    if bias is not None and bias.dtype is not dtype:
        bias = bias.detach().to(dtype)
    y = torch.empty((n_tokens, own.shape[0]), dtype=out)
    measured = topology.measured
    if variant is None and measured is not None:
        variant = measured.name(n_tokens)
    if variant is None:
        variant = choose_name("forward", n_tokens, density(own), BLOCKS)
    if variant != "tiles" and not (given is dtype is out):
        return product(topology, values, x.to(dtype), bias, variant).to(out)
    if variant == "dense blocks":
        return _product_of_chunks(own, values.detach(), x.detach(), bias, y)
    if variant == "skinny":
        weights, rows = values.contiguous(), own.blocks.rows
        offsets = zeros(own.shape[0], dtype) if bias is None else bias.contiguous()
        multiply_skinny_blocks(
            (weights.data_ptr(), LIKE[values.dtype], None), rows.indices, rows.indptr, own.block_shape,
            offsets.data_ptr(), LIKE[dtype], as_matrix(x), as_matrix(y), n_threads,
        )  # fmt: skip
        return y
    offset = None if bias is None else as_vector(bias)
    multiply(own, False, as_vector(values), as_array(x).T, as_array(y).T, offset)
    return y


def narrow_product(
    topology: OnTensors, narrow: Narrow, x: Tensor, bias: Tensor | None, variant: str | None,
    out: torch.dtype,
) -> Tensor:  # fmt: skip
    """As of single connections; and a matrix unit multiplies in bfloat16 where that is returned."""
    own: BlockTopology = topology.own  # type: ignore[assignment]
    n_threads, n_tokens = use_torch_threads(), len(x)
    if variant is None and out is torch.bfloat16 and is_native(own.block_shape):
        values = narrow.values if narrow.scales is None else widen(topology, narrow).to(out)
        return narrow_blocks.product(own, values, x.to(out), bias)
    if variant is None and topology.measured is not None:
        variant = topology.measured.name(n_tokens)
    if variant is None:
        variant = choose_name("forward", n_tokens, density(own), BLOCKS)
    held, rows = narrow.in_order(), own.blocks.rows
    if variant != "skinny":
        wide = _expanded(own, held)
        values = torch.from_numpy(wide[: held.values.numel()]).view(topology.values_shape)
        return product(topology, values, x, bias, variant, out)
    dtype, n_rows = torch.float32, own.shape[0]
    tokens, y = x if x.dtype is dtype else x.to(dtype), torch.empty((n_tokens, n_rows), dtype=dtype)
    offsets = zeros(n_rows, dtype) if bias is None else bias.contiguous()
    multiply_skinny_blocks(
        as_weights(*held), rows.indices, rows.indptr, own.block_shape, offsets.data_ptr(), LIKE[dtype],
        as_matrix(tokens), (y.data_ptr(), (1, n_rows), (n_rows, n_tokens), LIKE[dtype]), n_threads,
    )  # fmt: skip
    return y if out is dtype else y.to(out)


def widen(topology: OnTensors, narrow: Narrow) -> Tensor:
    """Weights in float32, a new tensor."""
    wide = torch.empty(topology.values_shape, dtype=torch.float32)
    _expanded(topology.own, narrow.in_order(), as_vector(wide))
    return wide


def _expanded(own: Any, narrow: Narrow, out: Array | None = None) -> Array:
    indptr = own.blocks.rows.indptr
    return expand(
        as_weights(*narrow), indptr[:-1], indptr[1:], own.block_shape, own.shape[0], use_torch_threads(), out
    )


def _product_of_chunks(
    own: BlockTopology, values: Tensor, x: Tensor, bias: Tensor | None, y: Tensor
) -> Tensor:
    for part in _chunks(own):
        out, weight = y[:, part.rows], part.expand(values, own)
        torch.mm(x, weight.T, out=out)
        if bias is not None:
            out += bias.detach()[part.rows]
    return y


def input_grad(topology: OnTensors, values: Tensor, grad: Tensor, out: torch.dtype | None = None) -> Tensor:
    """``dy W``, in a dtype or that of dy."""
    programs: BlockPrograms = topology.kept or _programs(topology)
    if out is None and (by_program := programs.gradients(values, grad, None, False)) is not None:
        return by_program[0]  # type: ignore[return-value]
    given = grad.dtype
    out = given if out is None else out
    dtype = SUMMED[given]
    own: BlockTopology = topology.own  # type: ignore[assignment]
    use_torch_threads()
    if values.dtype is torch.bfloat16:
        if is_native(own.block_shape):
            return narrow_blocks.input_grad(own, values, grad)
        values = values.float()
    variant = choose_name("input_grad", len(grad), density(own), BLOCKS)
    if variant != "tiles" and not (given is dtype is out):
        return input_grad(topology, values, grad.to(dtype)).to(out)
    dx = torch.empty((grad.shape[0], own.shape[1]), dtype=out)
    if variant == "dense blocks":
        for part in _chunks(own):
            weight = part.expand(values.detach(), own)
            torch.addmm(dx, grad[:, part.rows], weight, beta=min(part.rows.start, 1), out=dx)
        return dx
    multiply(own, True, as_vector(values), as_array(grad).T, as_array(dx).T)
    return dx


def gradients(
    topology: OnTensors, values: Tensor | None, grad: Tensor, x: Tensor | None, with_bias: bool
) -> Gradients | None:
    """What `input_grad` and `values_grad` return, at once; None if they must be asked one by one."""
    programs: BlockPrograms = topology.kept or _programs(topology)
    return programs.gradients(values, grad, x, with_bias)


def values_grad(
    topology: OnTensors, grad: Tensor, x: Tensor, with_bias: bool, out: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The gradient of every block, 0 outside the matrix, and ``sum_t dy[t]`` or an empty tensor.

    In a dtype or that of dy.
    """
    programs: BlockPrograms = topology.kept or _programs(topology)
    if out is None and (by_program := programs.gradients(None, grad, x, with_bias)) is not None:
        _, entries, dbias = by_program
        return entries, grad.new_empty(0) if dbias is None else dbias  # type: ignore[return-value]
    given = grad.dtype
    own: BlockTopology = topology.own  # type: ignore[assignment]
    use_torch_threads()
    if given is torch.bfloat16 and out is None and is_native(own.block_shape):
        found = without_outside(own, narrow_blocks.values_grad(own, grad, x)).to(given)
        return found, grad.sum(0) if with_bias else grad.new_empty(0)
    dtype = SUMMED[given]
    out = given if out is None else out
    if out is not dtype:
        wide = values_grad(topology, grad, x, with_bias, dtype)
        return wide[0].to(out), wide[1].to(out)
    if given is torch.bfloat16 and takes_gradient(own.block_shape, own.shape, density(own), len(grad)):
        entries, sums = values_grad_by_unit(
            topology.values_shape, own.shape, own.block_shape, *_block_rows(own), grad, x, with_bias
        )
        return without_outside(own, entries), sums
    dense = choose_name("values_grad", len(grad), density(own), BLOCKS) == "dense blocks"
    if dense and not (given is x.dtype is dtype):
        return values_grad(topology, grad.to(dtype), x.to(dtype), with_bias)
    result = torch.empty(topology.values_shape, dtype=dtype)
    if dense:
        for part in _chunks(own):
            columns = grad[:, part.rows]
            # With a place for the result, which autocast leaves alone.
            found = torch.mm(columns.T, x, out=x.new_empty((columns.shape[1], x.shape[1])))
            part.collect(found, result, own)
        sums = grad.sum(0, dtype=dtype) if with_bias else grad.new_empty(0)
    else:
        sums = torch.empty(own.shape[0] if with_bias else 0, dtype=dtype)
        of_bias = as_vector(sums) if with_bias else None
        sample(own, as_array(grad).T, as_array(x).T, as_vector(result), of_bias)
    without_outside(own, result)
    return result, sums


def _block_rows(own: BlockTopology) -> tuple[Array, Array, Array]:
    """The columns of blocks, and where each block row begins and ends."""
    rows = own.blocks.rows
    return rows.indices, rows.indptr[:-1], rows.indptr[1:]


def without_outside(own: BlockTopology, entries: Tensor) -> Tensor:
    """Entries of blocks, set to 0 in place where blocks reach beyond the matrix."""
    slots, outside = own.plan("outside on tensors", _outside)
    if len(slots):
        entries[slots] = entries[slots].masked_fill(outside, 0)
    return entries


def density(own: BlockTopology) -> float:
    """Live fraction of the weights."""
    return own.plan(("cpu", "density"), _density)


def _density(own: BlockTopology) -> float:
    size, (height, width) = own.shape[0] * own.shape[1], own.block_shape
    live = own.nnz * height * width - int(own.outside()[1].sum())
    return live / size if size else 1.0


def variant(topology: OnTensors, operation: str, n_tokens: int) -> Variant:
    """Which way a product of so many tokens takes, and why."""
    own: BlockTopology = topology.own  # type: ignore[assignment]
    return choose(operation, n_tokens, density(own), topology.measured, BLOCKS)


def ways(
    topology: OnTensors, values: Tensor, x: Tensor, bias: Tensor | None
) -> dict[str, Callable[[], Tensor]]:
    """Every way to compute `product`, by the name of its variant."""
    return {name: partial(product, topology, values, x, bias, name) for name in possible(len(x), BLOCKS)}


def narrow_ways(
    topology: OnTensors, narrow: Narrow, x: Tensor, bias: Tensor | None
) -> dict[str, Callable[[], Tensor]]:
    """Every way to compute `narrow_product`, by the name of its variant."""
    names = possible(len(x), BLOCKS)
    return {name: partial(narrow_product, topology, narrow, x, bias, name, x.dtype) for name in names}


def keep_forward(topology: OnTensors) -> None:
    """Let go of the plans of products with W^T, unless they are the same; they are made anew if needed."""
    own: BlockTopology = topology.own  # type: ignore[assignment]
    backward = plan_key(not wants_transpose(own.block_shape, False)), block_plan_key(True)
    own.forget(lambda key: key not in backward)
    if topology.kept is not None:
        topology.kept.forget_gradients()


def _outside(own: BlockTopology) -> tuple[Tensor, Tensor]:
    """The blocks that reach beyond W, and where."""
    slots, outside = (torch.from_numpy(for_kernels(part)) for part in own.outside())
    return slots, outside


class _Chunk(NamedTuple):
    """Some block rows, which are expanded for dense products."""

    rows: slice
    slots: slice
    positions: Tensor
    grid: tuple[int, int]

    def expand(self, values: Tensor, own: BlockTopology) -> Tensor:
        """Their weights as a dense matrix (rows, in_features)."""
        blocks = values.new_zeros((self.grid[0] * self.grid[1], *own.block_shape))
        blocks[self.positions] = values[self.slots]
        return join(blocks, (self.rows.stop - self.rows.start, own.shape[1]))

    def collect(self, dense: Tensor, out: Tensor, own: BlockTopology) -> None:
        """Copy their blocks from a dense matrix (rows, in_features)."""
        out[self.slots] = cut(dense, own.block_shape)[self.positions]


def _chunks(own: BlockTopology) -> Iterator[_Chunk]:
    """All block rows, a few megabytes of dense weights at a time."""
    rows, columns = own.grid
    height = own.block_shape[0]
    step = max(1, _CHUNK_BYTES // (4 * height * max(own.shape[1], 1)))
    indptr, positions = own.blocks.indptr, torch.from_numpy(own.positions())
    for r0 in range(0, rows, step):
        r1 = min(r0 + step, rows)
        slots = slice(int(indptr[r0]), int(indptr[r1]))
        inside = slice(r0 * height, min(r1 * height, own.shape[0]))
        yield _Chunk(inside, slots, positions[slots] - r0 * columns, (r1 - r0, columns))
