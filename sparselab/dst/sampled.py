"""Growth by the gradient at sampled positions: no dense gradient is formed, not even in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from sparselab.dst._checks import require_count, require_finite
from sparselab.dst.gradient import GradientCollector, GradientSummary
from sparselab.dst.grow import GradientGrowth
from sparselab.dst.update import LayerView
from sparselab.kernels import PaddedCSR, sddmm_dw
from sparselab.kernels._growth import kept_positions
from sparselab.kernels._topk import largest
from sparselab.kernels.layout import Array
from sparselab.nn.topology import SparseTopology, as_matrix

Sampler = Literal["uniform", "grabo", "graest"]
Pairs = list[tuple[torch.Tensor, torch.Tensor]]
Activity = npt.NDArray[np.floating[Any]]

_CHUNK_TOKENS = 64


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
    ``|S| * n_tokens`` multiply-adds by `sparselab.kernels.sddmm_dw` inside the backward pass of the step that
    updates, and O(nnz) memory. Guided samplers also read X and dY once. Live connections are never chosen,
    not even those being dropped, so a layer cannot grow more than S holds.

    References
    ----------
    Heddes et al., "Always-Sparse Training by Growing Connections with Guided Stochastic Exploration", 2024,
    arXiv 2401.06898 (uniform, GraBo and GraEst distributions).
    """

    by_row = False

    def __init__(self, gamma: float = 1.0, sampler: Sampler = "uniform", grad_accumulation: int = 1) -> None:
        super().__init__(grad_accumulation)
        require_finite("gamma", gamma)
        if gamma <= 0:
            raise ValueError(f"gamma must be positive; got {gamma!r}")
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
        return self.scores(view.index).size

    def scores(self, index: int) -> npt.NDArray[np.floating[Any]]:
        """``|G|`` at the positions that layer number `index` may grow."""
        summary = self._collectors[index].summary()
        assert summary is not None
        return summary.free_scores

    def describe(self) -> str:
        """Name and settings."""
        return f"SampledGradientGrowth({float(self.gamma)!r}, {self.sampler!r})"

    def _collector(
        self, layer: SparseTopology, index: int, most: Callable[[], int | Array]
    ) -> GradientCollector:
        rng = LayerView(index, self._step, self._seed, layer).rng()
        return _SampleCollector(layer, most, self._passes, self, rng)


class _SampleCollector(GradientCollector):
    """Summarises the gradient at a sample only."""

    def __init__(
        self,
        layer: SparseTopology,
        most: Callable[[], int | Array],
        passes: int,
        growth: SampledGradientGrowth,
        rng: np.random.Generator,
    ) -> None:
        super().__init__(layer, most, passes)
        self._growth = growth
        self._rng = rng

    @torch.no_grad()
    def _form(self, layer: SparseTopology, pairs: Pairs) -> GradientSummary:
        rows, columns = layer.shape
        if 2 * layer.nnz >= rows * columns:
            whole = super()._form(layer, pairs)
            return _Sample(whole.finite, whole.live_scores[:0], whole.free_positions, whole.free_scores)
        dtype = layer.stored.dtype
        pairs = [(x.to(dtype), dy.to(dtype)) for x, dy in pairs]
        nothing = np.empty(0, torch.empty(0, dtype=dtype).numpy().dtype)
        if not all(bool(operand.isfinite().all()) for pair in pairs for operand in pair):
            return _Sample(False, nothing, np.empty(0, np.int64), nothing)
        n_sample = math.ceil(self._growth.gamma * layer.nnz) if self._most() else 0
        weights = _activity(pairs, self._growth.sampler, self._rng)
        positions = _draw(self._rng, as_matrix(layer), n_sample, *weights)
        scores = np.abs(sampled_gradient(pairs, positions, layer.shape))
        return _Sample(bool(np.isfinite(scores).all()), nothing, positions, scores)


class _Sample(GradientSummary):
    """The gradient at a sample of free positions, which are all there is to choose from."""

    def best(self, W: PaddedCSR, drop: Array, k: int | Array) -> Array:
        """The `k` sampled positions of largest ``|G|``, ascending; ties went to the lower position."""
        winners: Array = self.free_positions[largest(self.free_scores, int(k))]
        return winners


def sampled_gradient(pairs: Pairs, positions: Array, shape: tuple[int, int]) -> Array:
    """``G = sum of dY^T X`` at some positions only.

    Parameters
    ----------
    pairs : list of (X, dY)
        X is ``(n_tokens, in_features)``, dY ``(n_tokens, out_features)``, all float32 or all float64.
    positions : int array, (n,)
        Ascending.
    shape : (int, int)
        ``(out_features, in_features)``.

    Returns
    -------
    float array, (n,)
    """
    operands = [(x.numpy().T, dy.numpy().T) for x, dy in pairs]
    sample = PaddedCSR.from_positions(shape, positions).astype(operands[0][0].dtype)
    total = np.zeros(len(positions), sample.dtype)
    for X, DY in operands:
        total += sddmm_dw(sample, DY, X)
    return total


def _activity(pairs: Pairs, sampler: Sampler, rng: np.random.Generator) -> tuple[Activity, Activity]:
    """How likely each row and each column is to be drawn, up to a factor."""
    columns, rows = (np.zeros(operand.shape[1]) for operand in pairs[0])
    for x, dy in pairs:
        signs = 2.0 * rng.integers(0, 2, len(x)) - 1 if sampler == "graest" else None
        if sampler != "uniform":
            columns += _total(x, signs)
            rows += _total(dy, signs)
    return np.abs(rows), np.abs(columns)


def _total(tokens: torch.Tensor, signs: Activity | None) -> Activity:
    """Sum over tokens of magnitudes, or of signed entries; the same bits for any number of threads."""
    total = np.zeros(tokens.shape[1])
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        stop = start + _CHUNK_TOKENS
        chunk = tokens[start:stop].double().numpy()
        total += (np.abs(chunk) if signs is None else chunk * signs[start:stop, None]).sum(0)
    return total


def _draw(rng: np.random.Generator, live: PaddedCSR, n: int, rows: Activity, columns: Activity) -> Array:
    """Draw `n` pairs in proportion to row weight times column weight; the free ones, each once, ascending."""
    row, column = _draw_from(rng, n, rows), _draw_from(rng, n, columns)
    drawn = np.unique(row * live.shape[1] + column)
    taken = kept_positions(live, np.empty(0, np.int64))
    if taken.size:
        slot = np.searchsorted(taken, drawn)
        drawn = drawn[taken[np.minimum(slot, taken.size - 1)] != drawn]
    return drawn


def _draw_from(rng: np.random.Generator, n: int, weights: Activity) -> Array:
    """Draw `n` indices with replacement in proportion to weights, or uniformly if all of them are 0."""
    reach = np.cumsum(weights)
    if not reach[-1]:
        return rng.integers(0, len(weights), n)
    drawn: Array = np.searchsorted(reach, rng.random(n) * reach[-1], side="right")
    return np.minimum(drawn, len(weights) - 1)
