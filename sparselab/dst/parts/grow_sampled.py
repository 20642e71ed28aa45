"""Growth by the gradient at sampled positions: no dense gradient is formed, not even in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import torch

from sparselab.dst.checks import require_count, require_finite
from sparselab.dst.parts.agreed import Meeting, Operands
from sparselab.dst.parts.dense_gradient import GradientSummary
from sparselab.dst.parts.grow import GradientGrowth
from sparselab.dst.parts.passes import GradientCollector, PassCount
from sparselab.dst.view import LayerView
from sparselab.kernels.arrays import Array
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.kernels.rewiring.positions import kept_positions
from sparselab.kernels.rewiring.topk import largest
from sparselab.nn.layers.base import SparseLayer, as_matrix
from sparselab.nn.ops.operands import GradientOperands, Totals

Sampler = Literal["uniform", "grabo", "graest"]


class SampledGradientGrowth(GradientGrowth):
    """The positions of largest ``|G|`` in a random sample S of those without a weight.

    ``ceil(gamma * nnz)`` pairs of a row and a column are drawn with replacement; S is what remains without
    repetitions and without the live positions. A layer of sparsity 0.5 or less is looked at whole.

    Parameters
    ----------
    gamma : float
        Size of the sample per live connection; positive.
    sampler : {"uniform", "grabo", "graest"}
        How likely a row and a column are: all the same; as a bound of the gradient, ``sum_t |dY|`` and
        ``sum_t |X|``; or as an estimate of it, ``|sum_t s_t dY|`` and ``|sum_t s_t X|`` with random signs
        ``s_t``, the sketch of Alon, Matias and Szegedy.
    grad_accumulation : int
        Backward passes per optimizer step; G is the sum over them.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range.

    Notes
    -----
    ``|S| * n_tokens`` multiply-adds by the sparse kernels inside the backward pass of the step that
    updates, and O(nnz) memory. Guided samplers also read X and dY once. Live connections are never chosen,
    not even those being dropped, so a layer cannot grow more than S holds.

    References
    ----------
    Heddes et al., "Always-Sparse Training by Growing Connections with Guided Stochastic Exploration", 2024,
    arXiv 2401.06898 (uniform, GraBo and GraEst distributions).
    """

    by_row = False
    of_blocks = False

    def __init__(self, gamma: float = 1.0, sampler: Sampler = "uniform", grad_accumulation: int = 1) -> None:
        super().__init__(grad_accumulation)
        require_finite("gamma", gamma)
        if gamma <= 0:
            raise ValueError(f"gamma must be positive, got {gamma!r}")
        if sampler not in get_args(Sampler):
            raise ValueError(f"sampler must be one of {get_args(Sampler)}, got {sampler!r}")
        self.gamma = gamma
        self.sampler = sampler
        self._step = self._seed = 0

    def begin(self, step: int, seed: int) -> None:
        """Take note of what the sample depends on."""
        self._step, self._seed = require_count("step", step), seed

    def room(self, view: LayerView) -> int:
        """Positions in the sample."""
        return self.gradient(view).free_positions.size

    def describe(self) -> str:
        """Name and settings."""
        return f"SampledGradientGrowth({float(self.gamma)!r}, {self.sampler!r})"

    def _collector(
        self, layer: SparseLayer, index: int, most: Callable[[], int | Array]
    ) -> GradientCollector:
        rng = LayerView(index, self._step, self._seed, layer).rng()
        return _SampleCollector(layer, most, self._passes, self, rng)


class _SampleCollector(GradientCollector):
    """Summarises the gradient at a sample only."""

    def __init__(
        self,
        layer: SparseLayer,
        most: Callable[[], int | Array],
        passes: PassCount,
        growth: SampledGradientGrowth,
        rng: np.random.Generator,
    ) -> None:
        self._growth = growth
        self._rng = rng
        super().__init__(layer, most, passes)

    @torch.no_grad()
    def _form(self, layer: SparseLayer, operands: Operands, others: Meeting | None = None) -> GradientSummary:
        rows, columns = layer.shape
        if 2 * layer.nnz >= rows * columns:
            whole = super()._form(layer, operands, others)
            return _Sample(whole.finite, whole.live_scores[:0], whole.free_positions, whole.free_scores)
        dtype = layer.stored.dtype
        operands = [each.to(dtype) for each in operands]
        nothing = np.empty(0, torch.empty(0, dtype=dtype).numpy().dtype)
        finite = all(each.is_finite() for each in operands)
        if not (finite if others is None else others.all(finite)):
            return _Sample(False, nothing, np.empty(0, np.int64), nothing)
        n_sample = math.ceil(self._growth.gamma * layer.nnz) if self._most() else 0
        weights = _activity(operands, layer.shape, self._growth.sampler, self._rng, others)
        positions = _draw(self._rng, as_matrix(layer), n_sample, *weights)
        if others is None:
            scores = np.abs(sum(each.sampled(positions) for each in operands))
        else:
            scores = others.scores_at(operands, positions, layer.shape, dtype)
        return _Sample(bool(np.isfinite(scores).all()), nothing, positions, scores)


class _Sample(GradientSummary):
    """The gradient at a sample of free positions, which are all there is to choose from."""

    def best(self, W: RowTopology, drop: Array, k: int | Array) -> Array:
        """The `k` sampled positions of largest ``|G|``, ascending; ties went to the lower position."""
        winners: Array = self.free_positions[largest(self.free_scores, int(k))]
        return winners


def _activity(
    operands: Sequence[GradientOperands],
    shape: tuple[int, int],
    sampler: Sampler,
    rng: np.random.Generator,
    together: Meeting | None = None,
) -> tuple[Totals, Totals]:
    """How likely each row and each column is to be drawn, up to a factor."""
    rows, columns = (np.zeros(length) for length in shape)
    if sampler == "uniform":
        return rows, columns
    own = np.array([each.n_tokens for each in operands], np.int64)
    tokens, rank = ([own], 0) if together is None else (together.tokens, together.ranks.rank)
    for number in range(max(map(len, tokens))):
        # One sign for each token of the whole batch, of which a process has a part.
        parts = [int(each[number]) if number < len(each) else 0 for each in tokens]
        signs, before = None, sum(parts[:rank])
        if sampler == "graest":
            signs = 2.0 * rng.integers(0, 2, sum(parts))[before : before + parts[rank]] - 1
        if number < len(operands):
            by_row, by_column = operands[number].totals(signs)
            rows += by_row
            columns += by_column
    if together is not None:
        rows, columns = (together.sum(each) for each in (rows, columns))
    return np.abs(rows), np.abs(columns)


def _draw(rng: np.random.Generator, live: RowTopology, n: int, rows: Totals, columns: Totals) -> Array:
    """Draw `n` pairs in proportion to row weight times column weight; the free ones, each once, ascending."""
    row, column = _draw_from(rng, n, rows), _draw_from(rng, n, columns)
    drawn = np.unique(row * live.shape[1] + column)
    taken = kept_positions(live, np.empty(0, np.int64))
    if taken.size:
        slot = np.searchsorted(taken, drawn)
        drawn = drawn[taken[np.minimum(slot, taken.size - 1)] != drawn]
    return drawn


def _draw_from(rng: np.random.Generator, n: int, weights: Totals) -> Array:
    """Draw `n` indices with replacement in proportion to weights, or uniformly if all of them are 0."""
    reach = np.cumsum(weights)
    if not reach[-1]:
        return rng.integers(0, len(weights), n)
    drawn: Array = np.searchsorted(reach, rng.random(n) * reach[-1], side="right")
    return np.minimum(drawn, len(weights) - 1)
