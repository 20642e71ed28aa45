"""The operands of the dense gradient of an embedding, which is a sum of the gradients of its outputs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparselab.kernels.arrays import Array
from sparselab.nn.ops.operands import GradientOperands, Totals, scale_, token_totals


class LookupOperands(GradientOperands):
    """Of an embedding, where row v of G is the sum of dY over the tokens that are v.

    As a product it is ``G = X^T dY``, with the one-hot rows of the tokens as X.

    Parameters
    ----------
    x : int64 (tokens,)
        Which rows were looked up.
    dy : (tokens, embedding_dim)
    n_rows : int
        Rows of G.
    of_graph : bool
        See `sparselab.nn.ops.operands.GradientOperands`.
    """

    def __init__(self, x: Tensor, dy: Tensor, n_rows: int, of_graph: bool = False) -> None:
        super().__init__(x, dy, of_graph)
        self.n_rows = n_rows

    def to(self, dtype: torch.dtype) -> LookupOperands:
        """The gradient in another dtype; the tokens stay numbers of rows."""
        return self._with(self.x, self.dy.to(dtype), self.of_graph)

    @property
    def n_tokens(self) -> int:
        """Tokens: at most as many terms are in an entry of G."""
        return self.x.shape[0]

    def add_rows(self, start: int, out: Tensor, beta: float = 1.0) -> None:
        """``out <- beta * out + G[start : start + len(out)]``."""
        scale_(out, beta)
        inside = (self.x >= start) & (self.x < start + len(out))
        out.index_add_(0, self.x[inside] - start, self.dy[inside])

    def sampled(self, positions: Array) -> Array:
        """G at some positions, ascending; only rows of G that are not 0 are formed."""
        row, column = (torch.from_numpy(part) for part in np.divmod(positions, max(self.dy.shape[1], 1)))
        seen, number = torch.unique(self.x, return_inverse=True)
        # One more row, of zeros, for those that were not looked up.
        sums = self.dy.new_zeros((len(seen) + 1, self.dy.shape[1])).index_add_(0, number, self.dy)
        at = torch.searchsorted(seen, row.long())
        known = torch.cat((seen, seen.new_full((1,), -1)))[at] == row
        found: Array = sums[torch.where(known, at, len(seen)), column.long()].numpy()
        return found

    def totals(self, signs: Totals | None) -> tuple[Totals, Totals]:
        """How often each row was looked up, and sums of the magnitudes of dY; or both with the `signs`."""
        rows = np.bincount(self.x.numpy(), weights=signs, minlength=self.n_rows)
        return rows.astype(np.float64), token_totals(self.dy, signs)
