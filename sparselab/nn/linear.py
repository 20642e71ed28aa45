"""A linear layer that stores, computes and trains only its live connections."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from sparselab import kernels
from sparselab.kernels import PaddedCSR, index_dtype, n_connections
from sparselab.kernels.layout import Array
from sparselab.nn import functional
from sparselab.nn._checks import check_dtype, check_input, check_topology
from sparselab.nn._layer import SparseLayer
from sparselab.nn._plans import LayerPlans
from sparselab.nn.functional import GradientWatcher
from sparselab.nn.init import fan_in_uniform_
from sparselab.nn.topology import largest_positions, move_slots
from sparselab.nn.variants import Variant, choose

Layer = TypeVar("Layer", bound="SparseLinear")


class SparseLinear(SparseLayer):
    """Drop-in for `torch.nn.Linear`: ``y = x W^T + b`` with a sparse W.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    sparsity : float in [0, 1]
        Fraction of W that does not exist. Exactly ``round((1 - sparsity) * out_features * in_features)``
        connections are drawn uniformly at random, from torch's random generator.
    device : torch.device, optional
        Forward passes run on the CPU.
    dtype : torch.dtype, optional
        float32, float64 or bfloat16. In bfloat16 the sums are still made in float32.

    Attributes
    ----------
    values : Parameter, (nnz,)
        Weights of the live connections, row by row, columns ascending. There are no spare slots, so weight
        decay, noise and clipping touch live weights only.
    indptr : int64 buffer, (out_features + 1,)
        ``values[indptr[i] : indptr[i + 1]]`` are the weights of output i.
    indices : uint16, int32 or int64 buffer, (nnz,)
        Input of each connection; uint16 up to 65,536 inputs.
    forward_mask : bool buffer, (nnz,), or None
        Connections that the output comes from; None means all. The others get gradients as if they were in
        use, and are 0 in the forward pass and in the gradient of x. Set by `sparselab.TopKAST`.
    bias : Parameter, (out_features,), or None

    Raises
    ------
    TypeError, ValueError
        If a size is not a non-negative integer or the sparsity not a number in [0, 1].

    Notes
    -----
    6 bytes per connection at inference in float32, 4 in bfloat16 (``layer.to(torch.bfloat16)``); about 8 more
    with the plans that training keeps. The plans are
    derived from the topology when they are needed and are neither saved nor copied.

    The Parameter is one-dimensional: code that finds weights by ``p.ndim >= 2`` (often to choose what decays)
    should look for ``p.ndim >= 2 or name.endswith("values")``.

    Examples
    --------
    >>> import torch, sparselab
    >>> layer = sparselab.SparseLinear(1536, 384, sparsity=0.9)
    >>> layer(torch.randn(8, 16, 1536)).shape
    torch.Size([8, 16, 384])
    >>> layer.nnz
    58982
    """

    values: nn.Parameter
    indptr: Tensor
    indices: Tensor
    #: What a saved state says of weights and topology.
    _saved: ClassVar[tuple[str, ...]] = "values", "indptr", "indices"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        sparsity: float = 0.9,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self._allocate((n_connections(self.shape, sparsity),), bias, device, dtype)

    def _allocate(
        self, layout: tuple[int, ...], bias: bool,
        device: torch.device | str | int | None, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        """Make the tensors, with values laid out so, and draw what they hold."""
        self._plans = LayerPlans()
        place = torch.empty(0, device=device).device
        dtype = torch.get_default_dtype() if dtype is None else dtype
        check_dtype("dtype", dtype)
        column = torch.from_numpy(np.empty(0, index_dtype(self.in_features))).dtype
        self.values = nn.Parameter(torch.empty(layout, device=place, dtype=dtype))
        indptr = torch.empty(self.out_features + 1, dtype=torch.int64, device=place)
        self.register_buffer("indptr", indptr, persistent="indptr" in self._saved)
        self.register_buffer("indices", torch.empty(layout, dtype=column, device=place))
        self.bias = nn.Parameter(torch.empty(self.out_features, device=place, dtype=dtype)) if bias else None
        if place.type != "meta":
            self.reset_parameters()

    @classmethod
    def from_dense(cls, linear: nn.Linear, sparsity: float) -> SparseLinear:
        """The largest weights of a dense layer, by magnitude; of equal ones the first in row-major order."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        nnz = n_connections((linear.out_features, linear.in_features), sparsity)
        return cls._from_positions(linear, largest_positions(linear.weight, nnz))

    @classmethod
    def _from_positions(cls: type[Layer], linear: nn.Linear, positions: Tensor) -> Layer:
        """The weights of a dense layer at these int64 positions, ascending."""
        return cls._holding(linear, positions, linear.weight.detach().reshape(-1)[positions])

    @classmethod
    def _from_layer(cls: type[Layer], layer: SparseLayer) -> Layer:
        """The same connections, weights, biases, mode and trainability."""
        new = cls._holding(layer, layer.positions(), layer.per_connection(layer.stored.detach()))
        if layer.forward_mask is not None:
            new.forward_mask = layer.per_connection(layer.forward_mask).reshape(new.values.shape).clone()
        return new

    @classmethod
    def _holding(
        cls: type[Layer], like: nn.Linear | SparseLayer, positions: Tensor, weights: Tensor
    ) -> Layer:
        """A layer like another one, with its biases, and with these connections."""
        size = like.in_features * like.out_features
        new = cls._like(like, 1 - len(positions) / max(size, 1), device="meta").to_empty(
            device=weights.device
        )
        new._connect(positions, weights)
        if new.bias is not None:
            assert like.bias is not None
            with torch.no_grad():
                new.bias.copy_(like.bias)
        return new

    def to_dense(self) -> nn.Linear:
        """A `torch.nn.Linear` with the same outputs, mode and trainability."""
        new = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, self.values.device, self.values.dtype
        ).train(self.training)
        with torch.no_grad():
            new.weight.zero_().view(-1)[self.positions()] = self.per_connection(self._in_use)
            if self.bias is not None:
                new.bias.copy_(self.bias).requires_grad_(self.bias.requires_grad)
        new.weight.requires_grad_(self.values.requires_grad)
        return new

    def reset_parameters(self) -> None:
        """Draw a new random topology of the same count, and new weights and biases."""
        seed = int(torch.randint(2**62, (), device="cpu").item())
        self._set_topology(self._draw_positions(np.random.default_rng(seed)))
        self.forward_mask = None
        fan_in_uniform_(self.values, self.indptr)
        self._draw_bias(self.indptr)

    def _draw_positions(self, rng: np.random.Generator) -> Array:
        return kernels.sample_distinct(rng, self.out_features * self.in_features, self.nnz)

    @torch.no_grad()
    def _connect(self, positions: Tensor, weights: Tensor | None) -> None:
        self._set_topology(positions.cpu().numpy())
        self.forward_mask = self.values.grad = None
        if weights is None:
            fan_in_uniform_(self.values, self.indptr)
        else:
            self.values.copy_(weights.view(self.values.shape))

    def _set_topology(self, positions: Array) -> None:
        row = positions // max(self.in_features, 1)
        begin = np.zeros(self.out_features + 1, np.int64)
        np.cumsum(np.bincount(row, minlength=self.out_features), out=begin[1:])
        columns = (positions - row * self.in_features).astype(index_dtype(self.in_features))
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
            torch.arange(self.out_features, device=self.indptr.device), torch.diff(self.indptr)
        )
        return row * self.in_features + self.indices.reshape(-1).long()

    def rewrite(self, drop: Tensor, grow: Tensor) -> Tensor:
        """Drop and grow connections in place.

        Parameters
        ----------
        drop : int64 (n,)
            Slots to remove.
        grow : int64 (m,)
            Positions ``row * in_features + column`` to add with weight 0. A dropped position may be grown
            again; it then keeps its weight.

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
        begin = self.indptr.numpy()
        W = PaddedCSR.unchecked(
            self.shape, begin, np.diff(begin), self.indices.reshape(-1).numpy(),
            self.values.detach().reshape(-1).numpy(),
        )  # fmt: skip
        new, source = kernels.rewrite(W, drop.numpy(), grow.numpy(), compact=True)
        self._layout(new.row_nnz)  # may refuse, before anything is changed
        # Set aside meanwhile: a Parameter and its gradient have the same shape.
        gradient, self.values.grad = self.values.grad, None
        self._store(new.indptr, new.indices)
        with torch.no_grad():
            self.values.copy_(torch.from_numpy(new.values).view(self.values.shape))
        del new
        moved = torch.from_numpy(source)
        if gradient is not None:
            self.values.grad = self.moved(gradient, moved)
        if self.forward_mask is not None:
            self.forward_mask = self.moved(self.forward_mask, moved)
        return moved

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
            self.indices = self.indices.new_empty(layout)

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b``.

        Parameters
        ----------
        x : (..., in_features), the dtype of `values`
            Under CPU autocast any floating dtype; the product is then computed and returned in the dtype of
            `values`.

        Returns
        -------
        (..., out_features)

        Raises
        ------
        RuntimeError
            As `torch.nn.Linear`: if the last dimension, the dtype or the device does not fit.
        NotImplementedError
            If the layer or x is not on the CPU, or forward-mode derivatives are asked for.
        """
        y = functional.infer(x, self._parameters, self._buffers, self._plans)
        return self._forward(check_input(x, self.values, self.in_features)) if y is None else y

    def _product(self, tokens: Tensor) -> Tensor:
        return functional.sparse_linear(
            tokens, self._in_use, self.bias, self.indptr, self.indices, self._plans
        )

    def _product_seen_by(self, watcher: GradientWatcher, tokens: Tensor) -> Tensor:
        with functional.watching(watcher):
            return self._product(tokens)

    def variant(self, n_tokens: int, operation: str = "forward") -> Variant:
        """How a batch of so many tokens is computed, and why.

        Parameters
        ----------
        n_tokens : int
            Product of all leading dimensions of the input.
        operation : {"forward", "input_grad", "values_grad"}

        Examples
        --------
        >>> SparseLinear(3072, 768, sparsity=0.9).variant(1)
        Variant(operation='forward', name='few tokens', reason='1 tokens (at most 16) do not fill a tile')
        """
        return choose(operation, n_tokens, self.density)

    def freeze(self) -> SparseLinear:
        """Let go of what only training needs, in place, and return the layer itself.

        That is: ``requires_grad`` of `values` and `bias`, their gradients, the `gradient_watcher` of an
        algorithm (which must take no more steps), and the plans of the backward passes. The plan of the
        forward pass stays. A gradient by x can still be had; its plan is then made anew, and kept.

        Examples
        --------
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
        self._plans = LayerPlans()
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
