"""Rows of equal length, or empty ones: as compressed rows, whose row pointers need not be saved."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparselab.kernels.arrays import Array
from sparselab.kernels.rewiring.rows import sample_rows
from sparselab.nn.storage.checks import check_fan_in
from sparselab.nn.storage.compressed import Compressed, Loaded


class FanIn(Compressed):
    """As `Compressed`, where every row has no connection or as many as the others.

    Notes
    -----
    A saved state holds no `indptr`, but ``fan_in``, int64 of no dimension. Where some rows are empty it names
    the others, if there are some: int64 ``rows``, ascending.
    """

    saved = "weight_values", "indices", "fan_in", "rows"

    def rows(self, layer: Any) -> Tensor:
        """int64, ascending: the rows that have connections."""
        return torch.diff(layer.indptr).nonzero()[:, 0]

    def each(self, layer: Any) -> int:
        """Connections of a row that has some; 0 if none has."""
        if layer.indptr.is_meta:
            return int(self.fan_in or 0)
        return int(torch.diff(layer.indptr).max()) if self.shape[0] else 0

    def check_rows(self, row_nnz: Array) -> None:
        """Raise ValueError unless the rows that are not empty have equal lengths."""
        (live,) = np.nonzero(row_nnz)
        if len(live) == 0:
            return
        fan_in = int(row_nnz[live[0]])
        if len(other := live[row_nnz[live] != fan_in]):
            raise ValueError(
                "every output of a FanInLinear must have equally many connections, or none, got "
                f"{fan_in} for output {live[0]} and {row_nnz[other[0]]} for output {other[0]}"
            )

    def draw(self, layer: Any, rng: np.random.Generator) -> Array:
        """As many positions for every row as some have now, ascending."""
        (rows, columns), fan_in = self.shape, int(self.fan_in or 0)
        drawn: Array = sample_rows(rng, np.full(rows, columns), np.full(rows, fan_in))
        return drawn

    def store(self, layer: Any, indptr: Array, indices: Array) -> None:
        """Copy a topology into the buffers."""
        super().store(layer, indptr, indices)
        self.fan_in = int(np.diff(indptr).max(initial=0))

    def check_state(self, state: dict[str, Any], columns: torch.dtype) -> Loaded | None:
        """What a saved state says of the connections; None if it has nothing of W.

        Raises TypeError or ValueError if it is not valid.
        """
        found = check_fan_in(state, self.shape, columns)
        return None if found is None else Loaded(*found)

    def load(self, layer: Any, state: dict[str, Any], prefix: str, loaded: Loaded) -> dict[str, Any]:
        """Make room, and return the state as torch shall load it there."""
        state = super().load(layer, state, prefix, loaded)
        for name in ("fan_in", "rows"):
            state.pop(prefix + name, None)
        indptr = loaded.indptr
        if layer.indptr.is_meta:
            layer.indptr = indptr
        else:
            layer.indptr.copy_(indptr)
        self.fan_in = int(torch.diff(indptr).max()) if self.shape[0] else 0
        return state

    def save(self, layer: Any, destination: dict[str, Any], prefix: str) -> None:
        """Say how many connections a row has, and name those that have some, if others have none."""
        each = self.each(layer)
        destination[prefix + "fan_in"] = torch.tensor(each, device=layer.indices.device)
        if each and not layer.indptr.is_meta and len(rows := self.rows(layer)) != self.shape[0]:
            destination[prefix + "rows"] = rows
