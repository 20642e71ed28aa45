"""Single connections in compressed rows: weights, columns, and where each row begins."""

from __future__ import annotations

import math
import weakref
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sparselab.kernels.arrays import Array, for_kernels, index_dtype
from sparselab.kernels.checks import ascending
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.kernels.layouts.sampling import sample_distinct
from sparselab.kernels.rewiring.rows import sample_rows
from sparselab.nn.ops.topologies import TensorTopology, hold_topology
from sparselab.nn.ops.tracing import is_plain, let_sizes_change
from sparselab.nn.storage.base import Storage, as_positions
from sparselab.nn.storage.checks import check_rows
from sparselab.nn.storage.entries import move_slots, repeated
from sparselab.nn.storage.init import fan_in_uniform_
from sparselab.nn.storage.narrow import find_narrow, make_room

let_sizes_change(("weight_values", "indices", "forward_mask"))


class Loaded(NamedTuple):
    """Columns, in the dtype in which the layer has them, and row pointers of a saved state."""

    indices: Tensor
    indptr: Tensor


class Compressed(Storage):
    """Live connections, and only those, row by row.

    Parameters
    ----------
    shape : (int, int)
    block_shape : (int, int)
    fan_in : int, optional
        Connections that every row is given when they are drawn.

    Notes
    -----
    The layer gets a Parameter `weight_values` (connections, block_out, block_in), which is (nnz, 1, 1) where
    connections are single weights, and the buffers `indptr` (grid rows + 1,) and `indices` (connections,).
    """

    layout: ClassVar[str] = "csr"
    saved: ClassVar[tuple[str, ...]] = "weight_values", "indptr", "indices"
    pattern = "indptr", "indices"

    def __init__(
        self, shape: tuple[int, int], block_shape: tuple[int, int] = (1, 1), fan_in: int | None = None
    ) -> None:
        super().__init__(shape, block_shape)
        self.fan_in = fan_in
        self._topology: TensorTopology | None = None

    def register(
        self, layer: Any, nnz: int, device: torch.device | str | int | None, dtype: torch.dtype
    ) -> None:
        """Make the tensors, uninitialised, and register them."""
        place = torch.empty(0, device=device).device
        rows, columns = self.grid
        column = torch.from_numpy(np.empty(0, index_dtype(columns))).dtype
        layer.weight_values = nn.Parameter(torch.empty((nnz, *self.block_shape), device=place, dtype=dtype))
        indptr = torch.empty(rows + 1, dtype=torch.int64, device=place)
        layer.register_buffer("indptr", indptr, persistent="indptr" in self.saved)
        layer.register_buffer("indices", torch.empty(nnz, dtype=column, device=place))

    def topology(self, layer: Any) -> TensorTopology:
        """The topology that the tensors are now; made once, and kept until they change."""
        if self.kin is not None:
            self.kin.check(layer)
        buffers = layer._buffers
        indptr, indices = buffers["indptr"], buffers["indices"]
        found = self._topology
        if found is None or not found.is_of(indptr, indices):
            found = hold_topology(indptr, indices, (*self.shape, *self.block_shape), self.layout)
            if self.hook_place not in found.places:
                self.hook_place.serve(found, partial(_parameter_of, weakref.ref(layer), self.parameter))
            self._topology = found
            if self.measured is not None and self.measured.density != layer.density:
                self.measured = None
            found.measured = self.measured
        return found

    def refresh(self, layer: Any) -> None:
        """See to it that operators which are given the tensors of the layer find its gradient hook."""
        if self.kin is not None:
            self.kin.settle(layer)
        if self.hook_place.hook is not None and not layer.indices.is_meta:
            self.topology(layer)

    def plan_bytes(self) -> int:
        """Bytes of the kernel plans held now."""
        return 0 if self._topology is None else self._topology.plan_bytes

    def arguments(self, layer: Any) -> tuple[Tensor, Tensor, list[int], str]:
        """The topology in the words of an operator."""
        if self.kin is not None and is_plain(layer.indptr, layer.indices):
            self.kin.check(layer)
        return layer.indptr, layer.indices, [*self.shape, *self.block_shape], self.layout

    def nnz(self, layer: Any) -> int:
        """Live connections."""
        return int(layer._buffers["indices"].shape[0])

    def positions(self, layer: Any) -> Tensor:
        """int64 (nnz,), ascending."""
        rows, columns = self.grid
        row = repeated(torch.arange(rows, device=layer.indptr.device), torch.diff(layer.indptr))
        positions: Tensor = row * columns + layer.indices.long()
        return positions

    def matrix(self, layer: Any) -> RowTopology:
        """The connections on the grid; nothing is copied."""
        indptr, columns = layer.indptr.cpu().numpy(), layer.indices.cpu().numpy()
        return RowTopology.adopt(self.grid, indptr, np.diff(indptr), columns)

    def take(self, layer: Any, entries: Tensor) -> Tensor:
        """(nnz,): there is one entry for each connection."""
        return entries.reshape(-1)

    @torch.no_grad()
    def put(self, layer: Any, entries: Tensor, slots: Tensor, numbers: Tensor) -> None:
        """Set the entries of some slots."""
        entries[slots.long()] = numbers.reshape(-1, 1, 1).to(entries.dtype)

    def move(self, layer: Any, entries: Tensor, source: Tensor) -> Tensor:
        """What lives per entry, after a rewrite."""
        return move_slots(entries, source, (len(source), *self.block_shape))

    def rewrite(self, layer: Any, drop: Tensor, grow: Tensor) -> Tensor:
        """Drop slots and grow positions in place; the Parameter stays the same object."""
        held = self.held(layer)
        if held.itemsize < 4:
            kind = str(held.dtype).removeprefix("torch.")
            raise TypeError(f"values must be float32 or float64 for a change of topology, got {kind}")
        new, source = self.matrix(layer).rewrite(
            ascending(as_positions(drop)), ascending(as_positions(grow)), compact=True
        )
        self.check_rows(new.row_nnz)
        self.foresee_change(layer)
        moved = torch.from_numpy(source)
        # In place where the count stays, and nothing can fail from here on.
        weights = self.move(layer, held.detach(), moved)
        # Set aside meanwhile: a Parameter and its gradient have the same shape.
        gradient, held.grad = held.grad, None
        self.store(layer, new.indptr, new.indices)
        with torch.no_grad():
            held.copy_(weights)
        del new, weights
        if gradient is not None:
            held.grad = self.move(layer, gradient, moved)
        if layer.forward_mask is not None:
            layer.forward_mask = self.move(layer, layer.forward_mask, moved)
        return moved

    @torch.no_grad()
    def connect(self, layer: Any, positions: Tensor, weights: Tensor | None) -> None:
        """Replace the topology and the weights, by default with fresh ones."""
        held = self.held(layer)
        self.set_positions(layer, positions.cpu().numpy())
        layer.forward_mask = held.grad = None
        if weights is None:
            self.draw_weights(layer)
        else:
            held.copy_(weights.view(held.shape))

    def set_positions(self, layer: Any, positions: Array) -> None:
        """Take over a topology; what the weights were is lost if there are fewer or more of them now."""
        rows, n_columns = self.grid
        row = positions // max(n_columns, 1)
        begin = np.zeros(rows + 1, np.int64)
        np.cumsum(np.bincount(row, minlength=rows), out=begin[1:])
        columns = (positions - row * n_columns).astype(index_dtype(n_columns))
        self.check_rows(np.diff(begin))
        self.store(layer, begin, columns)

    def check_rows(self, row_nnz: Array) -> None:
        """Raise ValueError if rows may not have these lengths."""

    @torch.no_grad()
    def store(self, layer: Any, indptr: Array, indices: Array) -> None:
        """Copy a topology into the buffers."""
        self.foresee_change(layer)
        self.resize(layer, len(indices))
        layer.indices.copy_(torch.from_numpy(for_kernels(indices)))
        layer.indptr.copy_(torch.from_numpy(for_kernels(indptr)))
        self.refresh(layer)

    def resize(self, layer: Any, nnz: int) -> None:
        """Make room for so many connections; what Parameter, gradient and columns held is lost."""
        if nnz == layer.indices.shape[0]:
            return
        held = self.held(layer) if find_narrow(layer) is None else None
        with torch.inference_mode(False):
            if held is None:
                make_room(layer, nnz)
            else:
                values = held.data.new_empty((nnz, *self.block_shape))
                other = torch.float64 if values.dtype == torch.float32 else torch.float32
                held.grad = None
                # A graph that is still alive (the user holds a loss) holds the node that accumulates this
                # parameter's gradient, and the node remembers the shape. Torch replaces it for another dtype.
                held.data = values.new_empty(0, dtype=other)
                held.data = values
            # Both anew, so that a state which was taken before stays what it was; their graphs are told.
            layer.indptr.add_(0)
            layer.indices = layer.indices.new_empty(nnz)
            layer.indptr = layer.indptr.new_empty(len(layer.indptr))

    def draw(self, layer: Any, rng: np.random.Generator) -> Array:
        """As many random positions as there are connections, ascending."""
        rows, columns = self.grid
        nnz, fan_in = self.nnz(layer), self.fan_in
        if fan_in is not None and nnz == rows * fan_in:
            by_row: Array = sample_rows(rng, np.full(rows, columns), np.full(rows, fan_in))
            return by_row
        drawn: Array = sample_distinct(rng, math.prod(self.grid), nnz)
        return drawn

    def spread(self, layer: Any, values: Tensor) -> Tensor:
        """Values as a dense matrix of the shape of W, with their gradient."""
        dense = values.new_zeros(math.prod(self.shape))
        return dense.index_put_((self.positions(layer),), values.reshape(-1)).view(self.shape)

    def entries(self, layer: Any) -> tuple[RowTopology, Tensor | slice]:
        """All single weights row by row: where each is in W, and in the flattened values."""
        return self.matrix(layer), slice(None)

    def clear_outside(self, layer: Any, entries: Tensor) -> None:
        """Set to 0 what of the entries lies outside W."""

    def draw_weights(self, layer: Any) -> None:
        """Fresh weights."""
        fan_in_uniform_(layer.weight_values, layer.indptr)

    def input_pointers(self, layer: Any) -> Tensor:
        """Row pointers (out_features + 1,) whose differences are the inputs that each output has."""
        indptr: Tensor = layer.indptr
        return indptr

    def check_state(self, state: dict[str, Any], columns: torch.dtype) -> Loaded | None:
        """What a saved state says of the connections; None if it has nothing of W.

        Raises TypeError or ValueError if it is not valid.
        """
        indices = check_rows(state, self.grid, self.block_shape, columns)
        return None if indices is None else Loaded(indices, state["indptr"])

    def load(self, layer: Any, state: dict[str, Any], prefix: str, loaded: Loaded) -> dict[str, Any]:
        """Make room, and return the state as torch shall load it there."""
        self.foresee_change(layer)
        self.resize(layer, len(loaded.indices))
        state[prefix + "indices"] = loaded.indices
        return state

    def save(self, layer: Any, destination: dict[str, Any], prefix: str) -> None:
        """Add to a saved state what the tensors do not say."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_topology": None}


def _parameter_of(layer: weakref.ref[Any], name: str) -> Tensor | None:
    """The Parameter that a layer has under a name; None if the layer is gone or computes it."""
    held = layer()
    return None if held is None else held._parameters.get(name)
