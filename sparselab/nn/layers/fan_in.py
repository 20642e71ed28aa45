"""A linear layer in which every output has equally many connections, or none at all."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sparselab.kernels.arrays import n_connections
from sparselab.kernels.rewiring.rows import select_rows
from sparselab.nn.layers.base import SparseLayer
from sparselab.nn.layers.kinds import LayerKind, State, register_kind
from sparselab.nn.layers.linear import LinearLayer, SparseLinear, connected, require_linear, with_connections
from sparselab.nn.storage.checks import check_bias, check_size, read_fan_in, read_sparsity
from sparselab.nn.storage.entries import as_scores
from sparselab.nn.storage.fan_in import FanIn
from sparselab.nn.storage.patterns import read_edges


class FanInLinear(LinearLayer):
    """`SparseLinear` with a constant fan-in, whose saved state has no row pointers.

    Outputs without a connection (`sparselab.SRigL` ablates some) take neither memory nor work; they equal
    their bias. `sparselab.condense` removes them from a model.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    sparsity : float in [0, 1], optional
        ``fan_in = round((1 - sparsity) * in_features)``, which may be 0. 0.9 if nothing else says it.
    density : float in [0, 1], optional
        ``1 - sparsity``, in place of it.
    fan_in : int in [0, in_features], optional
        In place of both: connections of every output, drawn uniformly at random from torch's random
        generator.
    device : torch.device, optional
        Forward passes run on the CPU.
    dtype : torch.dtype, optional
        float32, float64, bfloat16 or float16. In the latter two sums are still made in float32.

    Attributes
    ----------
    weight_values : Parameter, (rows left * fan_in, 1, 1)
        Weights of the outputs that have connections, one after the other, inputs ascending.
    indices : uint16, int32 or int64 buffer, (rows left * fan_in,)
        Input of each connection; uint16 up to 65,536 inputs.
    indptr : int64 buffer, (out_features + 1,)
        Where each output begins. Derived, and not saved.
    forward_mask : bool buffer, (rows left * fan_in, 1, 1), or None
        As of `SparseLinear`.
    weight : SparseWeight, (out_features, in_features)
        As of `SparseLinear`.
    bias : Parameter, (out_features,), or None

    Raises
    ------
    TypeError, ValueError
        If a size is not a non-negative integer, bias no bool, the sparsity or density not a number in [0, 1],
        the fan-in larger than `in_features`, or more than one of them is given.

    Notes
    -----
    A saved state holds `weight_values`, `indices`, the bias, `fan_in` as int64 of no dimension, and, only if
    some outputs have no connection, the outputs that are left, if any: int64 `rows`, ascending.

    `fan_in` and the rows left may change by `rewrite`. Every output must be left with no connection or as
    many as the others, so the algorithms for this layer are `Static`, `SRigL`, and those that keep the count
    of every row (``scope="row"`` of `SET`, `RigL` and others).

    Weights are drawn as by `fan_in_uniform_`, from U(-b, b) with ``b = 1 / sqrt(fan_in)``.

    References
    ----------
    Lasby, Golubeva, Evci, Nica, Ioannou: "Dynamic Sparse Training with Structured Sparsity", ICLR 2024,
    section 3 and appendix F (the condensed representation).

    Examples
    --------
    >>> import torch, sparselab
    >>> layer = sparselab.FanInLinear(1536, 384, sparsity=0.9)
    >>> layer(torch.randn(8, 16, 1536)).shape
    torch.Size([8, 16, 384])
    >>> layer.fan_in, layer.nnz
    (154, 59136)
    """

    storage: FanIn

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float | None = None,
        density: float | None = None,
        fan_in: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        rows, columns = check_size("out_features", out_features), check_size("in_features", in_features)
        bias = check_bias(bias, f"FanInLinear({in_features}, {out_features}")
        each = _read_each(columns, sparsity, density, fan_in)
        super().__init__(FanIn((rows, columns), fan_in=each), rows * each, bias, device, dtype)
        self._draw_if_there(read_sparsity(sparsity, density, fan_in) if fan_in is None else 1.0)

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, sparsity: float | None = None, *, density: float | None = None,
        fan_in: int | None = None,
    ) -> FanInLinear:  # fmt: skip
        """The largest weights of each output of a dense layer, by magnitude; of equal ones the first."""
        require_linear(linear)
        rows, columns = linear.out_features, linear.in_features
        each = np.full(rows, _read_each(columns, sparsity, density, fan_in))
        positions = select_rows(as_scores(linear.weight), np.arange(rows + 1) * columns, each)
        return cls.from_positions(linear, torch.from_numpy(positions).long().to(linear.weight.device))

    @classmethod
    def from_pattern(
        cls, pattern: object, bias: bool = True, *, dtype: torch.dtype | None = None
    ) -> FanInLinear:
        """A layer with the connections of a matrix; as `SparseLinear.from_pattern`.

        Raises
        ------
        ValueError
            Also if its rows, but for empty ones, do not have equally many connections.
        """
        return connected(cls, pattern, bias, dtype)

    @classmethod
    def from_edges(
        cls, inputs: object, outputs: object = None, weights: object = None, *,
        in_features: int | None = None, out_features: int | None = None, bias: bool = True,
        dtype: torch.dtype | None = None,
    ) -> FanInLinear:  # fmt: skip
        """A layer with the connections of a list of edges; as `SparseLinear.from_edges`.

        Raises
        ------
        ValueError
            Also if the outputs, but for those without any, do not have equally many connections.
        """
        edges = read_edges(inputs, outputs, weights, in_features, out_features)
        return with_connections(cls, edges, bias, dtype)

    @classmethod
    def from_sparse(cls, layer: SparseLayer) -> FanInLinear:
        """The same topology, weights, biases, mode and trainability; of a layer trained by `SRigL`, say.

        Raises
        ------
        TypeError
            If the layer is no linear one of single connections.
        ValueError
            If its outputs, but for those without any, do not have equally many connections.
        """
        wrong = not isinstance(layer, SparseLayer) or layer.dense_type is not nn.Linear
        if wrong or layer.block_shape != (1, 1):
            raise TypeError(
                f"layer must be a sparse linear layer of single connections, such as SparseLinear or "
                f"MaskedLinear, got {type(layer).__name__}"
            )
        return cls._from_layer(layer)

    def to_sparse(self) -> SparseLinear:
        """A `SparseLinear` with the same topology, weights, biases, mode and trainability."""
        return SparseLinear._from_layer(self)

    @property
    def fan_in(self) -> int:
        """Connections of each output that has some; 0 if none has."""
        return self.storage.each(self)

    @property
    def rows(self) -> Tensor:
        """int64 (rows left,): outputs that have connections, ascending."""
        return self.storage.rows(self)

    def reset_parameters(self) -> None:
        """Draw `fan_in` inputs for every output, also for one that had none, and new weights and biases."""
        super().reset_parameters()

    def extra_repr(self) -> str:
        left = self.out_features if self.indptr.is_meta else len(self.rows)
        return f"{super().extra_repr()}, fan_in={self.fan_in}, rows={left}"


def _read_each(columns: int, sparsity: float | None, density: float | None, fan_in: int | None) -> int:
    """Connections of each output, from either way to say it."""
    fraction = read_sparsity(sparsity, density, fan_in)
    return n_connections((1, columns), fraction) if fan_in is None else read_fan_in(columns, fan_in)


def _recognises(state: State) -> dict[str, object] | None:
    return {} if "indices" in state and "indptr" not in state else None


register_kind(
    LayerKind("fan_in", FanInLinear, (nn.Linear,), ("fan_in",), recognises=_recognises, condenses=True)
)
