"""A linear layer in which every output has equally many connections, or none at all."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sparselab.kernels.arrays import Array, n_connections
from sparselab.kernels.rewiring.rows import sample_rows, select_rows
from sparselab.nn.layers.base import SparseLayer
from sparselab.nn.layers.kinds import LayerKind, State, register_kind
from sparselab.nn.layers.linear import SparseLinear
from sparselab.nn.layers.masked import MaskedLinear
from sparselab.nn.storage.checks import check_fan_in, check_size, fan_in_pointers
from sparselab.nn.storage.contract import as_scores


class FanInLinear(SparseLinear):
    """`SparseLinear` with a constant fan-in, stored in rows of equal length without row pointers.

    Outputs without a connection (`sparselab.SRigL` ablates some) take neither memory nor work; they equal
    their bias. `sparselab.condense` removes them from a model.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    fan_in : int in [0, in_features], optional
        Connections of every output, drawn uniformly at random from torch's random generator.
    sparsity : float in [0, 1], optional
        In place of it: ``fan_in = round((1 - sparsity) * in_features)``, which may be 0. 0.9 if neither is
        given.
    device : torch.device, optional
        Forward passes run on the CPU.
    dtype : torch.dtype, optional
        float32, float64 or bfloat16. In bfloat16 the sums are still made in float32.

    Attributes
    ----------
    values : Parameter, (rows left, fan_in)
        Weights of the outputs that have connections, inputs ascending within a row. (0, 0) if none has.
    indices : uint16, int32 or int64 buffer, (rows left, fan_in)
        Input of each connection; uint16 up to 65,536 inputs.
    indptr : int64 buffer, (out_features + 1,)
        Where each output begins, counted in connections. Derived, and not saved.
    forward_mask : bool buffer, (rows left, fan_in), or None
        As of `SparseLinear`.
    bias : Parameter, (out_features,), or None

    Raises
    ------
    TypeError, ValueError
        If a size is not a non-negative integer, the sparsity not a number in [0, 1], the fan-in larger than
        `in_features`, or both are given.

    Notes
    -----
    A saved state holds `values`, `indices`, the bias, and, only if an output has no connection, the outputs
    that are left: int64 `rows`, ascending.

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
    >>> layer.values.shape
    torch.Size([384, 154])
    """

    _saved: ClassVar[tuple[str, ...]] = "values", "indices", "rows"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        fan_in: int | None = None,
        sparsity: float | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        SparseLayer.__init__(self, in_features, out_features)
        fan_in = _read_fan_in(self.in_features, fan_in, sparsity)
        self._allocate(self._layout(np.full(self.out_features, fan_in)), bias, device, dtype)

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, sparsity: float | None = None, fan_in: int | None = None
    ) -> FanInLinear:
        """The largest weights of each output of a dense layer, by magnitude; of equal ones the first."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        rows, columns = linear.out_features, linear.in_features
        each = np.full(rows, _read_fan_in(columns, fan_in, sparsity))
        positions = select_rows(as_scores(linear.weight), np.arange(rows + 1) * columns, each)
        return cls.from_positions(linear, torch.from_numpy(positions).long().to(linear.weight.device))

    @classmethod
    def from_sparse(cls, layer: SparseLinear | MaskedLinear) -> FanInLinear:
        """The same topology, weights, biases, mode and trainability; of a layer trained by `SRigL`, say.

        Raises
        ------
        TypeError
            If the layer is of another kind.
        ValueError
            If its outputs, but for those without any, do not have equally many connections.
        """
        if not isinstance(layer, (SparseLinear, MaskedLinear)):
            raise TypeError(f"layer must be a SparseLinear or a MaskedLinear, got {type(layer).__name__}")
        return cls._from_layer(layer)

    def to_sparse(self) -> SparseLinear:
        """A `SparseLinear` with the same topology, weights, biases, mode and trainability."""
        return SparseLinear._from_layer(self)

    @property
    def fan_in(self) -> int:
        """Connections of each output that has some; 0 if none has."""
        return self.values.shape[1]

    @property
    def rows(self) -> Tensor:
        """int64 (rows left,): outputs that have connections, ascending."""
        return torch.diff(self.indptr).nonzero()[:, 0]

    def reset_parameters(self) -> None:
        """Draw `fan_in` inputs for every output, also for one that had none, and new weights and biases."""
        super().reset_parameters()

    def _draw_positions(self, rng: np.random.Generator) -> Array:
        rows, columns = self.shape
        return sample_rows(rng, np.full(rows, columns), np.full(rows, self.fan_in))

    def _layout(self, row_nnz: Array) -> tuple[int, ...]:
        (live,) = np.nonzero(row_nnz)
        if len(live) == 0:
            return 0, 0
        fan_in = int(row_nnz[live[0]])
        if len(other := live[row_nnz[live] != fan_in]):
            raise ValueError(
                "every output of a FanInLinear must have equally many connections, or none, got "
                f"{fan_in} for output {live[0]} and {row_nnz[other[0]]} for output {other[0]}"
            )
        return len(live), fan_in

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fan_in={self.fan_in}, rows={self.values.shape[0]}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.values.shape[0] != self.out_features and not self.indptr.is_meta:
            destination[prefix + "rows"] = self.rows

    def _check_state(self, state: dict[str, Any]) -> Tensor | None:
        return check_fan_in(state, self.shape, self.indices.dtype)

    def _make_room(self, state_dict: dict[str, Any], prefix: str, indices: Tensor) -> dict[str, Any]:
        state_dict = super()._make_room(state_dict, prefix, indices)
        indptr = fan_in_pointers(state_dict.pop(prefix + "rows", None), self.out_features, indices.shape[1])
        if self.indptr.is_meta:
            self.indptr = indptr
        else:
            self.indptr.copy_(indptr)
        return state_dict


def _read_fan_in(in_features: int, fan_in: int | None, sparsity: float | None) -> int:
    """Connections of each output, from either way to say it."""
    if fan_in is None:
        return n_connections((1, in_features), 0.9 if sparsity is None else sparsity)
    if sparsity is not None:
        raise ValueError(f"give fan_in or sparsity, not both, got {fan_in} and {sparsity}")
    fan_in = check_size("fan_in", fan_in)
    if fan_in > in_features:
        raise ValueError(f"fan_in must be at most in_features={in_features}, got {fan_in}")
    return fan_in


def _recognises(state: State) -> dict[str, object] | None:
    return {} if "indices" in state and "indptr" not in state else None


register_kind(
    LayerKind("fan_in", FanInLinear, (nn.Linear,), ("fan_in",), recognises=_recognises, condenses=True)
)
