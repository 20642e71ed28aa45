"""Random sets without an array as large as what they are drawn from."""

from __future__ import annotations

import math

import numpy as np

from sparselab.kernels.arrays import Array

#: Populations up to this are shuffled whole.
_SMALL = 1 << 12


def sample_distinct(rng: np.random.Generator, population: int, k: int) -> Array:
    """Draw `k` distinct integers of ``range(population)``, every set equally likely.

    Parameters
    ----------
    rng : numpy.random.Generator
    population : int
        At most 2**63 - 1.
    k : int
        ``0 <= k <= population``.

    Returns
    -------
    int64 array, (k,)
        In ascending order.

    Raises
    ------
    ValueError
        If k is negative or exceeds the population.

    Notes
    -----
    O(min(k, population - k) + k) memory: more than half is drawn by its complement. (NumPy's
    ``Generator.choice(replace=False)`` makes an array of the whole population at these sizes.)
    """
    if not 0 <= k <= population:
        raise ValueError(f"k must lie in [0, {population}], the size of the population, got {k}")
    if k > population - k:
        left_out = sample_distinct(rng, population, population - k)
        # The r-th number that is not left out is r plus how many left-out numbers come before it.
        ranks = np.arange(k, dtype=np.int64)
        gaps = left_out - np.arange(len(left_out), dtype=np.int64)
        return ranks + np.searchsorted(gaps, ranks, side="right")
    if population <= _SMALL:
        return np.sort(rng.choice(population, k, replace=False)).astype(np.int64)
    drawn = np.empty(0, np.int64)
    while len(drawn) < k:
        fraction_free = 1 - len(drawn) / population
        wanted = -population * math.log1p(-(k - len(drawn)) / (population * fraction_free))
        fresh = rng.integers(population, size=int(wanted * 1.001) + 64, dtype=np.int64)
        drawn = np.sort(np.concatenate([drawn, fresh]))  # np.unique hashes, at ten times the cost
        drawn = drawn[np.concatenate([[True], drawn[1:] != drawn[:-1]])]
    # No number is preferred so far, so a uniformly random surplus leaves a uniformly random set.
    return np.delete(drawn, sample_distinct(rng, len(drawn), len(drawn) - k))
