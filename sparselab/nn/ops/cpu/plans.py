"""Kernel plans of a layer, which the operators find by a number.

An operator takes tensors and numbers. It is given a number and not the plans, because what `torch.compile`
has traced must stay true when the topology changes: the number stays the same, and the operator looks at the
topology it is given each time it runs. No number is used twice. A number without a layer, or with another
topology, costs time and is never wrong.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sparselab.kernels.cpu.bsr.plan import PanelPlan, panel_plan, plan_key, wants_transpose
from sparselab.kernels.cpu.csr.plan import (
    GRADIENT,
    PRODUCT_T,
    Segments,
    TransposePlan,
    gradient_plan,
    product_plan,
    transpose_plan,
)
from sparselab.kernels.layouts.block_csr import BlockTopology, grid_of
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.nn.ops.cpu.variants import BLOCKS, SINGLE, Measured, Rules, Variant, choose, choose_name

_numbers = itertools.count(1)
_layers: weakref.WeakValueDictionary[int, LayerPlans] = weakref.WeakValueDictionary()


class LayerPlans:
    """The plans, of one kind, of the topology that a layer has now."""

    def __init__(self, kind: type[Plans]) -> None:
        self.number = next(_numbers)
        self._kind = kind
        #: Those that were needed last.
        self.current: Any = None
        self._measured: Measured | None = None
        _layers[self.number] = self

    def of(self, indptr: Tensor, indices: Tensor, sizes: Any) -> Any:
        """The plans of this topology; those of the one before are let go."""
        plans = self.current
        if plans is not None and plans.is_of(indptr, indices, sizes):
            return plans
        if plans is None or plans.key != _key(indptr, indices, sizes):
            plans = self.current = self._kind(indptr, indices, sizes)
            plans.measured = self.measured(plans.density)
        return plans

    def remember(self, measured: Measured | None) -> None:
        """Choose forward variants by what was measured, as long as the density stays; None: by the rule."""
        self._measured = measured
        if self.current is not None:
            self.current.measured = measured

    def variant(self, operation: str, n_tokens: int, density: float) -> Variant:
        """The variant for a product of a layer of that density, and why."""
        return choose(operation, n_tokens, density, self.measured(density), self._kind.rules)

    def measured(self, density: float) -> Measured | None:
        """What was measured at this density; of another one it is forgotten."""
        if self._measured is not None and self._measured.density != density:
            self._measured = None
        return self._measured

    def keep_forward(self) -> None:
        """Let go of the plans of the backward passes; they are made anew if they are needed."""
        if self.current is not None:
            self.current.keep_forward()

    @property
    def nbytes(self) -> int:
        """Bytes of the plans made so far."""
        return 0 if self.current is None else self.current.nbytes


class OtherPlans(Protocol):
    """Plans made from those of a topology."""

    @property
    def nbytes(self) -> int: ...

    def keep_forward(self) -> None: ...


class Plans:
    """What the plans of a topology are known by, and the rules that choose among them.

    Parameters
    ----------
    indptr, indices : Tensor
        Of the topology.
    sizes : hashable
        What else it depends on.
    """

    rules: ClassVar[Rules]
    shape: tuple[int, int]
    density: float
    #: How values and gradient are laid out.
    layout: tuple[int, ...]

    def __init__(self, indptr: Tensor, indices: Tensor, sizes: Any) -> None:
        self.key = _key(indptr, indices, sizes)
        self._seen = indptr, indices, _stamp(indptr), _stamp(indices)
        # These hold the memory, so that no other tensor can come to have the addresses in the key.
        self._held = indptr.detach(), indices.detach()
        self.sizes = sizes
        self._zeros = torch.empty(0)
        self.measured: Measured | None = None

    def is_of(self, indptr: Tensor, indices: Tensor, sizes: Any) -> bool:
        """Whether these are the very tensors that the plans were made for, unchanged: a quick yes."""
        mine, columns, stamp, columns_stamp = self._seen
        return (
            sizes == self.sizes
            and mine is indptr
            and columns is indices
            and stamp == _stamp(indptr)
            and columns_stamp == _stamp(indices)
        )

    def variant(self, operation: str, n_tokens: int) -> str:
        """Name of the variant for a product, as it was measured or by the rule."""
        measured = self.measured if operation == "forward" else None
        name = None if measured is None else measured.name(n_tokens)
        return choose_name(operation, n_tokens, self.density, self.rules) if name is None else name

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """A zero for each row, to be read only."""
        if self._zeros.dtype != dtype or len(self._zeros) != self.shape[0]:
            self._zeros = torch.zeros(self.shape[0], dtype=dtype)
        return self._zeros


class TopologyPlans(Plans):
    """Plans of one topology, each made when it is first needed.

    Raises
    ------
    TypeError, ValueError
        From `RowTopology.check`: this is the last place before the kernels, which check no bounds.
    """

    rules = SINGLE

    def __init__(self, indptr: Tensor, indices: Tensor, in_features: int) -> None:
        super().__init__(indptr, indices, in_features)
        begin, columns = indptr.contiguous().numpy(), indices.contiguous().numpy().reshape(-1)
        self.shape = shape = (len(begin) - 1, in_features)
        self.topology = _rows(shape, begin, columns)
        self.layout = indices.shape
        self.indices = columns
        #: Row i is the slots ``begin[i] : end[i]``.
        self.begin, self.end = begin[:-1], begin[1:]
        size = shape[0] * shape[1]
        self.density = len(columns) / size if size else 1.0
        #: Plans for other kernels, by what they depend on beside the topology.
        self.others: dict[Any, OtherPlans] = {}

    @property
    def forward(self) -> Segments:
        """Plan of the product."""
        return product_plan(self.topology)

    @property
    def input_grad(self) -> TransposePlan:
        """Plan of the gradient by the input."""
        return transpose_plan(self.topology)

    @property
    def values_grad(self) -> Segments:
        """Plan of the gradient by the values."""
        return gradient_plan(self.topology)

    @property
    def nbytes(self) -> int:
        """Bytes of the plans made so far."""
        own = sum(nbytes(plan) for key, plan in self.topology.plans().items() if isinstance(key, tuple))
        return own + sum(each.nbytes for each in self.others.values())

    def keep_forward(self) -> None:
        """Let go of the plans of the backward passes."""
        self.topology.forget(lambda key: key not in (PRODUCT_T, GRADIENT))
        for each in self.others.values():
            each.keep_forward()


class BlockSizes(NamedTuple):
    """``(out_features, in_features)`` of a layer, and the shape of its blocks."""

    shape: tuple[int, int]
    block_shape: tuple[int, int]


class BlockPlans(Plans):
    """Plans of one topology of blocks, each made when it is first needed.

    Raises
    ------
    TypeError, ValueError
        From `RowTopology.check`, as of `TopologyPlans`.
    """

    rules = BLOCKS

    def __init__(self, indptr: Tensor, indices: Tensor, sizes: BlockSizes) -> None:
        super().__init__(indptr, indices, sizes)
        self.shape, self.block_shape = sizes
        columns = indices.contiguous().numpy()
        blocks = _rows(grid_of(self.shape, self.block_shape), indptr.contiguous().numpy(), columns)
        self.topology = BlockTopology(self.shape, self.block_shape, blocks)
        self.layout = self.topology.values_shape
        size = self.shape[0] * self.shape[1]
        self.outside = self.topology.outside()
        live = int(np.prod(self.layout)) - int(self.outside[1].sum())
        self.density = live / size if size else 1.0

    def product(self, transposed: bool) -> PanelPlan:
        """Plan of products with W, also of the gradient by its values, or with W^T."""
        return panel_plan(self.topology, transposed)

    def keep_forward(self) -> None:
        """Let go of the plan of products with W^T, unless it is the same; it is made anew if needed."""
        along = wants_transpose(self.block_shape, False)
        self.topology.forget(lambda key: key != plan_key(not along))

    @property
    def nbytes(self) -> int:
        """Bytes of the plans made so far."""
        return sum(nbytes(plan) for key, plan in self.topology.plans().items() if isinstance(key, tuple))


def _rows(shape: tuple[int, int], begin: Any, columns: Any) -> RowTopology:
    if len(begin) != shape[0] + 1:
        raise ValueError(f"indptr must have shape ({shape[0] + 1},), got {begin.shape}")
    if begin[0] != 0:
        raise ValueError(f"indptr must start at 0, got {begin[0]}")
    topology = RowTopology.adopt(shape, begin, np.diff(begin), columns)
    topology.check()
    return topology


def find_plans(number: int, indptr: Tensor, indices: Tensor, in_features: int) -> TopologyPlans:
    """Plans of this topology, from the layer of that number if it still exists."""
    plans: TopologyPlans = _layer(number, TopologyPlans).of(indptr, indices, in_features)
    return plans


def find_block_plans(number: int, indptr: Tensor, indices: Tensor, sizes: BlockSizes) -> BlockPlans:
    """As `find_plans`, for blocks."""
    plans: BlockPlans = _layer(number, BlockPlans).of(indptr, indices, sizes)
    return plans


def _layer(number: int, kind: type[Plans]) -> LayerPlans:
    layer = _layers.get(number)
    return LayerPlans(kind) if layer is None else layer


def _key(indptr: Tensor, indices: Tensor, sizes: int | BlockSizes) -> tuple[Any, ...]:
    return _identity(indptr), _identity(indices), sizes


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor is and how often it was written to; a detached tensor is the same one."""
    return *_stamp(tensor), tensor.dtype, tensor.shape, tensor.stride()


def _stamp(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def nbytes(plan: Any) -> int:
    """Bytes of the arrays of a plan."""
    if isinstance(plan, np.ndarray):
        return plan.nbytes
    return sum(nbytes(part) for part in plan) if isinstance(plan, tuple) else 0
