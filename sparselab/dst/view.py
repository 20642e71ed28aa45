"""What an update sees of a layer, what it asks of it, and what it reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from sparselab.kernels.arrays import Array
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.kernels.rewiring.positions import kept_positions
from sparselab.nn.layers.base import SparseLayer, as_matrix


@dataclass(frozen=True)
class UpdateReport:
    """What one update did to one layer.

    Attributes
    ----------
    dropped, grown : int
        Connections dropped and positions grown.
    regrown : int
        Positions that were both, so that connection and state survived.
    nnz : int
        Connections that the layer has now.
    skipped : str
        Why the layer was left alone; empty if it was not.
    """

    dropped: int = 0
    grown: int = 0
    regrown: int = 0
    nnz: int = 0
    skipped: str = ""


@dataclass(frozen=True, eq=False)
class LayerView:
    """One layer as an update finds it, before anything is changed.

    Attributes
    ----------
    index : int
        Which of the attached layers.
    step : int
        Finished optimizer steps.
    seed : int
        Of the algorithm.
    layer : SparseLayer
    group, state : mapping
        Settings of the optimizer that trains the layer, and what it keeps for the weights; both are empty
        while none is known. Read only.
    agreed : dict
        What parts of the algorithm have found together with other processes, by names of theirs.
    """

    index: int
    step: int
    seed: int
    layer: SparseLayer
    group: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    agreed: dict[str, Any] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the positions: ``(out_features, in_features)``, or these in blocks."""
        return self.layer.grid

    @property
    def size(self) -> int:
        """Positions, live or not."""
        return self.grid[0] * self.grid[1]

    @property
    def nnz(self) -> int:
        """Live connections."""
        return self.layer.nnz

    @property
    def slot_shape(self) -> tuple[int, ...]:
        """What a connection holds: ``()``, a number, or the shape of its block of weights."""
        return tuple(self.weights.shape[1:])

    @cached_property
    def matrix(self) -> RowTopology:
        """The connections, without spare slots."""
        return as_matrix(self.layer)

    @property
    def weights(self) -> torch.Tensor:
        """(nnz,), or (nnz, *block_shape): the weight of each connection, detached. Read only."""
        return self.layer.per_connection(self.layer.stored.detach())

    @property
    def gradient(self) -> torch.Tensor | None:
        """The gradient of each connection, laid out as `weights`, if there is one. Read only."""
        gradient = self.layer.stored.grad
        return None if gradient is None else self.layer.per_connection(gradient)

    @cached_property
    def momentum(self) -> torch.Tensor | None:
        """Where the optimizer's momentum takes each connection, as `weights`, if it keeps one. Read only.

        ``momentum_buffer`` (SGD), or ``exp_avg / (sqrt(exp_avg_sq) + 1e-8)`` (Adam and its kin), or
        ``exp_avg`` where there is no ``exp_avg_sq``.
        """
        average = self._moment("momentum_buffer")
        if average is not None:
            return average
        average, square = self._moment("exp_avg"), self._moment("exp_avg_sq")
        return average if average is None or square is None else average / (square.sqrt() + 1e-8)

    def _moment(self, name: str) -> torch.Tensor | None:
        entries = self.state.get(name)
        if isinstance(entries, torch.Tensor) and entries.shape == self.layer.stored.shape:
            return self.layer.per_connection(entries)
        return None

    def rng(self, *purpose: int) -> np.random.Generator:
        """A generator that depends on the seed, the layer, the step and `purpose` only.

        Without a purpose it is the one that growth draws from; other parts have numbers of their own.
        """
        return np.random.default_rng([self.seed, self.index, self.step, *purpose])


@dataclass(frozen=True, eq=False)
class LayerUpdate:
    """What an update does to a layer: the connections it loses, and how many it grows.

    Attributes
    ----------
    view : LayerView
    drop : int array, (k,)
        Slots that lose their connection, ascending.
    n_grow : int
        Connections to grow.
    row_grow : int64 array, (rows,), or None
        How many of them in each row; None if the row does not matter.
    """

    view: LayerView
    drop: Array
    n_grow: int = 0
    row_grow: Array | None = None

    @property
    def n_kept(self) -> int:
        """Connections that stay."""
        return self.view.nnz - self.drop.size

    @property
    def n_free(self) -> int:
        """Positions where something may grow: all that are not kept."""
        return self.view.size - self.n_kept

    @cached_property
    def row_kept(self) -> Array:
        """int64 (rows,): connections of each row that stay."""
        matrix = self.view.matrix
        return matrix.row_nnz - rows_of(self.drop, matrix.indptr)

    @cached_property
    def kept(self) -> Array:
        """Positions ``row * columns + column`` that keep their connection, ascending."""
        return kept_positions(self.view.matrix, self.drop)


def rows_of(slots: Array, indptr: Array) -> Array:
    """How many of some ascending slots each row has: int64 (rows,), rows beginning at `indptr`."""
    return np.diff(np.searchsorted(slots, indptr))


def total_size(views: Sequence[LayerView]) -> int:
    """Positions of all layers together."""
    return sum(view.size for view in views)
