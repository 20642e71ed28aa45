"""Sparse evolutionary training: drop the weakest connections, grow random ones."""

from __future__ import annotations

import numpy as np

from sparselab.dst.base import DynamicSparsityAlgorithm, Vacancy
from sparselab.dst.score import random_free
from sparselab.kernels.layout import Array


class SET(DynamicSparsityAlgorithm):
    """Grow uniformly at random among all positions that are not kept.

    Parameters
    ----------
    sparsity, drop_fraction, update_freq, start, stop, seed
        See `DynamicSparsityAlgorithm`.

    Notes
    -----
    O(nnz) memory, O(nnz log nnz) time per update. Three departures from the original: weights are dropped by
    ``|w|`` over the layer, not by sign; grown weights start at zero, not at a small random number; and
    updates are counted in steps, not epochs. These are the conventions of the RigL paper, so that the two
    differ in growth only.

    References
    ----------
    Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired
    by network science", Nature Communications 9:2383 (2018), Algorithm 1.
    """

    def _grow(self, vacancy: Vacancy) -> Array:
        rng = np.random.default_rng([self.seed, vacancy.layer_index, vacancy.step])
        rows, cols = vacancy.shape
        return random_free(rng, vacancy.kept, rows * cols, vacancy.drop.size)
