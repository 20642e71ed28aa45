"""Compiled parts of topology updates against plain NumPy, for one thread and two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselab.kernels import PaddedCSR, rewrite
from sparselab.kernels.cpu import partition as _shares
from sparselab.kernels.cpu.partition import split_rows
from sparselab.kernels.rewiring import positions as _growth
from sparselab.kernels.rewiring import rewrite as _rewrite
from sparselab.kernels.rewiring import select as _select
from sparselab.kernels.rewiring import topk as _topk
from sparselab.kernels.rewiring.positions import kept_positions, merge_candidates, skip_kept
from sparselab.kernels.rewiring.rewrite import move_entries
from sparselab.kernels.rewiring.select import select
from sparselab.kernels.rewiring.topk import StreamedTopK
from tests import strategies
from tests.kernels.contract import assert_same_bits
from tests.strategies import build

Array = np.ndarray[Any, Any]

FRACTIONS = st.sampled_from((0.0, 0.3, 1.0))


@pytest.fixture(autouse=True)
def _small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even small work into shares, so that their edges are met."""
    for module in (_growth, _rewrite, _select, _shares, _topk):
        monkeypatch.setattr(module, "_MIN_PART", 4)


def for_each_thread_count(compute: Callable[[], Array | tuple[Array, ...]]) -> Array | tuple[Array, ...]:
    """What `compute` returns, the same bits for one thread and for two."""
    results = []
    for n_threads in range(1, min(2, numba.config.NUMBA_NUM_THREADS) + 1):
        numba.set_num_threads(n_threads)
        results.append(compute())
    for other in results[1:]:
        pairs = zip(results[0], other, strict=True) if isinstance(other, tuple) else [(results[0], other)]
        for first, second in pairs:
            assert_same_bits(first, second)
    return results[0]


def test_results_that_depend_on_threads_are_seen() -> None:
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("needs two threads")
    with pytest.raises(AssertionError):
        for_each_thread_count(lambda: np.array([numba.get_num_threads()]))


def choose(rng: np.random.Generator, n: int, fraction: float) -> Array:
    """A sorted random part of ``range(n)``."""
    return np.flatnonzero(rng.permutation(n) < int(fraction * n))


@given(
    scores=st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, np.inf, -np.inf, np.nan]), max_size=40),
    dtype=st.sampled_from([np.float32, np.float64]),
    rest=st.booleans(),
    data=st.data(),
)
def test_select_is_sorting(scores: list[float], dtype: type, rest: bool, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(scores)))
    array = np.array(scores, dtype)
    order = sorted(
        range(len(scores)), key=lambda i: (-np.nan_to_num(array[i], nan=-np.inf, posinf=np.inf), i)
    )
    expected = sorted(order[k:] if rest else order[:k])
    chosen = for_each_thread_count(lambda: select(array, k, rest=rest))
    assert isinstance(chosen, np.ndarray)
    assert chosen.dtype == np.int32
    assert chosen.tolist() == expected


@given(W=strategies.matrices(sizes=(1, 7, 33)), fraction=FRACTIONS, rng=strategies.generators())
def test_kept_positions(W: PaddedCSR, fraction: float, rng: np.random.Generator) -> None:
    chosen = choose(rng, W.nnz, fraction)
    drop = W.live_slots()[chosen]
    kept = for_each_thread_count(lambda: kept_positions(W.topology, drop))
    np.testing.assert_array_equal(kept, np.delete(W.positions(), chosen))


@given(st.integers(1, 200), FRACTIONS, FRACTIONS, strategies.generators())
def test_skip_kept(n_positions: int, full: float, drawn: float, rng: np.random.Generator) -> None:
    kept = choose(rng, n_positions, full)
    free = np.setdiff1d(np.arange(n_positions), kept)
    ranks = choose(rng, len(free), drawn)
    positions = for_each_thread_count(lambda: skip_kept(ranks.copy(), kept.astype(np.int32)))
    np.testing.assert_array_equal(positions, free[ranks])


