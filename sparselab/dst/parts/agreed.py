"""The dense gradient of all processes together, of which each has seen a part of the batch.

What an update looks at is the mean over processes of ``G = dY^T X``, as `DistributedDataParallel` averages
the gradients of live weights. No process holds it whole: blocks of it are averaged one after the other; or,
where tokens are so few that X and dY are less than G, one process gets those of all and tells the others what
it has found; or only what some process proposes is averaged. All processes end with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch

from sparselab.dst.parts.dense_gradient import GradientSummary, summarise
from sparselab.dst.replicas import Ranks, n_proposed
from sparselab.kernels.arrays import Array, slot_dtype
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.kernels.rewiring.positions import kept_positions
from sparselab.kernels.rewiring.rows import select_rows
from sparselab.kernels.rewiring.topk import largest
from sparselab.nn.ops.operands import GradientOperands, LinearOperands

Operands = Sequence[GradientOperands]

_NONE = np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class Meeting:
    """The processes that look at the gradient of one layer; all call the same methods in the same order.

    Attributes
    ----------
    ranks : Ranks
    root : int
        Which of them does what one does for all.
    tokens : sequence of int64 arrays, one for each process
        The tokens of each of its operands, in their order.
    plain : bool
        Whether all operands, in all processes, are products ``dY^T X`` of two matrices.
    """

    ranks: Ranks
    root: int
    tokens: Sequence[Array]
    plain: bool

    def summarise(
        self,
        operands: Operands,
        live: RowTopology,
        shape: tuple[int, int],
        k: int | Array,
        dtype: torch.dtype,
        block_shape: tuple[int, int] = (1, 1),
    ) -> GradientSummary:
        """As `sparselab.dst.parts.dense_gradient.summarise`, of the mean over all processes.

        Parameters
        ----------
        operands : sequence of GradientOperands
            Of this process; may be empty.
        live, shape, k, dtype, block_shape
            As there, and the same in all processes.
        """
        form = partial(summarise, live=live, shape=shape, dtype=dtype, block_shape=block_shape)
        if not np.any(k):
            return form(operands, k=k)
        n_weights = math.prod(block_shape)
        way = self.way(shape, live.nnz * n_weights, int(np.sum(k)) * n_weights, dtype)
        if way == "factors":
            return self._by_factors(operands, shape, dtype, partial(form, k=k))
        if way == "candidates":
            own = self._proposed(operands, k, live, form)
            scores_at = partial(self.scores_at, operands, shape=shape, dtype=dtype, block_shape=block_shape)
            return _not_finite(dtype) if own is None else self._compared(own, live, k, scores_at)
        return form(operands, k=k, average=self.ranks.mean_)

    def all(self, here: bool) -> bool:
        """Whether something is so in every process."""
        return bool(self.ranks.numbers([here]).all())

    def sum(self, numbers: Array) -> Array:
        """Sums over all processes, entry by entry; written to."""
        total: Array = self.ranks.sum_(torch.from_numpy(numbers)).numpy()
        return total

    @property
    def _most_tokens(self) -> int:
        """Tokens of the process that has most."""
        return max(int(each.sum()) for each in self.tokens)

    def way(
        self, shape: tuple[int, int], nnz: int, k: int, dtype: torch.dtype
    ) -> Literal["blocks", "factors", "candidates"]:
        """How the processes look at G: of the ways that were asked for, the one that sends least.

        Parameters
        ----------
        shape : (int, int)
            Of G.
        nnz, k : int
            Weights that there are, and that may grow.
        dtype : float32 or float64

        Notes
        -----
        Factors are the way only of so few tokens that one process forms the G of all in about the time in
        which each forms its own.
        """
        ranks, c, size = self.ranks.size, self.ranks.replicas.candidates, dtype.itemsize
        # Bytes times (ranks - 1) / ranks that each process sends; positions have 8.
        bytes_of = {
            "blocks": 2 * shape[0] * shape[1] * size,
            "factors": (self._most_tokens * sum(shape) + nnz) * size + k * (size + 8),
            "candidates": 2 * (nnz + ranks * c * k) * size + ranks * c * k * 8,
        }
        if (
            not (self.plain and self._most_tokens)
            or ranks * self._most_tokens * sum(shape) >= 2 * shape[0] * shape[1]
        ):
            del bytes_of["factors"]
        if self.ranks.replicas.growth == "exact":
            del bytes_of["candidates"]
        ways: tuple[Literal["blocks", "factors", "candidates"], ...] = ("blocks", "factors", "candidates")
        return min((way for way in ways if way in bytes_of), key=bytes_of.__getitem__)

    def _by_factors(
        self,
        operands: Operands,
        shape: tuple[int, int],
        dtype: torch.dtype,
        form: Callable[[Operands], GradientSummary],
    ) -> GradientSummary:
        """One process forms G from the operands of all, and the others get what it has found."""
        # Tokens of zeros, where one has fewer, add nothing.
        x = torch.zeros(self._most_tokens, shape[1], dtype=dtype)
        dy = torch.zeros(len(x), shape[0], dtype=dtype)
        at = 0
        for each in operands:
            x[at : at + each.n_tokens], dy[at : at + each.n_tokens] = each.x, each.dy
            at += each.n_tokens
        dy /= self.ranks.size
        theirs = zip(self.ranks.to_one(x, self.root), self.ranks.to_one(dy, self.root), strict=True)
        if self.ranks.rank == self.root:
            return self._told(form([LinearOperands(*each) for each in theirs]), dtype)
        return self._told(None, dtype)

    def _told(self, found: GradientSummary | None, dtype: torch.dtype) -> GradientSummary:
        """What `root` has found, which it gives, in all processes."""
        head = torch.zeros(3, dtype=torch.int64)
        if found is not None:
            head[:] = torch.tensor([found.finite, len(found.live_scores), len(found.free_positions)])
        finite, n_live, n_free = self.ranks.from_one(head, self.root).tolist()
        if not finite:
            return _not_finite(dtype)
        if found is None:
            live, free = torch.empty(n_live, dtype=dtype), torch.empty(n_free, dtype=dtype)
            positions = torch.empty(n_free, dtype=torch.int64)
        else:
            live, free = torch.from_numpy(found.live_scores), torch.from_numpy(found.free_scores)
            positions = torch.from_numpy(found.free_positions).long()
        for each in (live, positions, free):
            self.ranks.from_one(each, self.root)
        return GradientSummary(True, live.numpy(), positions.numpy(), free.numpy())

    def _proposed(
        self, operands: Operands, k: int | Array, live: RowTopology, form: Callable[..., GradientSummary]
    ) -> Array | None:
        """Positions without a weight that some process proposes, ascending; None if one is not finite."""
        rows, columns = live.shape
        replicas = self.ranks.replicas
        if isinstance(k, np.ndarray):
            many: int | Array = np.minimum([n_proposed(n, replicas) for n in k], columns)
        else:
            many = min(n_proposed(k, replicas), rows * columns)
        own, finite = _NONE, True
        if operands:
            mine = form(operands, k=many)
            own, finite = mine.free_positions, mine.finite
        if not self.all(finite):
            return None
        every = self.ranks.lists(torch.from_numpy(own.astype(np.int64)))
        proposed: Array = np.unique(torch.cat(every).numpy())
        return proposed

    def _compared(
        self, proposed: Array, live: RowTopology, k: int | Array, scores_at: Callable[[Array], Array]
    ) -> GradientSummary:
        """The largest means at what was proposed, and those at the connections."""
        rows, columns = live.shape
        taken = kept_positions(live, _NONE).astype(np.int64)
        wanted = np.union1d(taken, proposed)
        scores = scores_at(wanted)
        if not np.isfinite(scores).all():
            return GradientSummary(False, scores[:0], _NONE, scores[:0])
        is_live = np.zeros(wanted.size, np.bool_)
        is_live[np.searchsorted(wanted, taken)] = True
        free = scores[~is_live]
        if isinstance(k, np.ndarray):
            begin = np.searchsorted(proposed, np.arange(rows + 1, dtype=np.int64) * columns)
            best = select_rows(free, begin, np.minimum(k, np.diff(begin)))
        else:
            best = largest(free, min(k, free.size))
        positions = proposed[best].astype(slot_dtype(rows * columns))
        return GradientSummary(True, scores[is_live], positions, free[best])

    def scores_at(
        self,
        operands: Operands,
        positions: Array,
        shape: tuple[int, int],
        dtype: torch.dtype,
        block_shape: tuple[int, int] = (1, 1),
    ) -> Array:
        """``|G|`` of all processes at some positions, ascending; where these are of blocks, the norms.

        Parameters
        ----------
        operands : sequence of GradientOperands
            Of this process; may be empty.
        positions : int array
            The same in all processes.
        shape, dtype, block_shape
            As of `summarise`.
        """
        entries, inside, order = _entries(positions, shape, block_shape)
        values = torch.zeros(entries.size, dtype=dtype)
        for each in operands:
            values += torch.from_numpy(each.to(dtype).sampled(entries))
        self.ranks.mean_(values)
        if block_shape == (1, 1):
            single: Array = values.abs().numpy()
            return single
        whole = torch.zeros(inside.shape, dtype=torch.float64)
        in_order = torch.empty(entries.size, dtype=torch.float64)
        in_order[torch.from_numpy(order)] = values.double()
        whole[torch.from_numpy(inside)] = in_order
        scores: Array = torch.linalg.vector_norm(whole, dim=(1, 2)).to(dtype).numpy()
        return scores


def _entries(
    positions: Array, shape: tuple[int, int], block_shape: tuple[int, int]
) -> tuple[Array, Array, Array]:
    """The single positions, ascending, of some blocks; which entries of the blocks they are, and their order.

    Returns
    -------
    entries : int64 (n,)
    inside : bool (blocks, *block_shape)
        Whether each entry lies within the matrix.
    order : int64 (n,)
        Which of those that do each of `entries` is.
    """
    (rows, columns), (height, width) = shape, block_shape
    row, column = np.divmod(positions.astype(np.int64), max(-(-columns // width), 1))
    i = row[:, None, None] * height + np.arange(height)[:, None]
    j = column[:, None, None] * width + np.arange(width)
    inside = (i < rows) & (j < columns)
    entries = (i * columns + j)[inside]
    order = np.argsort(entries)
    return entries[order], inside, order


def _not_finite(dtype: torch.dtype) -> GradientSummary:
    nothing = torch.empty(0, dtype=dtype).numpy()
    return GradientSummary(False, nothing, _NONE, nothing)
