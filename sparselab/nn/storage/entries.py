"""What lives per entry of a layer's weights: moved with its connection, and ranked."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparselab.kernels.rewiring.rewrite import move_entries
from sparselab.kernels.rewiring.select import select
from sparselab.nn.ops.cpu.threads import use_torch_threads

#: Moving a number needs its width only.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def repeated(numbers: Tensor, counts: Tensor) -> Tensor:
    """Each number as often as its count says, (counts.sum(),).

    As `torch.repeat_interleave`, which waits for ever for its threads in a forked process.
    """
    flat = numbers.detach().cpu()
    narrow = flat.dtype == torch.bfloat16  # which NumPy lacks
    array: npt.NDArray[Any] = (flat.view(torch.int16) if narrow else flat).numpy()
    found = torch.from_numpy(np.repeat(array, counts.cpu().numpy()))
    return (found.view(torch.bfloat16) if narrow else found).to(numbers.device)


@torch.no_grad()
def move_slots(entries: Tensor, source: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """``new[i] = old[source[i]]``, and 0 where ``source[i] == -1``: in place if the shape stays the same.

    In place, so that other references to the tensor see it.

    Parameters
    ----------
    entries : (n,) or any shape in C order, any dtype
    source : int64 (m,)
        Old slot of each new slot, or -1.
    shape : tuple of int
        Of the result; (m,) if None.

    Raises
    ------
    IndexError
        If a source is neither a slot nor -1.
    """
    integers = _INTEGERS.get(entries.itemsize)
    if integers is not None and entries.is_contiguous() and not entries.is_complex():
        old = entries.detach().cpu().view(integers).reshape(-1).numpy()
        moved = torch.from_numpy(move_entries(old, source.cpu().numpy())).view(entries.dtype)
    else:
        # One more entry, so that -1 reads a zero.
        moved = torch.cat((entries.reshape(-1), entries.new_zeros(1)))[source.to(entries.device)]
    moved = moved.view(source.shape if shape is None else shape)
    if entries.shape == moved.shape:
        return entries.copy_(moved)
    return moved.to(entries.device)


@torch.no_grad()
def move_blocks(entries: Tensor, source: Tensor) -> Tensor:
    """As `move_slots`, for entries (n, ...): in place if there are as many after it."""
    moved = entries.new_zeros((len(source), *entries.shape[1:]))
    kept = (source >= 0).to(entries.device)
    moved[kept] = entries[source.to(entries.device)[kept]]
    return entries.copy_(moved) if entries.shape == moved.shape else moved


def as_scores(entries: Tensor) -> npt.NDArray[np.float32 | np.float64]:
    """Magnitudes, row by row, as an array of its own for `sparselab.kernels`, which knows no bfloat16."""
    scores = entries.detach().abs().reshape(-1).cpu()
    known = scores.dtype in (torch.float32, torch.float64)
    magnitudes: npt.NDArray[np.float32 | np.float64] = (scores if known else scores.float()).numpy()
    return magnitudes


def slot_scores(entries: Tensor) -> npt.NDArray[np.float32 | np.float64]:
    """Magnitudes of what `SparseLayer.per_connection` returns, the norm of each block, as `as_scores`.

    Blocks are summed in float64, so that no square overflows.
    """
    if entries.ndim == 1:
        return as_scores(entries)
    norms = torch.linalg.vector_norm(entries.detach().flatten(1), dim=1, dtype=torch.float64)
    return as_scores(norms.to(entries.dtype))


def largest_positions(entries: Tensor, k: int) -> Tensor:
    """int64 (k,), ascending: where the largest magnitudes are, row by row; of equal ones the first.

    NaN ranks below every number.
    """
    use_torch_threads()
    return torch.from_numpy(select(as_scores(entries), k)).long().to(entries.device)
