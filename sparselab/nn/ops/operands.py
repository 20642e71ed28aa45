"""The operands of a layer's dense gradient, from which its parts are formed and the whole never is."""

from __future__ import annotations

import abc
import copy
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparselab.kernels import PaddedCSR, sddmm_dw
from sparselab.kernels.arrays import Array
from sparselab.kernels.layouts.padded_csr import RowTopology

Totals = npt.NDArray[np.floating[Any]]
Self = TypeVar("Self", bound="GradientOperands")

_CHUNK_TOKENS = 64


class GradientOperands(abc.ABC):
    """What one backward pass knows of ``G = dY^T X``, a matrix of the layer's ``shape``, at all positions.

    Detached, and not copied: tensors of the graph itself.

    Parameters
    ----------
    x : tensor
        Inputs of the layer.
    dy : tensor
        The gradient of its outputs.
    of_graph : bool
        Whether the inputs were computed within the graph; if not, they are somebody's, who may overwrite
        them when the backward pass is over.
    """

    def __init__(self, x: Tensor, dy: Tensor, of_graph: bool = False) -> None:
        self.x, self.dy, self.of_graph = x, dy, of_graph

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """x and dy."""
        return self.x, self.dy

    @property
    def device(self) -> torch.device:
        """Where the operands are."""
        return self.x.device

    def with_input(self: Self, x: Tensor) -> Self:
        """The same with another tensor of the same inputs."""
        return self._with(x, self.dy, True)

    def copied(self: Self) -> Self:
        """The same in memory of their own."""
        return self._with(self.x.clone(), self.dy.clone(), True)

    def to(self: Self, dtype: torch.dtype) -> Self:
        """The operands in another dtype, in which G is then formed."""
        return self._with(self.x.to(dtype), self.dy.to(dtype), self.of_graph)

    def _with(self: Self, x: Tensor, dy: Tensor, of_graph: bool) -> Self:
        new = copy.copy(self)
        new.x, new.dy, new.of_graph = x, dy, of_graph
        return new

    def is_finite(self) -> bool:
        """Whether no operand holds a NaN or an infinity."""
        return bool(self.x.isfinite().all() and self.dy.isfinite().all())

    @property
    @abc.abstractmethod
    def n_tokens(self) -> int:
        """Terms in each entry of G."""

    @abc.abstractmethod
    def add_rows(self, start: int, out: Tensor, beta: float = 1.0) -> None:
        """``out <- beta * out + G[start : start + len(out)]``; `out` (n, columns) has the operands' dtype."""

    @abc.abstractmethod
    def sampled(self, positions: Array) -> Array:
        """G at some positions, ascending, (n,); float32 or float64 operands on the CPU."""

    @abc.abstractmethod
    def totals(self, signs: Totals | None) -> tuple[Totals, Totals]:
        """``(sum_t |dY|, sum_t |X|)``, (rows,) and (columns,); with signs (n_tokens,), sums of ``sign_t dY``.

        The same bits for any number of threads.
        """


class LinearOperands(GradientOperands):
    """Of a linear layer: x (tokens, in_features) and dy (tokens, out_features)."""

    @property
    def n_tokens(self) -> int:
        """Terms in each entry of G."""
        return self.x.shape[0]

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


def scale_(out: Tensor, beta: float) -> None:
    """``out <- beta * out``; 0 whatever was there for a beta of 0."""
    if beta == 0:
        out.zero_()
    elif beta != 1:
        out.mul_(beta)


def is_of_graph(x: Tensor) -> bool:
    """Whether a tensor that autograd saved, or what it is a view of, was computed within the graph."""
    base = x._base
    return (x if base is None else base).grad_fn is not None


def token_totals(tokens: Tensor, signs: Totals | None) -> Totals:
    """Sum over tokens (n_tokens, features) of magnitudes, or of entries times the sign of their token."""
    total = np.zeros(tokens.shape[1])
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        stop = start + _CHUNK_TOKENS
        chunk: npt.NDArray[Any] = tokens[start:stop].double().numpy()
        total += (np.abs(chunk) if signs is None else chunk * signs[start:stop, None]).sum(0)
    return total