@given(
    W=strategies.matrices(sizes=(1, 7, 33)),
    amounts=st.tuples(FRACTIONS, FRACTIONS),
    rng=strategies.generators(),
)
def test_merge_candidates(W: PaddedCSR, amounts: tuple[float, float], rng: np.random.Generator) -> None:
    chosen = choose(rng, W.nnz, amounts[0])
    free = np.setdiff1d(np.arange(W.shape[0] * W.shape[1]), W.positions())
    free = free[choose(rng, len(free), amounts[1])]
    slot_scores, free_scores = rng.random(W.capacity), rng.random(len(free))
    drop = W.live_slots()[chosen]
    positions, scores = for_each_thread_count(
        lambda: merge_candidates(W.topology, drop, slot_scores, free, free_scores)
    )
    both = np.concatenate([W.positions()[chosen], free])
    order = np.argsort(both, kind="stable")
    np.testing.assert_array_equal(positions, both[order])
    np.testing.assert_array_equal(scores, np.concatenate([slot_scores[drop], free_scores])[order])


@given(st.integers(0, 40), st.integers(0, 40), strategies.generators())
def test_move_entries(n_old: int, n_new: int, rng: np.random.Generator) -> None:
    old = rng.integers(1, 100, n_old).astype(np.int32)
    source = rng.integers(-1, n_old, n_new)
    moved = for_each_thread_count(lambda: move_entries(old, source))
    np.testing.assert_array_equal(moved, np.append(old, 0)[source])


@pytest.mark.parametrize(("n", "source"), [(3, [3]), (3, [0, -2]), (0, [0])])
def test_sources_out_of_range_are_refused(n: int, source: list[int]) -> None:
    with pytest.raises(IndexError, match="source must hold -1 or slots of"):
        move_entries(np.zeros(n, np.int32), np.array(source))


@pytest.mark.parametrize("kind", ["even", "unequal", "empty and full rows", "one row"])
def test_shares_of_rows_cover_all_of_them(kind: str) -> None:
    W = build((70, 50), kind, np.random.default_rng(0))
    edges = split_rows(W.topology)
    assert edges[0] == 0
    assert edges[-1] == 70
    assert np.all(np.diff(edges) >= 0)


@given(
    W=strategies.matrices(sizes=(1, 7, 33)),
    amounts=st.tuples(FRACTIONS, FRACTIONS),
    rng=strategies.generators(),
)
def test_rewrite_is_the_same_for_any_number_of_threads(
    W: PaddedCSR, amounts: tuple[float, float], rng: np.random.Generator
) -> None:
    drop = W.live_slots()[choose(rng, W.nnz, amounts[0])]
    free = np.setdiff1d(np.arange(W.shape[0] * W.shape[1]), W.positions())
    grow = free[choose(rng, len(free), amounts[1])]

    def compute() -> tuple[Array, ...]:
        new, source = rewrite(W, drop, grow)
        return new.indptr, new.row_nnz, new.indices, new.values, source

    for_each_thread_count(compute)


@pytest.mark.parametrize("n_levels", [0, 1, 10**6])
@pytest.mark.parametrize("k", [1, 40, 5000])
@pytest.mark.parametrize("height", [1, 7, 60])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_streaming_beside_a_matrix_is_streaming_beside_its_positions(
    monkeypatch: pytest.MonkeyPatch, n_levels: int, k: int, height: int, dtype: type
) -> None:
    monkeypatch.setattr(_topk, "_SLACK", 16)
    rng = np.random.default_rng(k + height)
    W = build((60, 90), "unequal", rng, spare=2)
    G = rng.integers(-n_levels, n_levels + 1, W.shape).astype(dtype)
    free = np.setdiff1d(np.arange(G.size), W.positions())
    expected = np.sort(free[np.lexsort((free, -np.abs(G.flat[free])))[:k]])

    def compute(live: Any) -> tuple[Array, ...]:
        top = StreamedTopK(k, live, W.shape[1], dtype)
        for row in range(0, 60, height):
            top.push(row, G[row : row + height])
        seen = top.live_scores[W.live_slots()] if live is W.topology else top.live_scores
        return *top.result(), seen

    positions, scores, live_scores = for_each_thread_count(lambda: compute(W.topology))
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_array_equal(scores, np.abs(G.flat[expected]))
    np.testing.assert_array_equal(live_scores, np.abs(G.flat[W.positions()]))
    for first, second in zip(compute(W.positions()), (positions, scores, live_scores), strict=True):
        np.testing.assert_array_equal(first, second)
