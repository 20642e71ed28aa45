"""Topologies that consist of torch tensors, and how an operator finds the one of the tensors it is given."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sparselab.kernels.layouts.block_csr import BlockTopology, check_block_shape, grid_of
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.kernels.layouts.topology import Topology
from sparselab.nn.ops.cpu.memory import nbytes
from sparselab.nn.ops.cpu.variants import Measured
from sparselab.nn.ops.operands import GradientOperands
from sparselab.nn.ops.products import find_products
from sparselab.nn.ops.tracing import has_memory

Sizes = tuple[int, int, int, int]
GradientHook = Callable[[GradientOperands], None]

#: Topologies of tensors that no layer holds which are kept for their next use.
_MOST_RECENT = 64


class HookPlace:
    """Where a layer has its gradient hook, for whatever topology it has."""

    def __init__(self) -> None:
        self._hook: GradientHook | None = None
        self._parameter: Callable[[], Tensor | None] = _nothing
        self._topologies: weakref.WeakSet[TensorTopology] = weakref.WeakSet()

    def __reduce__(self) -> tuple[type[HookPlace], tuple[()]]:
        # A hook belongs to the algorithm that set it, not to a copy.
        return HookPlace, ()

    @property
    def hook(self) -> GradientHook | None:
        """Called in a backward pass with the operands of the gradient by the weights."""
        return self._hook

    @hook.setter
    def hook(self, hook: GradientHook | None) -> None:
        self._hook = hook
        for topology in self._topologies:
            topology.note_hooks()

    def serve(self, topology: TensorTopology, parameter: Callable[[], Tensor | None]) -> None:
        """Let the hook see the operands of gradients by values of this topology.

        Parameters
        ----------
        topology : TensorTopology
        parameter : callable
            Returns the layer's Parameter, or None if it has none.
        """
        self._parameter = parameter
        self._topologies.add(topology)
        topology.places.append(self)
        topology.note_hooks()

    def is_of(self, leaf: Tensor) -> bool:
        """Whether that is the layer's Parameter, or the layer has none."""
        parameter = self._parameter()
        return parameter is None or parameter is leaf


def _nothing() -> None:
    return None


