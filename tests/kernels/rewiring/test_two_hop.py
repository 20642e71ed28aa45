"""Tickets dealt to paths of length three, against CH2-L3n computed entry by entry."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselab.kernels import PaddedCSR
from sparselab.kernels.rewiring import positions as _growth
from sparselab.kernels.rewiring.two_hop import TwoHops
from tests import strategies
from tests.kernels.rewiring.test_positions import for_each_thread_count

Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def _small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_growth, "_MIN_PART", 4)


def slow_scores(live: Array) -> Array:
    """The first sum of CH2-L3n, over rows, at every free position; 0 at the others."""
    scores = np.zeros(live.shape)
    for i, j in zip(*np.nonzero(~live), strict=True):
        for row in np.flatnonzero(live[:, j]):
            internal = int((live[row] & live[i]).sum())
            external = int(live[row].sum()) - internal - 1  # one of them is the link to j
            if internal:
                scores[i, j] += (internal + 1) / (external + 1)
    return scores


def test_the_oracle_by_hand() -> None:
    # Row 0 has columns 0 and 1, row 1 has 1, 2 and 3: they share one. From row 0, by column 1 and row 1, to
    # 2: internal 1, external 1 (column 3), so 2 / 2. Row 2 has 0, 1 and 2: internal 2, external 0, so 3 / 1.
    live = np.array([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 0]], np.bool_)
    np.testing.assert_array_equal(slow_scores(live)[0], [0, 0, 4, 1])


def two_hops(live: Array) -> TwoHops:
    W = PaddedCSR.from_dense(live.astype(np.float32))
    return TwoHops(W.topology, W.transpose().topology)


def dealt(hops: TwoHops, shape: tuple[int, ...], n_picks: int) -> Array:
    """What all tickets and equally many picks of each bring to every position, per pick."""
    tickets = np.repeat(np.arange(hops.n_tickets), n_picks)
    picks = np.tile((np.arange(n_picks) + 0.5) / n_picks, hops.n_tickets)
    counts = np.zeros(shape)
    np.add.at(counts, hops.follow(tickets, picks), 1)
    return counts / n_picks


@given(
    st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), strategies.generators()
)
def test_each_position_gets_its_score_in_tickets(
    rows: int, columns: int, density: float, rng: np.random.Generator
) -> None:
    live = rng.random((rows, columns)) < density
    hops = two_hops(live)
    # A ticket leads to one of at most 8 columns with equal chances, so these many picks fall evenly.
    np.testing.assert_allclose(dealt(hops, live.shape, math.lcm(*range(1, 9))), slow_scores(live), rtol=1e-12)


def test_tickets_that_are_dealt_wrongly_are_seen() -> None:
    live = np.array([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 0]], np.bool_)
    hops = two_hops(live)
    hops.n_tickets -= 1
    assert not np.allclose(dealt(hops, live.shape, 840), slow_scores(live))


@pytest.mark.parametrize("kind", ["even", "unequal", "empty and full rows", "one row", "nothing"])
def test_tickets_and_where_they_lead_are_the_same_for_any_number_of_threads(kind: str) -> None:
    W = strategies.build((70, 50), kind, np.random.default_rng(0))

    def compute() -> tuple[Array, ...]:
        hops = TwoHops(W.topology, W.transpose().topology)
        rng = np.random.default_rng(1)
        tickets = np.sort(rng.integers(0, max(hops.n_tickets, 1), min(hops.n_tickets, 500)))
        return np.array(hops.n_tickets), *hops.follow(tickets, rng.random(len(tickets)))

    for_each_thread_count(compute)
