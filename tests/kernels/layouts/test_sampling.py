"""`sample_distinct`: exact, sorted, distinct, and every set equally likely."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselab.kernels.layouts.sampling import sample_distinct

#: Populations above this are drawn with repeats that are then removed; below, by one shuffle.
SMALL = 4096


@given(
    population=st.sampled_from((0, 1, 2, 7, SMALL - 1, SMALL, SMALL + 1, 3 * SMALL, 10**6, 2**40, 2**63 - 1)),
    part=st.sampled_from((0, 1e-6, 0.01, 0.3, 0.499, 0.5)),
    complement=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_distinct_sorted_in_range_and_exact(
    population: int, part: float, complement: bool, seed: int
) -> None:
    k = min(round(part * population), 20_000)
    k = population - k if complement and population <= 10**6 else k
    drawn = sample_distinct(np.random.default_rng(seed), population, k)
    assert drawn.dtype == np.int64
    assert drawn.shape == (k,)
    assert np.all(drawn[1:] > drawn[:-1])
    if k:
        assert drawn[0] >= 0
        assert drawn[-1] < population
    np.testing.assert_array_equal(sample_distinct(np.random.default_rng(seed), population, k), drawn)


@pytest.mark.parametrize("population", [1, 10, SMALL, SMALL + 1, 50_000])
@pytest.mark.parametrize("part", [0, 0.1, 0.4])
def test_more_than_half_is_the_complement_of_less_than_half(population: int, part: float) -> None:
    k = int(part * population)
    few = sample_distinct(np.random.default_rng(3), population, k)
    many = sample_distinct(np.random.default_rng(3), population, population - k)
    np.testing.assert_array_equal(np.sort(np.concatenate([few, many])), np.arange(population))


class Scripted:
    """Stands in for the generator: fixed draws, and one chosen subset where a subset is asked for."""

    def __init__(self, draws: list[int], population: int, subset: tuple[int, ...]) -> None:
        self.draws, self.population, self.subset = draws, population, subset

    def integers(self, high: int, *, size: int, dtype: Any) -> Any:
        assert high == self.population
        return np.resize(np.array(self.draws, dtype), size)

    def choice(self, population: int, k: int, *, replace: bool) -> Any:
        assert not replace
        assert (population, k) == (len(set(self.draws)), len(self.subset))
        return np.array(self.subset, np.int64)


@pytest.mark.parametrize("surplus", [1, 2, 3])
def test_every_subset_of_the_distinct_draws_is_equally_likely(surplus: int) -> None:
    """Draws favour no number; then each way to leave out the surplus must give a set of its own."""
    draws, population = [9000, 5, 17, 5, 8, 9000, 4242, 1], 10_000
    distinct = sorted(set(draws))
    k = len(distinct) - surplus
    small = min(k, surplus)
    seen: Counter[tuple[int, ...]] = Counter()
    for subset in combinations(range(len(distinct)), small):
        rng: Any = Scripted(draws, population, subset)
        seen[tuple(sample_distinct(rng, population, k).tolist())] += 1
    assert seen == Counter(combinations(distinct, k))


def test_too_few_distinct_draws_are_added_to() -> None:
    class Rounds(Scripted):
        rounds = 0

        def integers(self, high: int, *, size: int, dtype: Any) -> Any:
            self.rounds += 1
            return np.full(size, 100 * self.rounds, dtype)

    rng: Any = Rounds([], 10_000, ())
    rng.choice = lambda population, k, *, replace: np.empty(0, np.int64)
    assert sample_distinct(rng, 10_000, 5).tolist() == [100, 200, 300, 400, 500]
    assert rng.rounds == 5


@pytest.mark.parametrize(("population", "k"), [(6, 3), (7, 2), (7, 6)])
def test_small_sets_come_equally_often(population: int, k: int) -> None:
    draws, rng = 6000, np.random.default_rng(0)
    seen = Counter(tuple(sample_distinct(rng, population, k).tolist()) for _ in range(draws))
    expected = draws / comb(population, k)
    chi_square = sum((count - expected) ** 2 / expected for count in seen.values())
    assert len(seen) == comb(population, k)
    assert chi_square < 2 * len(seen) + 20, "far above its mean, len(seen) - 1"


def test_numbers_of_a_large_population_come_equally_often() -> None:
    rng, population, rounds = np.random.default_rng(1), 8192, 200
    counts = np.zeros(population)
    for _ in range(rounds):
        counts[sample_distinct(rng, population, population // 4)] += 1
    variance = rounds * 0.25 * 0.75
    chi_square = np.sum((counts - rounds * 0.25) ** 2 / variance)
    assert abs(chi_square - population) < 6 * np.sqrt(2 * population)
    halves = counts.reshape(2, -1).mean(1)
    assert abs(halves[0] - halves[1]) < 6 * np.sqrt(2 * variance / (population / 2))


@pytest.mark.parametrize(("population", "k"), [(5, 6), (5, -1), (0, 1)])
def test_k_out_of_range(population: int, k: int) -> None:
    with pytest.raises(
        ValueError, match=rf"k must lie in \[0, {population}\], the size of the population, got {k}"
    ):
        sample_distinct(np.random.default_rng(0), population, k)


def test_memory_grows_with_the_sample_not_with_the_population() -> None:
    tracemalloc.start()
    sample_distinct(np.random.default_rng(0), 2**62, 10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 10_000
