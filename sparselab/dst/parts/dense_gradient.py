"""The dense gradient of one step, looked at in blocks of rows and never held whole.

Growing by gradient needs ``G = dY^T X`` at positions that have no weight. It is formed inside the backward
pass, where X and dY are alive anyway, in blocks that fit a cache, and only on the steps that need it. What G
is follows ``.grad``: it is what a dense layer with the same weights would have there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.runtime.memory import scratch_of_gradient
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.kernels.rewiring.positions import merge_candidates
from sparselab.kernels.rewiring.rows import RowTopK, select_rows
from sparselab.kernels.rewiring.stream import BlockStream
from sparselab.kernels.rewiring.topk import StreamedTopK, largest
from sparselab.nn.ops.operands import GradientOperands

_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class GradientSummary:
    """What growth needs to know of one dense gradient; made by `summarise`.

    Attributes
    ----------
    finite : bool
        False if the gradient has a NaN or an infinity; the other fields mean nothing then.
    live_scores : float array, (nnz,)
        ``|G|`` at the live slots.
    free_positions : int array, (at most k,)
        Positions without a weight that have the largest ``|G|`` (of the layer or of each row), ascending.
    free_scores : float array
        ``|G|`` at `free_positions`.
    """

    finite: bool
    live_scores: npt.NDArray[np.floating[Any]]
    free_positions: Array
    free_scores: npt.NDArray[np.floating[Any]]

    def best(self, W: RowTopology, drop: Array, k: int | Array) -> Array:
        """The `k` positions of largest ``|G|`` among those without a weight and those just dropped.

        Parameters
        ----------
        W : RowTopology
            The connections before the drop, as they were when the gradient was formed.
        drop : int array
            Slots being dropped, ascending.
        k : int, or int array (rows,)
            How many, of the layer or of each row; at most what the summary was made for.

        Returns
        -------
        int array, (k,) or (k.sum(),)
            Ascending; ties went to the lower position.
        """
        positions, scores = merge_candidates(W, drop, self.live_scores, self.free_positions, self.free_scores)
        if isinstance(k, np.ndarray):
            ends = np.arange(W.shape[0] + 1, dtype=np.int64) * W.shape[1]
            best = select_rows(scores, np.searchsorted(positions, ends), k)
        else:
            best = largest(scores, k)
        winners: Array = positions[best]
        return winners


@torch.no_grad()
def summarise(
    operands: Sequence[GradientOperands],
    live: RowTopology | Array,
    shape: tuple[int, int],
    k: int | Array,
    dtype: torch.dtype,
    block_shape: tuple[int, int] = (1, 1),
    average: Callable[[torch.Tensor], Any] | None = None,
) -> GradientSummary:
    """Form G, the sum over `operands`, block by block and keep what growth needs; nothing if `k` is 0.

    Parameters
    ----------
    operands : sequence of GradientOperands
        Of some backward passes. Read only.
    live : RowTopology, or int64 array (nnz,)
        The connections, or, where `k` is a number, their positions, ascending.
    shape : (int, int)
        ``(out_features, in_features)``.
    k : int, or int array (rows,)
        Free positions to keep, of the layer or of each row of positions.
    dtype : float32 or float64
        Precision of G.
    block_shape : (int, int)
        Of the connections. Where these are blocks, the norms of the blocks of G stand for its entries.
    average : callable, optional
        Makes each block of rows the mean of those of several processes, in place.

    Notes
    -----
    ``n_tokens * out_features * in_features`` multiply-adds, by the dense GEMM; at most 4 MiB (or one row)
    of G at a time, beside O(nnz + k).
    """
    rows, cols = shape
    if not np.any(k):
        none = np.empty(0)
        return GradientSummary(True, none, none.astype(np.int64), none)
    operands = [each.to(dtype) for each in operands]
    n_out, n_in = block_shape
    height = min(rows, max(1, _BLOCK_BYTES // max(1, n_out * cols * dtype.itemsize)) * n_out)
    number = torch.empty(0, dtype=dtype).numpy().dtype
    memory = torch.from_numpy(scratch_of_gradient(height * cols, number))
    buffer = memory[: height * cols].view(height, cols)
    top: BlockStream
    if isinstance(k, np.ndarray):
        assert isinstance(live, RowTopology)
        top = RowTopK(k, live, number)
    else:
        top = StreamedTopK(k, live, -(-cols // n_in), number)
    for row in range(0, rows, height):
        stop = min(row + height, rows)
        block = buffer[: stop - row]
        for i, each in enumerate(operands):
            each.add_rows(row, block, beta=min(i, 1))
        if average is not None:
            average(block if operands else block.zero_())
        top.push(row // n_out, (block if block_shape == (1, 1) else block_norms(block, block_shape)).numpy())
        if not top.finite:
            return GradientSummary(False, top.live_scores, np.empty(0, np.int64), top.live_scores[:0])
    return GradientSummary(True, top.live_scores, *top.result())


def block_norms(matrix: torch.Tensor, block_shape: tuple[int, int]) -> torch.Tensor:
    """Euclidean norms of the blocks that a matrix is made of, which end where it ends; summed in float64."""
    n_out, n_in = block_shape
    rows, columns = matrix.shape
    whole = torch.nn.functional.pad(matrix, (0, -columns % n_in, 0, -rows % n_out))
    blocks = whole.reshape(len(whole) // n_out, n_out, -1, n_in)
    norms: torch.Tensor = torch.linalg.vector_norm(blocks, dim=(1, 3), dtype=torch.float64)
    return norms.to(matrix.dtype)
