"""Gradients by a matrix, of which one factor lies in tiles already and the other one is packed."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparselab.kernels.arrays import NONE_OF, Array, address
from sparselab.kernels.cpu.bsr import sddmm_dw as blocks
from sparselab.kernels.cpu.bsr.plan import panel_plan, unpack_weights
from sparselab.kernels.cpu.csr import sddmm_dw as rows
from sparselab.kernels.cpu.csr.plan import gradient_plan
from sparselab.kernels.cpu.csr.skinny import matrix
from sparselab.kernels.cpu.mlp.tiles import Tiling
from sparselab.kernels.cpu.runtime.memory import aligned_zeros
from sparselab.kernels.layouts.block_csr import BlockTopology

_FLOAT = np.dtype(np.float32)


class RowsGradient:
    """``dW[i, j] = sum_t DY[i, t] X[j, t]`` at single connections, part of the tokens by part.

    Parameters
    ----------
    topology : RowTopology
    out : float32 array (slots,)
        Becomes the gradient.
    sums : float32 array (rows,), or empty
        Becomes ``sum_t DY[:, t]``.
    """

    def __init__(self, topology: Any, out: Array, sums: Array) -> None:
        self.topology, self.plan = topology, gradient_plan(topology)
        self.out, self.sums = out, sums
        self.partials = aligned_zeros(8 * sums.size, _FLOAT)
        out.fill(0)

    def add_outputs(self, DY: Array, tiling: Tiling, X: Array) -> None:
        """Add tokens of which DY lies in tiles."""
        n_rows, n_tokens = self.topology.shape[0], X.shape[1]
        self._add((address(DY), (0, 0), (n_rows, n_tokens), NONE_OF[_FLOAT]), matrix(X), tiling.rows, 0)

    def add_inputs(self, DY: Array, X: Array, tiling: Tiling) -> None:
        """Add tokens of which X lies in tiles."""
        shape = self.topology.shape[1], DY.shape[1]
        self._add(matrix(DY), (address(X), (0, 0), shape, NONE_OF[_FLOAT]), 0, tiling.rows)

    def _add(self, DY: Any, X: Any, dy_tiled: int, x_tiled: int) -> None:
        shape, n_tokens = self.topology.shape, X[2][1]
        sums_at = address(self.sums) if self.sums.size else 0
        rows.add_products(
            self.topology.rows.indices, self.plan, DY, X, address(self.out), self.partials, sums_at,
            rows.cut_gradient(self.plan, shape, n_tokens, 4), dy_tiled, x_tiled,
        )  # fmt: skip

    def finish(self) -> None:
        """Nothing is left to be done."""


class BlocksGradient:
    """The same at the blocks of a `BlockTopology`, 0 times a number where they reach beyond the matrix."""

    def __init__(self, topology: BlockTopology, out: Array, sums: Array, memory: Array) -> None:
        self.plan, self.out, self.sums = panel_plan(topology, False), out, sums
        self.packed = out if self.plan.is_packed else memory[: self.plan.packed_items]
        self.packed.fill(0)
        self.partials = blocks.zero_partials(self.plan, sums)

    def add_outputs(self, DY: Array, tiling: Tiling, X: Array) -> None:
        """Add tokens of which DY lies in tiles."""
        self._add(blocks.factor(X), DY, tiling, X.shape[1], True)

    def add_inputs(self, DY: Array, X: Array, tiling: Tiling) -> None:
        """Add tokens of which X lies in tiles."""
        self._add(blocks.factor(DY), X, tiling, DY.shape[1], False)

    def _add(self, packed: blocks.Factor, tiles: Array, tiling: Tiling, n_tokens: int, first: bool) -> None:
        tiled = blocks.Factor(address(tiles), NONE_OF[_FLOAT], (0, 0), tiling.rows)
        factors = (tiled, packed) if first else (packed, tiled)
        blocks.add_products(self.plan, *factors, n_tokens, self.packed, self.partials, self.sums)

    def finish(self) -> None:
        """Bring the entries into the order of the blocks."""
        if not self.plan.is_packed:
            unpack_weights(self.packed, self.plan, self.out)


Gradient = RowsGradient | BlocksGradient


def gradient_of(topology: Any, out: Array, sums: Array, memory: Array) -> Gradient:
    """The gradient by a matrix with this topology; `memory` as of `matrices.matrix_of`."""
    if isinstance(topology, BlockTopology):
        return BlocksGradient(topology, out, sums, memory)
    return RowsGradient(topology, out, sums)
