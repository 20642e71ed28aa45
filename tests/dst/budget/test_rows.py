"""Row scope: every output loses and grows its share."""

import doctest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselab.dst import SET, ByRemaining, DynamicSparsityAlgorithm, Growth, LinearSchedule, RigL, apportion
from sparselab.dst.budget import rows
from sparselab.dst.budget.rows import apportion_rows
from sparselab.dst.parts.drop import lowest_of_rows
from sparselab.dst.view import rows_of
from tests.dst.algorithms.test_rigl import COLS, ROWS, backward, make, operands


@given(
    parts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=8),
    data=st.data(),
)
def test_apportion_rows_is_apportion(parts, data):
    weights, caps = np.array(parts, int).reshape(-1, 2).T
    total = data.draw(st.integers(0, int(caps.sum())))
    assert apportion_rows(total, weights, caps).tolist() == apportion(total, weights.tolist(), caps.tolist())


@pytest.mark.parametrize("total", [-1, 5])
def test_an_impossible_total_is_refused(total):
    with pytest.raises(ValueError, match=r"between 0 and the sum of the caps, 4, got (-1|5)"):
        apportion_rows(total, np.array([1, 1]), np.array([2, 2]))


def test_rows_of_counts_slots():
    assert rows_of(np.array([0, 3, 4, 5]), np.array([0, 1, 3, 3, 6])).tolist() == [1, 0, 0, 3]


def test_the_lowest_of_rows():
    scores = np.array([3.0, 1.0, 1.0, np.nan, 0.0, 2.0])
    assert lowest_of_rows(scores, np.array([0, 3, 6]), np.array([1, 2])).tolist() == [2, 3, 4]


def row_counts(layer):
    return np.bincount(layer.positions().numpy() // COLS, minlength=ROWS)


def slow_drop(layer, fraction):
    """Dropped positions and how many each row lost, by sorting each row."""
    counts = row_counts(layer).tolist()
    share = apportion(int(fraction * layer.nnz), counts, counts)
    positions = layer.positions().tolist()
    weights = dict(zip(positions, layer.per_connection(layer.stored.detach()).tolist(), strict=True))
    dropped = []
    for row, n in enumerate(share):
        own = [p for p in positions if p // COLS == row]
        dropped += sorted(own, key=lambda p: (-abs(weights[p]), p))[len(own) - n :]
    return dropped, share


@pytest.mark.parametrize("kind", ["fake", "real", "masked"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_rigl_by_row(kind, fraction, sparsity):
    layer = make(kind, torch.float64, sparsity)
    layer.apply(algorithm := RigL(drop_fraction=fraction, update_freq=1, scope="row"))
    x, dy = operands(1, torch.float64)
    dropped, share = slow_drop(layer, fraction)
    steep = (dy.T @ x).abs().reshape(-1).tolist()
    expected = sorted(set(layer.positions().tolist()) - set(dropped))
    for row, n in enumerate(share):
        free = [p for p in range(row * COLS, (row + 1) * COLS) if p not in set(expected)]
        expected += sorted(free, key=lambda p: (-steep[p], p))[:n]
    backward(layer, x, dy)
    algorithm.step()
    assert layer.positions().tolist() == sorted(expected)
    assert algorithm.last_update[0].grown == int(fraction * layer.nnz)


@pytest.mark.parametrize("kind", ["fake", "real", "masked"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_set_by_row(kind, sparsity):
    layer = make(kind, torch.float64, sparsity)
    layer.apply(algorithm := SET(drop_fraction=0.3, update_freq=1, scope="row"))
    counts = row_counts(layer)
    dropped, _ = slow_drop(layer, 0.3)
    kept = set(layer.positions().tolist()) - set(dropped)
    algorithm.step()
    assert kept <= set(layer.positions().tolist())
    np.testing.assert_array_equal(row_counts(layer), counts)


@pytest.mark.parametrize("make_algorithm", [SET, RigL])
@pytest.mark.parametrize(("start", "end"), [(0.5, 0.9), (0.9, 0.3)], ids=["sparser", "denser"])
def test_rows_share_what_a_schedule_says(make_algorithm, start, end):
    layer = make("real", torch.float64, start)
    layer.apply(algorithm := make_algorithm(LinearSchedule(start, end, 5), update_freq=1, scope="row"))
    for step in range(1, 6):
        before = row_counts(layer).tolist()
        layer.zero_grad()
        backward(layer, *operands(step, torch.float64))
        algorithm.step()
        total = round((1 - start - (end - start) * step / 5) * ROWS * COLS)
        assert layer.nnz == total
        assert row_counts(layer).tolist() == apportion(total, before, [COLS] * ROWS)


class Nowhere(Growth):
    def choose(self, update):
        raise NotImplementedError


@pytest.mark.parametrize("parts", [{"grow": Nowhere()}, {"redistribute": ByRemaining()}])
def test_parts_that_know_no_rows_are_refused(parts):
    with pytest.raises(ValueError, match=r'scope="row" needs.*(Nowhere|ByRemaining)'):
        DynamicSparsityAlgorithm(scope="row", **parts)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99))
def test_random_growth_by_row_depends_on_the_seed(seed):
    drawn = []
    for each in (seed, seed, seed + 1):
        layer = make("real")
        layer.apply(algorithm := SET(update_freq=1, scope="row", seed=each))
        algorithm.step()
        drawn.append(layer.positions().tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(rows, extraglobs={"np": np}) == (0, 1)