class TensorTopology:
    """A topology whose arrays are the memory of two tensors, with what products on tensors need of it.

    Parameters
    ----------
    indptr, indices : Tensor
        Of compressed rows, or what the layout keeps in two tensors.
    sizes : (int, int, int, int)
        Outputs and inputs of the layer, outputs and inputs of a block.
    layout : str

    Attributes
    ----------
    own : Topology
        Of `sparselab.kernels`. Its arrays are those of the tensors, unless these are not contiguous.
    shape : (int, int)
        Outputs and inputs.
    values_shape : tuple of int
        Connections, outputs and inputs of a block: the shape of values and their gradient.
    device : torch.device
    products : LinearProducts
    measured : Measured or None
        Which way forward passes go, if that was measured.

    Raises
    ------
    TypeError, ValueError
        If the tensors are no valid topology: this is the last place before the kernels, which check no
        bounds.
    NotImplementedError
        If nothing computes with this layout on this device.

    Notes
    -----
    The tensors must stay as they are, which `is_of` notices by torch's version counters. A write that passes
    these by (through ``Tensor.data`` or ``Tensor.numpy()``) goes unnoticed, as it does by autograd. Tensors
    made in inference mode have no such counter; of these the topology has copies, and compares.
    """

    def __init__(self, indptr: Tensor, indices: Tensor, sizes: Sequence[int], layout: str) -> None:
        self.sizes, self.layout = _check_sizes(sizes), layout
        self.device = indices.device
        self.products = find_products("linear", layout, self.device.type)
        #: The tensors themselves, whose version counters tell of writes.
        self.tensors = indptr, indices
        self._stamps = _stamp(indptr), _stamp(indices)
        #: The memory, which is held so that no other tensor can come to have the address, and which cannot be
        #: resized while it is seen as arrays.
        self._arrays = _array("indptr", indptr), _array("indices", indices)
        self.own = _read(layout)(*self._arrays, self.sizes)
        self.shape = self.own.shape
        self.values_shape = torch.Size((self.own.nnz, *self.own.block_shape))
        self.bias_shape = torch.Size((self.shape[0],))
        self.is_cpu = self.device.type == "cpu"
        self.measured: Measured | None = None
        #: All gradients at once, if the products have that.
        self.gradients: Any = getattr(self.products, "gradients", None)
        #: What the products keep from call to call.
        self.kept: Any = None
        #: Those of the layers that have this topology.
        self.places: list[HookPlace] = []
        #: Whether a hook wants to see operands.
        self.is_watched = False

    def is_of(self, indptr: Tensor, indices: Tensor) -> bool:
        """Whether these are the tensors that the topology was made of, unchanged."""
        a, b = self._stamps
        if a is None or b is None:
            given = indptr.cpu().numpy(), indices.cpu().numpy()
            return all(map(np.array_equal, self._arrays, given))
        mine, columns = self.tensors
        if mine is indptr and columns is indices:
            return (indptr.data_ptr(), indptr._version) == a and (indices.data_ptr(), indices._version) == b
        return (
            a == _stamp(indptr) == _stamp(mine)
            and b == _stamp(indices) == _stamp(columns)
            and _form(indptr) == _form(mine)
            and _form(indices) == _form(columns)
        )

    def require_unchanged(self) -> None:
        """Raise RuntimeError if the topology has changed since the forward pass."""
        a, b = self._stamps
        if a is None or b is None:
            return
        indptr, indices = self.tensors
        if (indptr.data_ptr(), indptr._version) != a or (indices.data_ptr(), indices._version) != b:
            raise RuntimeError(
                "the topology needed for gradient computation has been modified by an inplace operation: a "
                "rewrite, load_state_dict or reset_parameters between the forward and the backward pass"
            )

    def is_trained(self, leaf: Tensor | None) -> bool:
        """Whether gradients by a leaf of the graph are some layer's, as far as that is known.

        They are not if another tensor was put in the Parameter's place, as by `torch.func.functional_call`.
        """
        return leaf is None or any(place.is_of(leaf) for place in self.places)

    def note_hooks(self) -> None:
        """Look anew whether a hook wants to see operands."""
        self.is_watched = any(place.hook is not None for place in self.places)

    def show_lent(self, operands: GradientOperands) -> None:
        """As `show`, of operands that an operator was given.

        A compiled graph uses their memory for something else as soon as the operator returns.
        """
        self.show(operands.copied())

    def show(self, operands: GradientOperands) -> None:
        """Call the hooks with the operands of a gradient by the values."""
        for place in list(self.places):
            if place.hook is not None:
                place.hook(operands)

    def keep_forward(self) -> None:
        """Let go of the plans of the backward passes; they are made anew if they are needed."""
        self.products.keep_forward(self)
        for plan in self.own.plans().values():
            if isinstance(plan, KeepsForward):
                plan.keep_forward()

    @property
    def plan_bytes(self) -> int:
        """Bytes of the plans made so far."""
        return sum(nbytes(plan) for key, plan in self.own.plans().items() if isinstance(key, tuple))


#: indptr, indices, sizes and layout, as operators take them.
TopologyArguments = tuple[Tensor, Tensor, list[int], str]


class HoldsTopology(Protocol):
    """What a layer asks for its topology: its storage."""

    def topology(self, layer: Any) -> TensorTopology:
        """The topology that the layer has now."""

    def arguments(self, layer: Any) -> TopologyArguments:
        """The same in the words of an operator."""


class HasStorage(Protocol):
    """A layer."""

    @property
    def storage(self) -> HoldsTopology:
        """What holds its topology."""


@runtime_checkable
class KeepsForward(Protocol):
    """A plan of several parts, of which backward passes alone need some."""

    def keep_forward(self) -> None:
        """Let go of these."""


#: Makes a topology of two arrays and the sizes, by layout.
_readers: dict[str, Callable[[Any, Any, Sizes], Topology]] = {}


def register_layout(layout: str, read: Callable[[Any, Any, Sizes], Topology]) -> None:
    """Say how a layout is read from two tensors.

    Parameters
    ----------
    layout : str
        `sparselab.kernels.layouts.topology.Topology.layout`.
    read : callable
        ``read(indptr, indices, sizes)`` with two arrays, not to be written to, and
        ``(out_features, in_features, block_out, block_in)``; returns the topology, or raises TypeError or
        ValueError unless it is valid.

    Raises
    ------
    ValueError
        If the layout is known.
    """
    if layout in _readers:
        raise ValueError(f"layout must be new, got {layout!r}")
    _readers[layout] = read


def unregister_layout(layout: str) -> None:
    """Take back what `register_layout` was told."""
    del _readers[layout]


def _read(layout: str) -> Callable[[Any, Any, Sizes], Topology]:
    if layout not in _readers:
        raise ValueError(f"layout must be one of {', '.join(_readers)}, got {layout!r}")
    return _readers[layout]


def _read_rows(indptr: Any, indices: Any, sizes: Sizes) -> RowTopology:
    if sizes[2:] != (1, 1):
        raise ValueError(f"sizes must end in 1, 1 for the layout 'csr', got {list(sizes)}")
    return _rows(sizes[:2], indptr, indices)


