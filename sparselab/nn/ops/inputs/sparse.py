"""Sparse matrices of tokens: their stored entries row by row, or dense chunks of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparselab.nn.ops.inputs.places import check_offsets, check_places, check_range

#: Of one chunk, unless one row takes more.
_CHUNK_BYTES = 8 << 20

_INTEGERS = (torch.int64, torch.int32)


class TokenRows(NamedTuple):
    """Tokens (len(starts) - 1, n_columns) in compressed rows.

    Token t has ``entries[starts[t] : starts[t + 1]]`` in the columns of these numbers, in any order; what is
    stored twice is summed. Three dense tensors, each of one dimension.
    """

    starts: Tensor
    columns: Tensor
    entries: Tensor
    n_columns: int

    @property
    def n_tokens(self) -> int:
        """Rows."""
        return len(self.starts) - 1

    @property
    def density(self) -> float:
        """Stored entries, of all that there could be."""
        return len(self.columns) / max(self.n_tokens * self.n_columns, 1)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Starts, columns and entries."""
        return self[:3]

    def float(self) -> TokenRows:
        """The same in float32."""
        return self._replace(entries=self.entries.float())

    def check(self) -> None:
        """Raise RuntimeError unless starts and columns are numbers that a kernel may read by."""
        starts, columns, entries, n_columns = self
        if starts.dtype not in _INTEGERS or columns.dtype not in _INTEGERS:
            raise RuntimeError(
                f"input must have int32 or int64 indices, got {starts.dtype} and {columns.dtype}"
            )
        if starts.ndim != 1 or columns.ndim != 1 or entries.shape != columns.shape or not len(starts):
            raise RuntimeError(
                "input must have one column for each entry, got starts, columns and entries of shape "
                f"{tuple(starts.shape)}, {tuple(columns.shape)} and {tuple(entries.shape)}"
            )
        check_offsets(starts, len(columns), "row offsets")
        check_range(columns, n_columns, "columns")

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Ranges of tokens, and the dense matrix of each; the whole never exists dense."""
        height = max(1, _CHUNK_BYTES // max(1, self.n_columns * self.entries.dtype.itemsize))
        starts, columns = self.starts.long(), self.columns.long()
        for first in range(0, self.n_tokens, height):
            stop = min(first + height, self.n_tokens)
            of_chunk = starts[first : stop + 1]
            begin, end = int(of_chunk[0]), int(of_chunk[-1])
            row = torch.repeat_interleave(of_chunk.diff())
            chunk = self.entries.new_zeros(stop - first, self.n_columns)
            at = row, columns[begin:end]
            yield slice(first, stop), chunk.index_put_(at, self.entries[begin:end], accumulate=True)


def token_rows(x: Tensor) -> TokenRows:
    """The rows of a sparse matrix of any of torch's layouts; of CSR its own tensors, not all checked."""
    x = x.detach()
    if x.layout is torch.sparse_csr and len(x.crow_indices()) == len(x) + 1:
        return TokenRows(x.crow_indices(), x.col_indices(), x.values(), x.shape[1])
    check_places(x)
    if x.layout is torch.sparse_coo:
        x = x.coalesce()
        row, columns = x.indices()
        ranks = torch.arange(x.shape[0] + 1, dtype=row.dtype)
        return TokenRows(torch.searchsorted(row.contiguous(), ranks), columns, x.values(), x.shape[1])
    entries: Tensor = x.to_sparse()
    return token_rows(entries)
