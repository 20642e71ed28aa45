"""Dense blocks in compressed rows of the grid that covers W."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sparselab.kernels.arrays import for_kernels
from sparselab.kernels.layouts.block_csr import BlockTopology
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.nn.ops.cutting import join
from sparselab.nn.storage.compressed import Compressed, Loaded
from sparselab.nn.storage.entries import move_blocks, repeated


class Blocks(Compressed):
    """As `Compressed`, where a connection is a block of weights.

    Blocks that reach beyond W are stored whole; what lies outside is 0.
    """

    layout: ClassVar[str] = "bsr"

    def n_weights(self, layer: Any) -> int:
        """Live weights: those of the blocks that lie within W."""
        if layer.weight_values.is_meta:
            return int(min(layer.weight_values.numel(), math.prod(self.shape)))
        return int(self.input_pointers(layer)[-1])

    def take(self, layer: Any, entries: Tensor) -> Tensor:
        """The entries themselves."""
        return entries

    @torch.no_grad()
    def put(self, layer: Any, entries: Tensor, slots: Tensor, numbers: Tensor) -> None:
        """Set the entries of some slots; what lies outside W becomes 0."""
        entries[slots] = numbers.to(entries.dtype)
        self.clear_outside(layer, entries)

    def move(self, layer: Any, entries: Tensor, source: Tensor) -> Tensor:
        """What lives per block, after a rewrite."""
        return move_blocks(entries, source)

    @torch.no_grad()
    def draw_weights(self, layer: Any) -> None:
        """Fresh weights, by the inputs that each output really has; 0 outside W."""
        values = layer.weight_values
        bound = self._fan_in(layer).clamp(min=1).to(values.dtype).rsqrt()
        per_block = repeated(bound, torch.diff(layer.indptr))
        values.uniform_(-1, 1).mul_(per_block[:, None, None])
        self.clear_outside(layer, values)

    def clear_outside(self, layer: Any, entries: Tensor) -> None:
        """Set to 0 what of the entries lies outside W."""
        slots, outside = self.outside(layer)
        entries[slots] = entries[slots].masked_fill(outside, 0)

    def blocks(self, layer: Any) -> BlockTopology:
        """The topology as `sparselab.kernels` has it; nothing is copied."""
        return BlockTopology(self.shape, self.block_shape, self.matrix(layer))

    def outside(self, layer: Any) -> tuple[Tensor, Tensor]:
        """Blocks that reach beyond W, int64 (n,), and where, bool (n, block_out, block_in)."""
        slots, outside = (torch.from_numpy(for_kernels(part)) for part in self.blocks(layer).outside())
        place = layer.indices.device
        return slots.to(place), outside.to(place)

    def _fan_in(self, layer: Any) -> Tensor:
        """int64 (grid[0],): inputs of each output of a block row."""
        width = self.block_shape[1]
        columns = (self.shape[1] - layer.indices.long() * width).clamp(max=width)
        ends = torch.cat((columns.new_zeros(1), columns.cumsum(0)))[layer.indptr]
        return torch.diff(ends)

    def input_pointers(self, layer: Any) -> Tensor:
        """Row pointers (out_features + 1,) whose differences are the inputs that each output has."""
        fan_in = self._fan_in(layer)[:, None].expand(-1, self.block_shape[0]).reshape(-1)[: self.shape[0]]
        return torch.cat((fan_in.new_zeros(1), fan_in.cumsum(0)))

    def spread(self, layer: Any, values: Tensor) -> Tensor:
        """Values as a dense matrix of the shape of W, with their gradient."""
        blocks = values.new_zeros((math.prod(self.grid), *self.block_shape))
        return join(blocks.index_put_((self.positions(layer),), values), self.shape).contiguous()

    def entries(self, layer: Any) -> tuple[RowTopology, Tensor | slice]:
        """All single weights row by row: where each is in W, and in the flattened values."""
        (rows, columns), (height, width) = self.shape, self.block_shape
        row, column = np.divmod(self.blocks(layer).positions(), max(self.grid[1], 1))
        i = row[:, None, None] * height + np.arange(height)[:, None]
        j = column[:, None, None] * width + np.arange(width)
        (inside,) = np.nonzero(((i < rows) & (j < columns)).reshape(-1))
        positions = (i * columns + j).reshape(-1)[inside]
        order = np.argsort(positions)
        topology = RowTopology.from_positions(self.shape, positions[order])
        return topology, torch.from_numpy(inside[order])

    def check_state(self, state: dict[str, Any], columns: torch.dtype) -> Loaded | None:
        """What a saved state says of the connections; None if it has nothing of W.

        Raises TypeError or ValueError if it is not valid.
        """
        loaded = super().check_state(state, columns)
        if loaded is None:
            return None
        row = repeated(torch.arange(self.grid[0]), torch.diff(loaded.indptr))
        inside = _inside(self.shape, self.block_shape, row, loaded.indices.cpu().long())
        if bool((state["weight_values"].detach().cpu()[~inside] != 0).any()):
            raise ValueError("weight_values must be 0 where blocks reach beyond W, got other numbers there")
        return loaded


def _inside(shape: tuple[int, int], block_shape: tuple[int, int], row: Tensor, column: Tensor) -> Tensor:
    """bool (blocks, *block_shape): what of each block lies within a matrix of that shape."""
    rows, columns = (
        at[:, None] * size + torch.arange(size) < n
        for at, size, n in zip((row, column), block_shape, shape, strict=True)
    )
    return rows[:, :, None] & columns[:, None, :]
