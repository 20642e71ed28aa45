"""Layers that keep their live connections, and only those, in compressed rows."""

from __future__ import annotations

import math
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from sparselab.kernels.arrays import Array, index_dtype, n_connections
from sparselab.kernels.checks import ascending
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.kernels.layouts.sampling import sample_distinct
from sparselab.nn.layers.base import SparseLayer
from sparselab.nn.ops.cpu.plans import LayerPlans, TopologyPlans
from sparselab.nn.storage.checks import check_dtype, check_topology
from sparselab.nn.storage.contract import as_matrix, largest_positions, move_slots
from sparselab.nn.storage.init import fan_in_uniform_

Layer = TypeVar("Layer", bound="CompressedRows")


class CompressedRows(SparseLayer):
    """A sparse layer with the state of `SparseLinear`; subclasses say what is computed with W."""

    values: nn.Parameter
    indptr: Tensor
    indices: Tensor
    #: What a saved state says of weights and topology.
    _saved: ClassVar[tuple[str, ...]] = "values", "indptr", "indices"
    _plans_kind: ClassVar[type[Any]] = TopologyPlans

    def _allocate(
        self,
        layout: tuple[int, ...],
        bias: bool,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Make the tensors, with values laid out so, and draw what they hold."""
        self._plans = LayerPlans(self._plans_kind)
        place = torch.empty(0, device=device).device
        dtype = torch.get_default_dtype() if dtype is None else dtype
        check_dtype("dtype", dtype)
        rows, columns = self.grid
        column = torch.from_numpy(np.empty(0, index_dtype(columns))).dtype
        self.values = nn.Parameter(torch.empty(layout, device=place, dtype=dtype))
        indptr = torch.empty(rows + 1, dtype=torch.int64, device=place)
        self.register_buffer("indptr", indptr, persistent="indptr" in self._saved)
        self.register_buffer("indices", torch.empty(self._index_layout(layout), dtype=column, device=place))
        self.bias = nn.Parameter(torch.empty(self.out_features, device=place, dtype=dtype)) if bias else None
        if place.type != "meta":
            self.reset_parameters()

    @classmethod
    def _from_largest(cls: type[Layer], dense: Any, sparsity: float) -> Layer:
        """The largest weights of a dense layer, by magnitude; of equal ones the first in row-major order."""
        nnz = n_connections((1, dense.weight.numel()), sparsity)
        return cls.from_positions(dense, largest_positions(dense.weight, nnz))

    @classmethod
    def from_positions(cls: type[Layer], dense: Any, positions: Tensor) -> Layer:
        """The weights of a dense layer at these int64 positions, ascending."""
        return cls._holding(dense, positions, dense.weight.detach().reshape(-1)[positions])

    @classmethod
    def _from_layer(cls: type[Layer], layer: SparseLayer) -> Layer:
        """The same connections, weights, biases, mode and trainability."""
        new = cls._holding(layer, layer.positions(), layer.per_connection(layer.stored.detach()))
        if layer.forward_mask is not None:
            new.forward_mask = layer.per_connection(layer.forward_mask).reshape(new.values.shape).clone()
        return new

    @classmethod
    def _holding(cls: type[Layer], like: Any, positions: Tensor, weights: Tensor, **settings: Any) -> Layer:
        """A layer like a dense or sparse one, with its biases, and with these connections."""
        size = math.prod(like.shape) if isinstance(like, SparseLayer) else like.weight.numel()
        new = cls.like(like, 1 - len(positions) / max(size, 1), device="meta", **settings)
        new = new.to_empty(device=weights.device)
        new._connect(positions, weights)
        if new.bias is not None:
            with torch.no_grad():
                new.bias.copy_(like.bias)
        return new

    def _dense_twin(self) -> Any:
        """A dense layer with the same outputs, mode and trainability."""
        settings = {name: getattr(self, name) for name in self._settings}
        new: Any = self._dense(
            **settings, bias=self.bias is not None, device=self.values.device, dtype=self.values.dtype
        )
        with torch.no_grad():
            self._spread(new.weight)
            if self.bias is not None:
                new.bias.copy_(self.bias).requires_grad_(self.bias.requires_grad)
        new.weight.requires_grad_(self.values.requires_grad)
        return new.train(self.training)

    def _spread(self, weight: Tensor) -> None:
        """Fill the weight of a dense twin."""
        weight.zero_().view(-1)[self.positions()] = self.per_connection(self._in_use)

    def reset_parameters(self) -> None:
        """Draw a new random topology of the same count, and new weights and biases."""
        seed = int(torch.randint(2**62, (), device="cpu").item())
        self._set_topology(self._draw_positions(np.random.default_rng(seed)))
        self.forward_mask = None
        self._draw_weights()
        self._draw_bias(self._fan_in_pointers())

    def _draw_weights(self) -> None:
        fan_in_uniform_(self.values, self.indptr)

    def _fan_in_pointers(self) -> Tensor:
        """Row pointers (out_features + 1,) whose differences are the inputs that each output has."""
        return self.indptr

    def _draw_positions(self, rng: np.random.Generator) -> Array:
        """As many random positions as there are connections, ascending."""
        drawn: Array = sample_distinct(rng, math.prod(self.grid), self.nnz)
        return drawn

    @torch.no_grad()
    def _connect(self, positions: Tensor, weights: Tensor | None) -> None:
        self._set_topology(positions.cpu().numpy())
        self.forward_mask = self.values.grad = None
        if weights is None:
            self._draw_weights()
        else:
            self.values.copy_(weights.view(self.values.shape))

    def _set_topology(self, positions: Array) -> None:
        rows, n_columns = self.grid
        row = positions // max(n_columns, 1)
        begin = np.zeros(rows + 1, np.int64)
        np.cumsum(np.bincount(row, minlength=rows), out=begin[1:])
        columns = (positions - row * n_columns).astype(index_dtype(n_columns))
        self._store(begin, columns)

    @torch.no_grad()
    def _store(self, indptr: Array, indices: Array) -> None:
        """Take over a topology; of another layout, what `values` and its gradient held is lost."""
        self._resize(self._layout(np.diff(indptr)))
        self.indices.copy_(torch.from_numpy(indices).view(self.indices.shape))
        self.indptr.copy_(torch.from_numpy(indptr))

    def _layout(self, row_nnz: Array) -> tuple[int, ...]:
        """Shape of `values` for rows of these lengths."""
        return (int(row_nnz.sum()),)

    def _index_layout(self, layout: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of `indices` beside values of that shape."""
        return layout

    @property
    def stored(self) -> nn.Parameter:
        """`values`."""
        return self.values

    @property
    def nnz(self) -> int:
        """Live connections."""
        return self.values.numel()

    def per_connection(self, entries: Tensor) -> Tensor:
        """The entries, in one dimension: there is one for each connection."""
        return entries.reshape(-1)

    @torch.no_grad()
    def put(self, entries: Tensor, slots: Tensor, numbers: Tensor) -> None:
        """Set some of the entries."""
        entries.put_(slots.long(), numbers)

    def moved(self, entries: Tensor, source: Tensor) -> Tensor:
        """What lives per slot, after a `rewrite` that returned `source`; see `SparseTopology`."""
        return move_slots(entries, source, self.values.shape)

    def positions(self) -> Tensor:
        """int64 (nnz,): ``row * in_features + column`` of each connection, ascending."""
        row = torch.repeat_interleave(
            torch.arange(self.grid[0], device=self.indptr.device), torch.diff(self.indptr)
        )
        return row * self.grid[1] + self.indices.reshape(-1).long()

    def rewrite(self, drop: Tensor, grow: Tensor) -> Tensor:
        """Drop and grow connections in place.

        Parameters
        ----------
        drop : int64 (n,)
            Slots to remove.
        grow : int64 (m,)
            Positions ``row * columns + column`` of the `grid` to add with weight 0. A dropped position may
            be grown again; it then keeps its weight.

        Returns
        -------
        int64 (new nnz,)
            The old slot of each new slot, or -1 where it was grown. Whatever lives per slot, such as the
            state of an optimizer, follows by it; `values` and its gradient have been moved.

        Raises
        ------
        TypeError
            If the values are bfloat16, which is for inference.
        ValueError
            As `sparselab.kernels.rewrite`.
        """
        if self.values.dtype == torch.bfloat16:
            raise TypeError("values must be float32 or float64 for a change of topology, got bfloat16")
        new, values, moved = self._rewritten(drop.numpy(), grow.numpy())
        self._layout(new.row_nnz)  # may refuse, before anything is changed
        # Set aside meanwhile: a Parameter and its gradient have the same shape.
        gradient, self.values.grad = self.values.grad, None
        self._store(new.indptr, new.indices)
        with torch.no_grad():
            self.values.copy_(values.view(self.values.shape))
        del new, values
        if gradient is not None:
            self.values.grad = self.moved(gradient, moved)
        if self.forward_mask is not None:
            self.forward_mask = self.moved(self.forward_mask, moved)
        return moved

    def _rewritten(self, drop: Array, grow: Array) -> tuple[RowTopology, Tensor, Tensor]:
        """The topology after a rewrite, its weights, and the old slot of each new one; nothing is changed."""
        new, source = as_matrix(self).rewrite(ascending(drop), ascending(grow), compact=True)
        moved = torch.from_numpy(source)
        return new, move_slots(self.values.detach().clone(), moved, (len(source),)), moved

    def _resize(self, layout: tuple[int, ...]) -> None:
        """Make room for another layout; what `values`, its gradient and `indices` held is lost."""
        if layout == self.values.shape:
            return
        with torch.inference_mode(False):
            values = self.values.data.new_empty(layout)
            other = torch.float64 if values.dtype == torch.float32 else torch.float32
            self.values.grad = None
            # A graph that is still alive (the user holds a loss) holds the node that accumulates this
            # parameter's gradient, and the node remembers the shape. Torch replaces it for another dtype.
            self.values.data = values.new_empty(0, dtype=other)
            self.values.data = values
            self.indices = self.indices.new_empty(self._index_layout(layout))

    def freeze(self: Layer) -> Layer:
        """Let go of what only training needs, in place, and return the layer itself.

        That is: ``requires_grad`` of `values` and `bias`, their gradients, the `gradient_watcher` of an
        algorithm (which must take no more steps), and the plans of the backward passes. The plan of the
        forward pass stays. A gradient by x can still be had; its plan is then made anew, and kept.

        Examples
        --------
        >>> from sparselab import SparseLinear
        >>> SparseLinear(64, 32).freeze().values.requires_grad
        False
        """
        self.requires_grad_(False)
        self.zero_grad(set_to_none=True)
        self.gradient_watcher = None
        self._plans.keep_forward()
        return self

    def plan_bytes(self) -> int:
        """Bytes of the kernel plans held now."""
        return self._plans.nbytes

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["_plans"]
        if self.indices.dtype == torch.uint16:
            # pickle cannot load a uint16 tensor (torch.save can), so the columns travel as int16 bits.
            state["_buffers"] = {**self._buffers, "indices": self.indices.view(torch.int16)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._plans = LayerPlans(self._plans_kind)
        if self.indices.dtype == torch.int16:
            self.indices = self.indices.view(torch.uint16)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Load into whatever topology this layer has now: the saved one is checked and replaces it."""
        try:
            loaded = self._check_state({name: state_dict.get(prefix + name) for name in self._saved})
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            return
        if loaded is not None:
            state_dict = self._make_room(state_dict, prefix, loaded)
            self._fit_forward_mask(state_dict.get(prefix + "forward_mask"))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _check_state(self, state: dict[str, Any]) -> Tensor | None:
        """`indices` of a saved state, None if nothing of the topology is there; errors if it is not valid."""
        return check_topology(state, self.shape, self.indices.dtype)

    def _make_room(self, state_dict: dict[str, Any], prefix: str, indices: Tensor) -> dict[str, Any]:
        """The state as torch shall load it into the room made for it."""
        self._resize(indices.shape)
        return {**state_dict, prefix + "indices": indices}
