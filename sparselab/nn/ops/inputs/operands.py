"""The operands of the dense gradient of a layer whose input was a sparse matrix."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.csr.plan import transpose_plan
from sparselab.kernels.cpu.csr.sparse_input import sample_sparse
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.nn.ops.cpu.memory import as_vector
from sparselab.nn.ops.cpu.sparse_input import as_tokens
from sparselab.nn.ops.inputs.sparse import TokenRows
from sparselab.nn.ops.operands import GradientOperands, Totals, scale_, token_totals


class SparseInputOperands(GradientOperands):
    """Of a linear layer whose tokens were sparse.

    Parameters
    ----------
    rows : TokenRows
        The tokens; their entries are ``x``.
    dy : (tokens, out_features)
    """

    def __init__(self, rows: TokenRows, dy: Tensor) -> None:
        super().__init__(rows.entries, dy)
        self._rows = rows

    @property
    def rows(self) -> TokenRows:
        """The tokens."""
        return self._rows._replace(entries=self.x)

    @property
    def n_tokens(self) -> int:
        """Tokens: at most as many terms are in an entry of G."""
        return len(self.dy)

    def add_rows(self, start: int, out: Tensor, beta: float = 1.0) -> None:
        """``out <- beta * out + G[start : start + len(out)]``, by dense products of chunks of tokens."""
        scale_(out, beta)
        for tokens, chunk in self.rows.chunks():
            out.addmm_(self.dy[tokens, start : start + len(out)].T, chunk)

    def sampled(self, positions: Array) -> Array:
        """G at some positions, ascending, by the sparse kernel."""
        n_rows = self.dy.shape[1]
        topology = RowTopology.from_positions((n_rows, self._rows.n_columns), positions)
        found = np.empty(topology.capacity, as_vector(self.x).dtype)
        plan = transpose_plan(topology)
        sample_sparse(as_tokens(self.rows), topology.rows, plan, as_vector(self.dy), found)
        return found

    def totals(self, signs: Totals | None) -> tuple[Totals, Totals]:
        """Sums over tokens of the magnitudes of dY and X, or of their entries times the `signs`."""
        starts, columns, entries = (each.numpy() for each in self.rows.tensors)
        terms = np.abs(entries) if signs is None else entries * np.repeat(signs, np.diff(starts))
        sums = np.bincount(columns, terms, self._rows.n_columns).astype(np.float64)
        return token_totals(self.dy, signs), sums
