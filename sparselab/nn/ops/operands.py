"""The factors of a layer's dense gradient, from which its parts are formed and the whole never is."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparselab.kernels import PaddedCSR, sddmm_dw
from sparselab.kernels.arrays import Array
from sparselab.kernels.layouts.padded_csr import RowTopology

Totals = npt.NDArray[np.floating[Any]]
Self = TypeVar("Self", bound="GradientFactors")

_CHUNK_TOKENS = 64


class GradientFactors(Protocol):
    """What one backward pass knows of ``G = dL/dW``, a matrix of the layer's ``shape``, at all positions."""

    @property
    def device(self) -> torch.device:
        """Where the factors are."""

    @property
    def n_tokens(self) -> int:
        """Terms in each entry of G."""

    def clone(self: Self) -> Self:
        """A copy that may be kept; the factors themselves are lent for the time of a call."""

    def to(self: Self, dtype: torch.dtype) -> Self:
        """The factors in another dtype, in which G is then formed."""

    def is_finite(self) -> bool:
        """Whether no factor holds a NaN or an infinity."""

    def add_rows(self, start: int, out: Tensor, beta: float = 1.0) -> None:
        """``out <- beta * out + G[start : start + len(out)]``; `out` (n, columns) has the factors' dtype."""

    def sampled(self, positions: Array) -> Array:
        """G at some positions, ascending, (n,); float32 or float64 factors on the CPU."""

    def totals(self, signs: Totals | None) -> tuple[Totals, Totals]:
        """``(sum_t |dY|, sum_t |X|)``, (rows,) and (columns,); with signs (n_tokens,), sums of ``sign_t dY``.

        The same bits for any number of threads.
        """


class LinearFactors:
    """Of a linear layer, ``G = dY^T X``.

    Parameters
    ----------
    x : (tokens, in_features)
    dy : (tokens, out_features)
    """

    def __init__(self, x: Tensor, dy: Tensor) -> None:
        self.x, self.dy = x, dy

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.x.device

    @property
    def n_tokens(self) -> int:
        """Terms in each entry of G."""
        return self.x.shape[0]

    def clone(self) -> LinearFactors:
        """A copy that may be kept."""
        return LinearFactors(self.x.clone(), self.dy.clone())

    def to(self, dtype: torch.dtype) -> LinearFactors:
        """The factors in another dtype."""
        return LinearFactors(self.x.to(dtype), self.dy.to(dtype))

    def is_finite(self) -> bool:
        """Whether no factor holds a NaN or an infinity."""
        return bool(self.x.isfinite().all() and self.dy.isfinite().all())

    def add_rows(self, start: int, out: Tensor, beta: float = 1.0) -> None:
        """``out <- beta * out + G[start : start + len(out)]``, by the dense product."""
        out.addmm_(self.dy[:, start : start + len(out)].T, self.x, beta=beta)

    def sampled(self, positions: Array) -> Array:
        """G at some positions, ascending, by the sparse kernels."""
        x, dy = self.x.numpy().T, self.dy.numpy().T
        topology = RowTopology.from_positions((len(dy), len(x)), positions)
        return sddmm_dw(PaddedCSR.of(topology, np.empty(topology.capacity, x.dtype)), dy, x)

    def totals(self, signs: Totals | None) -> tuple[Totals, Totals]:
        """Sums over tokens of the magnitudes of dY and X, or of their entries times the `signs`."""
        return token_totals(self.dy, signs), token_totals(self.x, signs)


def token_totals(tokens: Tensor, signs: Totals | None) -> Totals:
    """Sum over tokens (n_tokens, features) of magnitudes, or of entries times the sign of their token."""
    total = np.zeros(tokens.shape[1])
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        stop = start + _CHUNK_TOKENS
        chunk: npt.NDArray[Any] = tokens[start:stop].double().numpy()
        total += (np.abs(chunk) if signs is None else chunk * signs[start:stop, None]).sum(0)
    return total
