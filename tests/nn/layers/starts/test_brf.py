"""Bipartite receptive fields: counts, distances, chances."""

import doctest

import numpy as np
import pytest
import torch

from sparselab.nn import MaskedLinear, SparseLinear, brf_
from sparselab.nn.layers.starts import brf


def live(layer):
    mask = np.zeros(layer.shape, bool)
    mask.reshape(-1)[layer.positions().numpy()] = True
    return mask


def slow_distances(mask):
    """Ring distance of each connection, by unit of the smaller side."""
    mask = mask if mask.shape[0] <= mask.shape[1] else mask.T
    small, large = mask.shape
    distances = []
    for i in range(small):
        off = [abs(int(j) - i * (large // small) % large) for j in np.flatnonzero(mask[i])]
        distances.append(sorted(min(d, large - d) for d in off))
    return distances


@pytest.mark.parametrize("make", [SparseLinear, MaskedLinear])
@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (20, 20), (7, 50), (1, 9)])
@pytest.mark.parametrize("r", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.85, 1.0])
def test_counts_are_kept_and_shared_evenly(make, shape, r, sparsity):
    torch.manual_seed(0)
    layer = make(*shape, sparsity=sparsity)
    nnz = layer.nnz
    assert brf_(layer, r) is layer
    mask = live(layer)
    assert mask.sum() == layer.nnz == nnz
    degrees = mask.sum(1 if mask.shape[0] <= mask.shape[1] else 0)
    assert degrees.sum() == nnz
    assert degrees.max() - degrees.min() <= 1
    fan_in = mask.sum(1)[layer.positions().numpy() // shape[0]]
    assert np.all(layer.per_connection(layer.stored).detach().abs().numpy() <= fan_in**-0.5 * (1 + 1e-6))


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (20, 20)])
def test_without_chance_the_nearest_are_taken(shape):
    layer = brf_(SparseLinear(*shape, sparsity=0.7))
    large = max(shape)
    ring = sorted(min(d, large - d) for d in range(large))
    for distances in slow_distances(live(layer)):
        assert distances == ring[: len(distances)]


def test_chances_fall_with_the_distance():
    torch.manual_seed(0)
    r, counts, n_draws = 0.4, np.zeros(4), 3000
    for _ in range(n_draws):
        layer = brf_(SparseLinear(6, 1, sparsity=5 / 6), r)
        counts[slow_distances(live(layer))[0][0]] += 1
    chances = np.array([1, 2, 2, 1]) * (1.0 + np.arange(4)) ** -((1 - r) / r)
    expected = n_draws * chances / chances.sum()
    assert np.all(np.abs(counts - expected) <= 6 * np.sqrt(expected))


def test_blocks_do_not_show(monkeypatch):
    layers = []
    for block in (1, 1 << 20):
        monkeypatch.setattr(brf, "_BLOCK_ITEMS", block)
        torch.manual_seed(0)
        layers.append(brf_(SparseLinear(30, 12, sparsity=0.7), 0.3).positions())
    assert torch.equal(*layers)


def test_misuse_is_named():
    with pytest.raises(ValueError, match=r"r must lie in \[0, 1\]; got 2"):
        brf_(SparseLinear(4, 4), 2)
    with pytest.raises(ValueError, match="model must have sparse layers, got a Linear"):
        brf_(torch.nn.Linear(4, 4))


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(brf) == doctest.TestResults(0, 2)
