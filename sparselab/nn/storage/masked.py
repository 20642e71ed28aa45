"""A dense weight, with the topology in a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparselab.kernels.checks import ascending
from sparselab.nn.storage.base import Storage, as_positions


class Masked(Storage):
    """All of W, with a mask of the connections.

    Notes
    -----
    The layer has a Parameter `weight` and a bool buffer `mask`, both (out_features, in_features). Weights
    without a connection are exactly 0.
    """

    parameter = "weight"
    saved = "weight", "mask"
    pattern = ("mask",)

    def nnz(self, layer: Any) -> int:
        """Live connections, counted in the mask."""
        return int(layer.mask.count_nonzero())

    def positions(self, layer: Any) -> Tensor:
        """int64 (nnz,), ascending."""
        found: Tensor = layer.mask.reshape(-1).nonzero().reshape(-1)
        return found

    def take(self, layer: Any, entries: Tensor) -> Tensor:
        """(nnz,): the entries (out_features, in_features) at the connections."""
        return entries[layer.mask]

    @torch.no_grad()
    def put(self, layer: Any, entries: Tensor, slots: Tensor, numbers: Tensor) -> None:
        """Set the entries of some slots."""
        positions, columns = self.positions(layer)[slots], self.shape[1]
        entries[positions // columns, positions % columns] = numbers.to(entries.dtype)

    @torch.no_grad()
    def move(self, layer: Any, entries: Tensor, source: Tensor) -> Tensor:
        """`entries`, zeroed in place wherever a rewrite that returned `source` left nothing."""
        survived = layer.mask.clone()
        survived.view(-1)[self.positions(layer)[source < 0]] = False
        return entries.masked_fill_(~survived, 0)

    def rewrite(self, layer: Any, drop: Tensor, grow: Tensor) -> Tensor:
        """Drop slots and grow positions in place."""
        held, place = self.held(layer), layer.mask.device
        topology, old_slots = self.matrix(layer).rewrite(
            ascending(as_positions(drop)), ascending(as_positions(grow)), compact=True
        )
        new, source = (torch.from_numpy(part).to(place) for part in (topology.positions(), old_slots))
        layer.mask.zero_().view(-1)[new] = True
        for entries in (held, held.grad, layer.forward_mask):
            if entries is not None:
                self.move(layer, entries, source)
        return source
