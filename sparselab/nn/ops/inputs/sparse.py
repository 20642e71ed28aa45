"""Sparse matrices of tokens, as dense chunks of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Of one chunk, unless one row takes more.
_CHUNK_BYTES = 8 << 20


def dense_chunks(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of rows of a sparse matrix, of any of torch's layouts, and the dense matrix of each.

    The whole never exists dense; what is stored twice is summed, as torch does.
    """
    entries = (x if x.layout is torch.sparse_coo else x.to_sparse()).detach().coalesce()
    row, column = entries.indices()
    numbers, (rows, columns) = entries.values(), entries.shape
    height = max(1, _CHUNK_BYTES // max(1, columns * x.dtype.itemsize))
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        first, last = torch.searchsorted(row, torch.tensor([start, stop])).tolist()
        chunk = numbers.new_zeros(stop - start, columns)
        chunk[row[first:last] - start, column[first:last]] = numbers[first:last]
        yield slice(start, stop), chunk
