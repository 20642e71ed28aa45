"""The dense gradient of one step, looked at in blocks of rows and never held whole.

Growing by gradient needs ``G = dY^T X`` at positions that have no weight. It is formed inside the backward
pass, where X and dY are alive anyway, in blocks that fit a cache, and only on the steps that need it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparselab.kernels.arrays import Array
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.kernels.rewiring.positions import merge_candidates
from sparselab.kernels.rewiring.rows import RowTopK, select_rows
from sparselab.kernels.rewiring.stream import BlockStream
from sparselab.kernels.rewiring.topk import StreamedTopK, largest
from sparselab.nn.ops.operands import GradientOperands
from sparselab.nn.layers.base import SparseLayer, as_matrix

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
    factors: Sequence[GradientOperands],
    live: RowTopology | Array,
    shape: tuple[int, int],
    k: int | Array,
    dtype: torch.dtype,
    block_shape: tuple[int, int] = (1, 1),
) -> GradientSummary:
    """Form G, the sum over `factors`, block by block and keep what growth needs; nothing if `k` is 0.

    Parameters
    ----------
    factors : sequence of GradientOperands
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

    Notes
    -----
    ``n_tokens * out_features * in_features`` multiply-adds, by the dense GEMM; at most 4 MiB (or one row)
    of G at a time, beside O(nnz + k).
    """
    rows, cols = shape
    if not np.any(k):
        none = np.empty(0)
        return GradientSummary(True, none, none.astype(np.int64), none)
    factors = [each.to(dtype) for each in factors]
    n_out, n_in = block_shape
    height = min(rows, max(1, _BLOCK_BYTES // max(1, n_out * cols * dtype.itemsize)) * n_out)
    buffer = torch.empty((height, cols), dtype=dtype)
    top: BlockStream
    if isinstance(k, np.ndarray):
        assert isinstance(live, RowTopology)
        top = RowTopK(k, live, buffer.numpy().dtype)
    else:
        top = StreamedTopK(k, live, -(-cols // n_in), buffer.numpy().dtype)
    for row in range(0, rows, height):
        stop = min(row + height, rows)
        block = buffer[: stop - row]
        for i, each in enumerate(factors):
            each.add_rows(row, block, beta=min(i, 1))
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


class GradientCollector:
    """Sits on a layer for one step and summarises its dense gradient once all of it has arrived.

    Parameters
    ----------
    layer : SparseLayer
        Held weakly, because the layer holds the collector.
    most : callable
        Says, once the gradient is there, how many candidates to keep, of the layer or of each row.
    passes : int
        Backward passes that one optimizer step sums over.

    Notes
    -----
    The last backward call of the step is recognised by counting: as many backward as forward calls complete a
    pass, and `passes` passes complete the step. Only then is the gradient formed, straight from the factors
    of that call; factors of the calls before it are copied, since they are lent for the call only. A forward
    call that is never followed by a backward one (an evaluation without ``torch.no_grad``, activation
    checkpointing) hides the end; then all factors are copied and `summary` forms the gradient. The result
    is the same.
    """

    def __init__(self, layer: SparseLayer, most: Callable[[], int | Array], passes: int) -> None:
        self._layer = weakref.ref(layer)
        self._most = most
        self.passes = passes
        self._forwards = 0
        self._backwards = 0
        self._passes_seen = 0
        self._late = False
        self._held: list[GradientOperands] = []
        self._summary: GradientSummary | None = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # Copies and pickles of a layer start without a collector: this one counts for this layer only.
        return type(None), ()

    def forward_seen(self) -> None:
        """Count a forward pass of the layer."""
        self._forwards += 1

    def backward_seen(self, factors: GradientOperands) -> None:
        """Take in the factors of one backward pass."""
        self._backwards += 1
        complete = self._backwards == self._forwards
        self._passes_seen += complete
        if self._summary is not None:
            self._late = True
        elif complete and self._passes_seen == self.passes:
            self._finish([*self._held, factors])
        else:
            self._held.append(factors.clone())

    def check(self) -> None:
        """Make sure that the passes declared are the passes that came.

        Raises
        ------
        RuntimeError
            If there were more of them, or fewer but not none.
        """
        too_few = self._backwards == self._forwards and 0 < self._passes_seen < self.passes
        if self._late or too_few:
            raise RuntimeError(
                f"the algorithm was told that {self.passes} backward pass(es) make one optimizer step "
                f"(grad_accumulation={self.passes}), but a layer saw {self._passes_seen}. Pass "
                f"grad_accumulation=<backward passes per optimizer.step()>, and call step() after every "
                f"optimizer.step()"
            )

    def summary(self) -> GradientSummary | None:
        """What was seen of the gradient, or None if no backward pass reached the layer."""
        if self._summary is None and self._held:
            self._finish(self._held)
        return self._summary

    def release(self) -> None:
        """Let go of what was seen, which takes as much room as the weights."""
        self._summary = None
        self._held = []

    def _finish(self, factors: Sequence[GradientOperands]) -> None:
        layer = self._layer()
        if layer is None:
            return
        self._summary = self._form(layer, factors)
        self._held = []

    def _form(self, layer: SparseLayer, factors: Sequence[GradientOperands]) -> GradientSummary:
        return summarise(
            factors, as_matrix(layer), layer.shape, self._most(), layer.stored.dtype, layer.block_shape
        )
