"""Whether the numbers of sparse tensors are places in them, which torch does not ask of what it is given.

torch writes by these numbers when it makes something else of a sparse tensor, so they are looked at before.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_of(x: Tensor) -> Tensor:
    """A sparse x made dense.

    Raises
    ------
    RuntimeError
        As `check_places`.
    """
    check_places(x)
    return x.to_dense()


def check_places(x: Tensor) -> None:
    """Raise RuntimeError unless a sparse x has indices within its shape, in the order that it says."""
    if x.layout is torch.sparse_coo:
        _check_coo(x)
    else:
        _check_compressed(x)


def _check_coo(x: Tensor) -> None:
    indices, sizes = x._indices(), x.shape[: x.sparse_dim()]
    if indices.shape[1] == 0:
        return
    for size, along in zip(sizes, indices, strict=True):
        check_range(along, size, "indices")
    if x.is_coalesced():
        place = indices[0]
        for size, along in zip(sizes[1:], indices[1:], strict=True):
            place = place * size + along
        if bool((place[1:] <= place[:-1]).any()):
            raise RuntimeError("input must have ascending indices, each once, if it is said to be coalesced")


def _check_compressed(x: Tensor) -> None:
    by_rows = x.layout in (torch.sparse_csr, torch.sparse_bsr)
    starts, others = _numbers(x)
    in_blocks = x.layout in (torch.sparse_bsr, torch.sparse_bsc)
    block = x.values().shape[starts.ndim : starts.ndim + 2] if in_blocks else (1, 1)
    first = starts.ndim - 1  # dimension of the rows; those before are of a batch
    grid = [x.shape[first + k] // block[k] for k in (0, 1)]
    lines, places = grid if by_rows else grid[::-1]
    n = others.shape[-1]
    if starts.shape[-1] != lines + 1:
        raise RuntimeError(
            f"input must have {lines + 1} offsets for its shape {tuple(x.shape)}, got {starts.shape[-1]}"
        )
    check_offsets(starts, n, "offsets")
    check_range(others, places, "indices")


def _numbers(x: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets of the compressed dimension, and the places in the other one."""
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return x.crow_indices(), x.col_indices()
    return x.ccol_indices(), x.row_indices()


def check_offsets(starts: Tensor, n: int, what: str) -> None:
    """Raise RuntimeError unless offsets (..., lines + 1) ascend from 0 to n."""
    ends = bool((starts[..., 0] == 0).all()) and bool((starts[..., -1] == n).all())
    if not ends or bool((starts[..., 1:] < starts[..., :-1]).any()):
        first, last = int(starts.flatten()[0]), int(starts.flatten()[-1])
        raise RuntimeError(f"input must have {what} that ascend from 0 to {n}, got {first} to {last}")


def check_range(numbers: Tensor, size: int, what: str) -> None:
    """Raise RuntimeError unless all numbers are among so many."""
    if numbers.numel():
        low, high = (int(bound) for bound in numbers.aminmax())
        if low < 0 or high >= size:
            raise RuntimeError(f"input must have {what} of 0..{size - 1}, got {low}..{high}")
