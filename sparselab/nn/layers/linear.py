"""A linear layer that stores, computes and trains only its live connections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparselab.kernels.arrays import n_connections
from sparselab.nn.layers.base import Layer, used_weights
from sparselab.nn.layers.compressed import CompressedLayer
from sparselab.nn.layers.kinds import LayerKind, State, register_kind
from sparselab.nn.ops.casting import cast_linear, casting_topology
from sparselab.nn.ops.checks import in_float32
from sparselab.nn.ops.contract import Narrow
from sparselab.nn.ops.cpu.variants import Variant
from sparselab.nn.ops.inputs.tokens import by_matrix
from sparselab.nn.ops.linear import linear
from sparselab.nn.ops.narrow.linear import narrow_linear
from sparselab.nn.ops.tools.nodes import is_node, node_of
from sparselab.nn.ops.topologies import TensorTopology
from sparselab.nn.storage.checks import (
    check_bias,
    check_size,
    check_tokens,
    read_sparsity,
    under_autocast,
)
from sparselab.nn.storage.compressed import Compressed
from sparselab.nn.storage.narrow import (
    SCALES,
    as_integers,
    find_narrow,
    hold,
    made_weights,
    narrow_word,
    weights_of,
)
from sparselab.nn.storage.narrow import check_tokens as check_narrow_tokens
from sparselab.nn.storage.patterns import Pattern, read_edges, read_pattern


class LinearLayer(CompressedLayer):
    """What linear layers have in common, whatever their connections are."""

    tensor_names = (*CompressedLayer.tensor_names, SCALES)

    def forward(self, input: Tensor) -> Tensor:
        """``x W^T + b``.

        Parameters
        ----------
        input : (..., in_features), the dtype of `weight_values`
            Of a layer that is frozen in bfloat16 or int8: float32, bfloat16 or float16. Under CPU autocast
            any floating dtype; the product is then computed in the dtype of `weight_values`, and returned in
            that of autocast, unless it is float64. Also a sparse vector or
            matrix (COO, CSR, ...), which gets no gradient: its stored entries alone are multiplied where that
            is faster, else 8 MiB of its rows are made dense at a time. Or a jagged nested tensor.

        Returns
        -------
        (..., out_features)
            Dense, or jagged as the input.

        Raises
        ------
        RuntimeError
            As `torch.nn.Linear`: if the last dimension, the dtype or the device does not fit.
        NotImplementedError
            If the layer or the input is on a device without products.
        """
        if is_node(input):
            return node_of(self, input)  # type: ignore[no-any-return]
        if torch.is_autocast_enabled("cpu"):
            narrow = find_narrow(self)
            return self._under_autocast(input) if narrow is None else self._multiply_narrow(input, narrow)
        # Where they are, unless something computes them: torch's own look-up takes a microsecond each.
        parameters: Any = self._parameters
        values = parameters.get("weight_values")
        if values is None or self._buffers["forward_mask"] is not None:
            if (narrow := find_narrow(self)) is not None:
                return self._multiply_narrow(input, narrow)
            values = self.in_use
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        return self._multiply(input, values, bias)

    def _multiply(self, input: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + b`` with these weights and biases, in their dtype."""
        x = check_tokens(input, values, self.in_features)
        if x.ndim == 2:
            return linear(x, values, bias, self)
        return by_matrix(x, lambda tokens: linear(tokens, values, bias, self))

    def _multiply_narrow(self, input: Tensor, narrow: Narrow) -> Tensor:
        """``x W^T + b`` with narrow weights, in the dtype of x or of autocast."""
        if not torch.is_autocast_enabled("cpu"):
            x = check_narrow_tokens(input, narrow, self.in_features)
            return self._narrow_product(x, narrow, x.dtype)
        out = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            x = input.float() if isinstance(input, Tensor) and input.dtype is torch.float64 else input
            return self._narrow_product(check_narrow_tokens(x, narrow, self.in_features), narrow, out)

    def _narrow_product(self, x: Tensor, narrow: Narrow, out: torch.dtype) -> Tensor:
        parameters: Any = self._parameters
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        if x.ndim == 2:
            return narrow_linear(x, narrow, bias, self, out)
        return by_matrix(x, lambda tokens: narrow_linear(tokens, narrow, bias, self, out))

    @property
    def in_use(self) -> Tensor:
        """The weights, as of `SparseLayer`; of a layer that is frozen in few bits what they stand for."""
        narrow = find_narrow(self)
        return used_weights(self) if narrow is None else weights_of(self, narrow)

    def _set_weights(self, dtype: torch.dtype) -> None:
        hold(self, dtype, made_weights(self, dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if find_narrow(self) is None:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with as_integers(self):
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _under_autocast(self, input: Tensor) -> Tensor:
        values, bias = self.in_use, self.bias
        is_narrow = torch.get_autocast_dtype("cpu") is torch.bfloat16
        topology = casting_topology(input, values, bias, self) if is_narrow else None
        if topology is not None:
            with torch.autocast("cpu", enabled=False):
                if input.ndim == 2:
                    return cast_linear(input, values, bias, topology)
                return by_matrix(input, lambda tokens: cast_linear(tokens, values, bias, topology))
        return under_autocast(self.forward, input, values.dtype)

    def ways(self, x: Tensor) -> dict[str, Callable[[], Tensor]]:
        """Every way to compute the output for x (tokens, in_features), by the name of its variant."""
        # One of its own: what only one of the ways needs is not kept.
        topology = TensorTopology(*self.topology_arguments())
        narrow = find_narrow(self)
        if narrow is not None and hasattr(topology.products, "narrow_ways"):
            bias = None if self.bias is None else self.bias.detach().float()
            return topology.products.narrow_ways(topology, narrow, x, bias)  # type: ignore[no-any-return]
        operands = self.in_use.detach(), x, self.bias
        values, x, bias = in_float32(*operands) or operands
        return topology.products.ways(topology, values, x, bias)  # type: ignore[no-any-return]

    def variant(self, n_tokens: int, operation: str = "forward") -> Variant:
        """How a batch of so many tokens is computed, and why: by a rule, or as `sparselab.tune` measured.

        Parameters
        ----------
        n_tokens : int
            Product of all leading dimensions of the input.
        operation : {"forward", "input_grad", "values_grad"}

        Examples
        --------
        >>> layer = SparseLinear(3072, 768, sparsity=0.9)
        >>> layer.variant(1).name, layer.variant(2048).name
        ('skinny', 'tiles')
        """
        topology = self.topology()
        return topology.products.variant(topology, operation, n_tokens)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        dtype = narrow_word(self)
        return super().extra_repr() + ("" if dtype is None else f", weights={dtype}")

    def to_dense(self) -> nn.Linear:
        """A `torch.nn.Linear` with the same outputs, mode and trainability."""
        new: nn.Linear = self._dense_twin()
        return new


class SparseLinear(LinearLayer):
    """Drop-in for `torch.nn.Linear`: ``y = x W^T + b`` with a sparse W.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    sparsity : float in [0, 1], optional
        Fraction of W that does not exist; 0.9 if density is not given either. Exactly
        ``round((1 - sparsity) * out_features * in_features)`` connections are drawn uniformly at random, from
        torch's random generator.
    density : float in [0, 1], optional
        ``1 - sparsity``, in place of it.
    device : torch.device, optional
        Forward passes run on the CPU.
    dtype : torch.dtype, optional
        float32, float64, bfloat16 or float16. In the latter two sums are still made in float32.

    Attributes
    ----------
    weight_values : Parameter, (nnz, 1, 1)
        Weights of the live connections, row by row, columns ascending. There are no spare slots, so weight
        decay, noise and clipping touch live weights only. A buffer in a layer that is frozen in few bits.
    indptr : int64 buffer, (out_features + 1,)
        ``weight_values[indptr[i] : indptr[i + 1]]`` are the weights of output i.
    indices : uint16, int32 or int64 buffer, (nnz,)
        Input of each connection; uint16 up to 65,536 inputs.
    forward_mask : bool buffer, (nnz, 1, 1), or None
        Connections that the output comes from; None means all. The others get gradients as if they were in
        use, and are 0 in the forward pass and in the gradient of x. Set by `sparselab.TopKAST`.
    weight : SparseWeight, (out_features, in_features)
        For code that reads a dense layer's weight or multiplies with it: see `sparselab.nn.SparseWeight`.
        Neither a Parameter nor part of the state.
    bias : Parameter, (out_features,), or None

    Raises
    ------
    TypeError, ValueError
        If a size is not a non-negative integer, bias no bool, sparsity or density not a number in [0, 1], or
        both are given.

    Notes
    -----
    6 bytes per connection at inference in float32, 4 in bfloat16, 3 in int8 (see `freeze`); about 8 more with
    the plans that training keeps, and 4 more where it saw batches of up to 256 tokens. The plans are derived
    from the topology when they are needed and are neither saved nor copied.

    In every kind of layer the Parameter has three dimensions, (connections, outputs and inputs of one): code
    that finds what decays by ``p.ndim >= 2`` finds it, and optimizers for matrices (`torch.optim.Muon`),
    which would take packed entries for one, refuse it.

    Examples
    --------
    >>> import torch, sparselab
    >>> layer = sparselab.SparseLinear(1536, 384, sparsity=0.9)
    >>> layer(torch.randn(8, 16, 1536)).shape
    torch.Size([8, 16, 384])
    >>> layer.nnz
    58982
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float | None = None,
        density: float | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = check_size("out_features", out_features), check_size("in_features", in_features)
        bias = check_bias(bias, f"SparseLinear({in_features}, {out_features}")
        amount = read_sparsity(sparsity, density)
        super().__init__(Compressed(shape), n_connections(shape, amount), bias, device, dtype)
        self._draw_if_there(amount)

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, sparsity: float | None = None, *, density: float | None = None
    ) -> SparseLinear:
        """The largest weights of a dense layer, by magnitude; of equal ones the first in row-major order."""
        require_linear(linear)
        return cls._from_largest(linear, read_sparsity(sparsity, density))

    @classmethod
    def from_pattern(
        cls, pattern: object, bias: bool = True, *, dtype: torch.dtype | None = None
    ) -> SparseLinear:
        """A layer with the connections of a matrix (out_features, in_features).

        The topology stays as it is: only an algorithm of `sparselab.dst` that is attached changes it.

        Parameters
        ----------
        pattern : SciPy sparse matrix or array, bool array or tensor, or torch.sparse_csr tensor
            Floating entries are taken as weights. A boolean pattern gets fresh ones, drawn as by
            `fan_in_uniform_`. Every stored entry is a connection, zeros included, as ``pattern.tocsr()`` has
            them; entries stored twice are summed.
        bias : bool
            Drawn as in a new layer.
        dtype : torch.dtype, optional
            float32, float64, bfloat16 or float16; torch's default if None, whatever the dtype of the pattern.

        Raises
        ------
        TypeError
            If the pattern is of another kind, its entries are neither boolean nor floating, or a layer
            cannot have the dtype.
        ValueError
            If the pattern does not have two dimensions, or its compressed rows are not valid.

        Examples
        --------
        >>> import numpy as np
        >>> from sparselab import SparseLinear
        >>> SparseLinear.from_pattern(np.tri(4, 6, dtype=bool)).indptr
        tensor([ 0,  1,  3,  6, 10])
        """
        return connected(cls, pattern, bias, dtype)

    @classmethod
    def from_edges(
        cls,
        inputs: object,
        outputs: object = None,
        weights: object = None,
        *,
        in_features: int | None = None,
        out_features: int | None = None,
        bias: bool = True,
        dtype: torch.dtype | None = None,
    ) -> SparseLinear:
        """A layer with the connections of a list of edges: from input ``inputs[k]`` to output ``outputs[k]``.

        Nothing is made of the size of the dense weight. The topology stays, as that of `from_pattern`.

        Parameters
        ----------
        inputs, outputs : int array, tensor or list, (n,)
            In any order. Without outputs, inputs is an ``edge_index``, (2, n), as torch_geometric has it:
            first where edges begin, then where they end.
        weights : floating array, tensor or list, (n,), optional
            Drawn as by `fan_in_uniform_` if they are not given.
        in_features, out_features : int, optional
            One more than the largest of inputs, or outputs, by default.
        bias : bool
            Drawn as in a new layer.
        dtype : torch.dtype, optional
            float32, float64, bfloat16 or float16; torch's default if None, whatever the dtype of the weights.

        Raises
        ------
        TypeError
            If inputs or outputs are no integers, weights are not floating, or a layer cannot have the dtype.
        ValueError
            If the lengths differ, a number is negative or not below its number of features, or there is no
            edge and no number of features.

        Notes
        -----
        An edge that is named twice is one connection, and its weights are summed: as SciPy makes a
        ``coo_array`` a ``csr_array``, and ``torch_geometric.utils.coalesce`` adds up.

        Examples
        --------
        >>> from sparselab import SparseLinear
        >>> layer = SparseLinear.from_edges([0, 2, 2], [1, 0, 1], [0.5, 2.0, -1.0], bias=False)
        >>> layer.weight.detach().to_dense()
        tensor([[ 0.0000,  0.0000,  2.0000],
                [ 0.5000,  0.0000, -1.0000]])
        """
        edges = read_edges(inputs, outputs, weights, in_features, out_features)
        return with_connections(cls, edges, bias, dtype)


def connected(kind: type[Layer], pattern: object, bias: bool, dtype: torch.dtype | None) -> Layer:
    """A layer of a kind with the connections of a matrix (out_features, in_features)."""
    return with_connections(kind, read_pattern(pattern), bias, dtype)


def with_connections(kind: type[Layer], pattern: Pattern, bias: bool, dtype: torch.dtype | None) -> Layer:
    """As `connected`, of a pattern that has been read."""
    (rows, columns), positions, weights = pattern
    new = kind(columns, rows, bias, sparsity=1.0, dtype=dtype)  # type: ignore[call-arg, arg-type]
    new._begin_with(positions, weights)
    return new


def require_linear(linear: object) -> None:
    """Raise TypeError unless this is a `torch.nn.Linear`."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")


def _recognises(state: State) -> dict[str, object] | None:
    if "indptr" not in state or "weight_values" not in state:
        return None
    return {} if state["weight_values"].shape[1:] == (1, 1) else None


register_kind(LayerKind("sparse", SparseLinear, (nn.Linear,), recognises=_recognises, condenses=True))
