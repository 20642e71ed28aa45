"""The three products of a sparse convolution on CPU tensors, chunk by chunk of images.

Operands have been checked; see `sparselab.nn.ops.products.ConvolutionProducts`. A chunk is laid out in planes
(`sparselab.kernels.cpu.conv.planes`), in which the unfolded batch is a matter of addresses.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparselab.kernels.arrays import Array, index_dtype
from sparselab.kernels.cpu.conv.planes import (
    Grid,
    fill_planes,
    input_grid,
    output_grid,
    plane_stride,
    read_planes,
    whole_tiles,
)
from sparselab.kernels.cpu.conv.shifted import PlanePlan, gather, multiply_shifted, sample_shifted
from sparselab.kernels.cpu.csr.dense_rows import collect_rows
from sparselab.kernels.cpu.csr.plan import Segments, plan_shifted
from sparselab.kernels.cpu.runtime.memory import scratch
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.nn.ops.contract import OnTensors
from sparselab.nn.ops.conv.dense import dense_products, in_c_order
from sparselab.nn.ops.conv.geometry import Geometry, Pair
from sparselab.nn.ops.cpu.csr import dense_blocks, row_ranges
from sparselab.nn.ops.cpu.memory import LIKE, as_array, as_vector, in_order, nbytes, zero_vector
from sparselab.nn.ops.cpu.threads import use_torch_threads
from sparselab.nn.ops.cpu.variants import CONVOLUTIONS, choose_name

#: Planes of one chunk, unless one image takes more.
_CHUNK_BYTES = 8 << 20


class ConvolutionPlans:
    """Plans of one topology for one geometry, each made when it is first needed."""

    def __init__(self, topology: RowTopology, geometry: Geometry) -> None:
        self.geometry = geometry
        self.begin, self.end = topology.rows.indptr[:-1], topology.rows.indptr[1:]
        rows, columns = topology.shape
        self.shape = rows, geometry.in_channels * geometry.elements
        self.indices = topology.rows.indices
        self._transposed: PlanePlan | None = None
        if geometry.groups > 1:
            # The matrix of all groups, each on its own channels.
            group = self._rows() // (rows // geometry.groups)
            self.indices = (group * columns + self.indices).astype(index_dtype(self.shape[1]))

    def _rows(self) -> Array:
        """The row of each slot."""
        return np.repeat(np.arange(len(self.begin)), self.end - self.begin)

    def is_dense(self, operation: str, y: Tensor) -> bool:
        """Whether a dense product is quicker, for outputs y or their gradient."""
        size = self.shape[0] * self.geometry.columns
        n_tokens = y.numel() // max(self.shape[0], 1)
        if self.geometry.groups > 1 or not size:
            return False
        return choose_name(operation, n_tokens, len(self.indices) / size, CONVOLUTIONS) == "dense blocks"

    @cached_property
    def forward(self) -> Segments:
        """Plan of the product."""
        return plan_shifted(
            self.begin, self.end - self.begin, self.indices, self.shape, self.geometry.elements
        )

    def input_grad(self, grid: Grid) -> PlanePlan:
        """Plan of the gradient by the input: rows are planes, columns are outputs times elements."""
        if self._transposed is None:
            # All grids of a geometry have the same phases.
            self._transposed = self._transpose(grid.phase, len(grid.phases))
        return self._transposed

    def keep_forward(self) -> None:
        """Let go of the plan of the gradient by the input."""
        self._transposed = None

    @property
    def nbytes(self) -> int:
        """Bytes of the plans made so far."""
        own = self.indices.nbytes if self.geometry.groups > 1 else 0
        return own + nbytes(self.__dict__.get("forward")) + nbytes(self._transposed)

    def _transpose(self, phase: Array, n_phases: int) -> PlanePlan:
        elements = self.geometry.elements
        channel, element = np.divmod(self.indices.astype(np.int64), elements)
        shape = self.geometry.in_channels * n_phases, self.shape[0] * elements
        plane = channel * n_phases + phase[element]
        # A stable sort of short integers takes linear time; of equal planes, the slots stay in order.
        slots = np.argsort(plane.astype(index_dtype(shape[0])), kind="stable")
        indices = (self._rows() * elements + element)[slots].astype(index_dtype(shape[1]))
        indptr = np.zeros(shape[0] + 1, np.int64)
        np.cumsum(np.bincount(plane, minlength=shape[0]), out=indptr[1:])
        segments = plan_shifted(indptr[:-1], np.diff(indptr), indices, shape, elements)
        return PlanePlan(indptr, indices, slots.astype(np.int32), segments)


def product(
    topology: OnTensors, values: Tensor, x: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """The convolution of x (n, in_channels, height, width), in the dtype and the memory format of x."""
    if x.dtype == torch.bfloat16:
        wide = None if bias is None else bias.detach().float()
        return product(topology, values, x.float(), wide, geometry).to(torch.bfloat16)
    use_torch_threads()
    plans, (grid, outputs) = _plans(topology, geometry), _grids(geometry, (x.shape[2], x.shape[3]))
    y = _empty_like(x, (len(x), plans.shape[0], *grid.outputs))
    if plans.is_dense("forward", y):
        dense, images = dense_products(geometry, (x.shape[2], x.shape[3])), in_c_order(x.detach())
        for first, last, kernels in _kernels(values, plans, x):
            part = None if bias is None else bias.detach()[first:last]
            # A second derivative may be asked for where autocast is on, which leaves gradients alone.
            with torch.autocast("cpu", enabled=False):
                y[:, first:last] = dense.product(images, kernels, part)
        return y
    weights = as_vector(values)
    offset = zero_vector(y.shape[1], x.dtype) if bias is None else as_vector(bias)
    for first, last in _chunks(x, y, grid):
        n_tokens = whole_tiles((last - first) * grid.tokens, x.itemsize)
        X, Y = _planes(as_array(x).dtype, (_n_planes(x, grid), n_tokens + grid.tail), (y.shape[1], n_tokens))
        fill_planes(as_array(x[first:last]), grid, X)
        multiply_shifted(
            weights, plans.indices, plans.forward, _starts(X, grid), X, Y, n_tokens, offset
        )  # fmt: skip
        read_planes(as_array(y[first:last]), outputs, Y)
    return y


def input_grad(topology: OnTensors, values: Tensor, grad: Tensor, geometry: Geometry, size: Pair) -> Tensor:
    """The gradient by x (n, in_channels, height, width), in the dtype and the memory format of dy."""
    if grad.dtype == torch.bfloat16:
        return input_grad(topology, values, grad.float(), geometry, size).to(torch.bfloat16)
    use_torch_threads()
    plans, (grid, outputs) = _plans(topology, geometry), _grids(geometry, size)
    dx = _empty_like(grad, (len(grad), geometry.in_channels, *size))
    if not grid.is_onto(size):
        dx.zero_()
    if plans.is_dense("input_grad", grad):
        dx.zero_()
        dense = dense_products(geometry, size)
        for first, last, kernels in _kernels(values, plans, grad):
            dx += dense.input_grad(grad.detach()[:, first:last], kernels)
        return dx
    plan = plans.input_grad(grid)
    held = in_order(values)
    weights = gather(held.data_ptr(), LIKE[held.dtype], plan.slots, as_array(dx).dtype)
    nothing = zero_vector(_n_planes(dx, grid), dx.dtype)
    for first, last in _chunks(dx, grad, grid):
        n_tokens = whole_tiles((last - first) * grid.tokens + grid.tail, dx.itemsize)
        DY, DX = _planes(weights.dtype, (grad.shape[1], grid.tail + n_tokens), (len(nothing), n_tokens))
        fill_planes(as_array(grad[first:last]), outputs, DY, grid.tail)
        # What an output reads `shift` further on gets its gradient from `shift` before.
        starts = np.add.outer(np.arange(len(DY)) * DY.shape[1], grid.tail - grid.shift).reshape(-1)
        multiply_shifted(weights, plan.indices, plan.segments, starts, DY, DX, n_tokens, nothing)
        read_planes(as_array(dx[first:last]), grid, DX)
    return dx


def values_grad(topology: OnTensors, grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """The gradient by the values, (nnz, 1, 1), in the dtype of dy."""
    if grad.dtype == torch.bfloat16:
        return values_grad(topology, grad.float(), x.float(), geometry).to(torch.bfloat16)
    use_torch_threads()
    plans, (grid, outputs) = _plans(topology, geometry), _grids(geometry, (x.shape[2], x.shape[3]))
    result = grad.new_zeros(topology.values_shape)
    flat = as_vector(result)
    if plans.is_dense("values_grad", grad):
        dense, images = dense_products(geometry, (x.shape[2], x.shape[3])), in_c_order(x.detach())
        for first, last in row_ranges(plans, grad):
            kernels = dense.weight_grad(grad.detach()[:, first:last], images)
            collect_rows(
                as_array(kernels.reshape(-1)), plans.indices, plans.begin, plans.end, first, last,
                plans.shape[1], flat,
            )  # fmt: skip
        return result
    for first, last in _chunks(x, grad, grid):
        n_tokens = whole_tiles((last - first) * grid.tokens, x.itemsize)
        X, DY = _planes(
            as_array(x).dtype, (_n_planes(x, grid), n_tokens + grid.tail), (grad.shape[1], n_tokens)
        )
        fill_planes(as_array(x[first:last]), grid, X)
        fill_planes(as_array(grad[first:last]), outputs, DY)
        sample_shifted(
            plans.indices, plans.begin, plans.end, _starts(X, grid), DY, X, n_tokens, flat
        )  # fmt: skip
    return result


def _empty_like(images: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Images of another shape, in channels_last if those are so."""
    last = torch.channels_last
    is_last = not images.is_contiguous() and images.is_contiguous(memory_format=last)
    return torch.empty(shape, dtype=images.dtype, memory_format=last if is_last else torch.contiguous_format)


