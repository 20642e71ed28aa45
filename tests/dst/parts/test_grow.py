from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselab.dst.parts.grow import random_free


@given(st.integers(0, 2**32 - 1), st.integers(1, 80), st.data())
def test_random_free_draws_free_positions_once(seed, n_positions, data):
    rng = np.random.default_rng(seed)
    kept = np.flatnonzero(rng.random(n_positions) < data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])))
    n_free = n_positions - kept.size
    k = data.draw(st.integers(0, n_free))
    drawn = random_free(rng, kept, n_positions, k)
    assert drawn.size == k
    assert np.all(np.diff(drawn) > 0)
    assert np.intersect1d(drawn, kept).size == 0
    assert k == 0 or 0 <= drawn[0] <= drawn[-1] < n_positions


def test_random_free_of_all_free_positions_is_exactly_those():
    kept = np.array([0, 1, 4, 9])
    drawn = random_free(np.random.default_rng(0), kept, 10, 6)
    assert drawn.tolist() == [2, 3, 5, 6, 7, 8]


def test_random_free_prefers_no_position_and_no_pair():
    kept = np.array([1, 2, 6])
    rng = np.random.default_rng(0)
    n_draws = 6000
    pairs = Counter(tuple(random_free(rng, kept, 8, 2).tolist()) for _ in range(n_draws))
    # Ten pairs of five free positions; six standard deviations of a count.
    expected = n_draws / 10
    assert len(pairs) == 10
    assert all(abs(count - expected) < 6 * np.sqrt(expected) for count in pairs.values())


def test_random_free_refuses_more_than_there_is():
    with pytest.raises(ValueError, match="population"):
        random_free(np.random.default_rng(0), np.array([0, 1]), 4, 3)


def test_random_free_of_a_huge_layer_needs_no_memory_of_its_size():
    kept = np.arange(0, 2**40, 2**30)
    drawn = random_free(np.random.default_rng(0), kept, 2**40, 1000)
    assert np.unique(drawn).size == 1000
    assert drawn[-1] > 2**39
