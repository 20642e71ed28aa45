"""Initialisation that minds how many inputs each output really has."""

from __future__ import annotations

import torch
from torch import Tensor

from sparselab.nn.storage.entries import repeated


def fan_in_uniform_(values: Tensor, indptr: Tensor) -> Tensor:
    """Fill `values` in place from U(-b, b) with ``b = 1 / sqrt(fan_in)`` of each connection's row.

    `torch.nn.Linear` draws from the same distribution with the dense fan-in; with the live one the variance
    of a row's output does not shrink with its sparsity.

    Parameters
    ----------
    values : float, nnz entries row by row
    indptr : int64 (rows + 1,)

    References
    ----------
    Evci, Ioannou, Keskin, Dauphin: Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win,
    AAAI 2022, section 3.1.
    """
    with torch.no_grad():
        bound = repeated(fan_in_bound(indptr, values.dtype), torch.diff(indptr))
        return values.uniform_(-1, 1).mul_(bound.view(values.shape))


def fan_in_bound(indptr: Tensor, dtype: torch.dtype) -> Tensor:
    """``1 / sqrt(fan_in)`` of each row, (rows,); 1 for an empty row."""
    return torch.diff(indptr).clamp(min=1).to(dtype).rsqrt()