def _kernels(values: Tensor, plans: ConvolutionPlans, like: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Rows and their dense kernels, lent until the next ones are made."""
    geometry = plans.geometry
    for first, last, block in dense_blocks(values, plans, like):
        yield first, last, block.view(last - first, geometry.in_channels, *geometry.kernel)


def _plans(topology: OnTensors, geometry: Geometry) -> ConvolutionPlans:
    own: RowTopology = topology.own  # type: ignore[assignment]
    return own.plan(("cpu", "conv2d", geometry), partial(ConvolutionPlans, geometry=geometry))


@lru_cache(maxsize=256)
def _grids(geometry: Geometry, size: Pair) -> tuple[Grid, Grid]:
    """Where the pixels of images of this size go, and those of their outputs."""
    grid = input_grid(size, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation)
    return grid, output_grid(grid)


def _n_planes(x: Tensor, grid: Grid) -> int:
    return x.shape[1] * len(grid.phases)


def _chunks(x: Tensor, y: Tensor, grid: Grid) -> Iterator[Pair]:
    """Ranges of images whose planes stay within `_CHUNK_BYTES`, or of one image; nothing if y is empty."""
    if y.numel() == 0:
        return
    image = (_n_planes(x, grid) + y.shape[1]) * grid.tokens * x.itemsize
    n_chunks = -(-len(x) // max(1, _CHUNK_BYTES // image))
    yield from itertools.pairwise(i * len(x) // n_chunks for i in range(n_chunks + 1))


def _planes(dtype: np.dtype[Any], *sizes: Pair) -> list[Array]:
    """Uninitialised planes, so many of at least so many tokens each, lent until the next call."""
    shapes = [(n, plane_stride(tokens, dtype.itemsize)) for n, tokens in sizes]
    ends = list(itertools.accumulate(n * stride for n, stride in shapes))
    memory = scratch(1, ends[-1], dtype)[0]
    return [
        memory[end - n * stride : end].reshape(n, stride)
        for end, (n, stride) in zip(ends, shapes, strict=True)
    ]


def _starts(X: Array, grid: Grid) -> Array:
    """Where in X, flat, the tokens of each column of W begin."""
    n_channels = len(X) // len(grid.phases)
    channel = np.arange(n_channels) * (len(grid.phases) * X.shape[1])
    starts: Array = np.add.outer(channel, grid.phase * X.shape[1] + grid.shift).reshape(-1)
    return starts
