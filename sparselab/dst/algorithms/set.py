"""Sparse evolutionary training: drop the weakest connections, grow random ones."""

from __future__ import annotations

from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm


class SET(DynamicSparsityAlgorithm):
    """Drop the smallest ``|w|``, grow uniformly at random among all positions that are not kept.

    Takes the parameters of `DynamicSparsityAlgorithm`, whose defaults are this algorithm.

    Notes
    -----
    O(nnz) memory and time per update. Three departures from the original: weights are dropped by ``|w|`` over
    the layer, not by sign (``drop=SignedMagnitude()`` does); grown weights start at zero, not at a small
    random number (``grown_value=Normal(0.1)`` does); and updates are counted in steps, not epochs. These are
    the conventions of the RigL paper, so that the two differ in growth only.

    References
    ----------
    Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired
    by network science", Nature Communications 9:2383 (2018), Algorithm 1.
    """