def _read_blocks(indptr: Any, indices: Any, sizes: Sizes) -> BlockTopology:
    shape, block_shape = sizes[:2], check_block_shape(sizes[2:])
    return BlockTopology(shape, block_shape, _rows(grid_of(shape, block_shape), indptr, indices))


def _rows(shape: tuple[int, int], indptr: Any, indices: Any) -> RowTopology:
    if indptr.dtype != np.int64 or indptr.shape != (shape[0] + 1,):
        raise ValueError(
            f"indptr must be int64 of shape ({shape[0] + 1},), got {indptr.dtype} {indptr.shape}"
        )
    if indices.ndim != 1:
        raise ValueError(f"indices must have one dimension, got shape {indices.shape}")
    if indptr[0] != 0:
        raise ValueError(
            f"indptr must start at 0, got {indptr[0]}; a layer whose memory nothing was written to (after "
            "to_empty or skip_init) has no connections: load a state, or call sparselab.materialize"
        )
    topology = RowTopology.adopt(shape, indptr, np.diff(indptr), indices)
    topology.check()
    return topology


register_layout("csr", _read_rows)
register_layout("bsr", _read_blocks)


#: All topologies that somebody holds, and those used last whose tensors belong to no layer.
_known: weakref.WeakValueDictionary[Any, TensorTopology] = weakref.WeakValueDictionary()
_recent: OrderedDict[Any, TensorTopology] = OrderedDict()
_lock = threading.Lock()


def _forget_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    # Another thread may have held it when the process forked, and is not there to give it back.
    os.register_at_fork(after_in_child=_forget_lock)


def find_topology(indptr: Tensor, indices: Tensor, sizes: Sequence[int], layout: str) -> TensorTopology:
    """The topology of two tensors: that of the layer they belong to, or one made for them.

    Tensors are known by their address, version, dtype, shape and strides, and a topology holds the memory of
    its own, so that none can be taken for another. Of tensors without a layer, as in an exported program, the
    topologies used last are kept.

    Parameters
    ----------
    indptr, indices, sizes, layout
        As of `TensorTopology`.
    """
    key = _key(indptr, indices, sizes, layout)
    with _lock:
        found = _known_or_new(key, indptr, indices, sizes, layout)
        if key in _recent:
            _recent.move_to_end(key)
            if len(_recent) > _MOST_RECENT:
                _recent.popitem(last=False)
    return found


def hold_topology(indptr: Tensor, indices: Tensor, sizes: Sequence[int], layout: str) -> TensorTopology:
    """As `find_topology`, for a layer, which holds what is returned."""
    key = _key(indptr, indices, sizes, layout)
    with _lock:
        found = _known_or_new(key, indptr, indices, sizes, layout)
        _recent.pop(key, None)
    return found


def _known_or_new(
    key: tuple[Any, ...], indptr: Tensor, indices: Tensor, sizes: Sequence[int], layout: str
) -> TensorTopology:
    found = _known.get(key)
    if found is None or not found.is_of(indptr, indices):
        found = _known[key] = _recent[key] = TensorTopology(indptr, indices, sizes, layout)
    return found


def _key(indptr: Tensor, indices: Tensor, sizes: Sequence[int], layout: str) -> tuple[Any, ...]:
    return _stamp(indptr), _form(indptr), _stamp(indices), _form(indices), tuple(sizes), layout


def _stamp(tensor: Tensor) -> tuple[int, int] | None:
    """Where a tensor is and how often it was written to; None if nobody counts that."""
    return None if tensor.is_inference() else (tensor.data_ptr(), tensor._version)


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride()


def _array(name: str, tensor: Tensor) -> Any:
    """The memory of a tensor, or a copy if nobody counts the writes to it."""
    if tensor.layout is not torch.strided or tensor.is_floating_point():
        raise TypeError(f"{name} must be a dense tensor of integers, got {tensor.dtype} of {tensor.layout}")
    if not has_memory(tensor):
        raise RuntimeError(f"{name} must have memory for all of its entries; its storage was resized")
    # Detached, because the array must hold the memory and not the tensor, whose `data` may be replaced.
    array = tensor.detach().cpu().numpy()
    return array.copy() if tensor.is_inference() else array


def _check_sizes(sizes: Sequence[int]) -> Sizes:
    if len(sizes) != 4 or min(sizes) < 0:
        raise ValueError(f"sizes must be four numbers of at least 0, got {list(sizes)}")
    rows, columns, height, width = sizes
    return int(rows), int(columns), int(height), int(width)
