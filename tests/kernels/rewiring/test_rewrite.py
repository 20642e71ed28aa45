"""`rewrite`: what it means, where every connection goes, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselab.kernels import PaddedCSR, Rewrite, rewrite
from sparselab.kernels.reference.rewrite import rewrite as plain_rewrite
from tests import strategies
from tests.kernels.contract import assert_same_bits
from tests.strategies import INDEX_DTYPES, VALUE_DTYPES, build

Array = np.ndarray[Any, Any]


def draw_changes(
    rng: np.random.Generator, W: PaddedCSR, drop: float, grow: float, regrow: float
) -> tuple[Array, Array]:
    """Slots to drop and positions to grow, as fractions; some dropped positions are grown again."""
    live, positions = W.live_slots(), W.positions()
    chosen = rng.permutation(len(live))[: int(drop * len(live))]
    free = np.setdiff1d(np.arange(W.shape[0] * W.shape[1]), positions)
    grown = rng.permutation(free)[: int(grow * len(free))]
    again = positions[chosen[: int(regrow * len(chosen))]]
    return live[chosen], rng.permutation(np.concatenate([grown, again]))


def assert_law(W: PaddedCSR, drop: Array, grow: Array, result: Rewrite) -> None:
    """Fail unless the result is a sound matrix of the right connections and `source` tells their origin."""
    new, source = result
    new.topology.check()
    kept = set(W.positions().tolist()) - set(W.positions()[np.isin(W.live_slots(), drop)].tolist())
    assert set(new.positions().tolist()) == kept | set(grow.tolist())
    assert source.dtype == np.int64
    assert source.shape == (new.capacity,)
    was = dict(zip(W.positions().tolist(), W.live_slots().tolist(), strict=True))
    live = new.live_slots()
    assert source[live].tolist() == [was.get(position, -1) for position in new.positions().tolist()]
    survivors = live[source[live] >= 0]
    assert_same_bits(new.values[survivors], W.values[source[survivors]])
    assert np.all(new.values[live[source[live] < 0]] == 0)
    spare = np.setdiff1d(np.arange(new.capacity), live)
    assert np.all(source[spare] == -1)


@given(
    W=strategies.matrices(sizes=(1, 7, 9, 33)),
    amounts=st.tuples(*[st.sampled_from((0, 0.1, 0.5, 1))] * 3),
    compact=st.booleans(),
    rng=strategies.generators(),
)
def test_equals_the_reference_and_keeps_its_law(
    W: PaddedCSR, amounts: tuple[float, float, float], compact: bool, rng: np.random.Generator
) -> None:
    drop, grow = draw_changes(rng, W, *amounts)
    before = W.copy()
    result = rewrite(W, drop, grow, compact=compact)
    assert_law(W, drop, grow, result)
    new = result.matrix
    topology, origin = plain_rewrite(W.topology, drop, grow, compact=compact)
    assert_same_bits(result.source, origin)
    for field in ("indptr", "row_nnz", "indices"):
        assert_same_bits(getattr(new, field), getattr(topology, field))
    assert_same_bits(
        new.values, np.where(origin < 0, 0, W.values[origin] if W.capacity else 0).astype(W.dtype)
    )
    if compact:
        assert new.capacity == new.nnz
    elif np.array_equal(new.indptr, W.indptr):
        assert np.all(new.row_nnz <= np.diff(W.indptr))
    else:
        assert new.capacity == max(W.capacity, new.nnz)
    for field in ("indptr", "row_nnz", "indices", "values"):
        assert_same_bits(getattr(W, field), getattr(before, field))


def law_cases() -> list[Any]:
    W = build((5, 6), "even", np.random.default_rng(0), spare=2)
    drop, grow = W.live_slots()[:2], np.setdiff1d(np.arange(30), W.positions())[:2]
    good = rewrite(W, drop, grow)
    kept = int(np.argmax(good.source >= 0))
    other_value = good.matrix.values.copy()
    other_value[kept] += 1
    other_source = good.source.copy()
    other_source[kept] = -1
    grown_with_weight = good.matrix.values.copy()
    grown_with_weight[np.isin(good.matrix.live_slots(), np.nonzero(good.source < 0)[0]).argmax()] = 1
    return [
        (W, drop, grow, Rewrite(W, np.arange(W.capacity))),
        (W, drop[:1], grow, good),
        (W, drop, grow[:1], good),
        (W, drop, grow, Rewrite(good.matrix.with_values(other_value), good.source)),
        (W, drop, grow, Rewrite(good.matrix, other_source)),
        (W, drop, grow, Rewrite(good.matrix, good.source[:-1])),
        (W, drop, grow, Rewrite(good.matrix, good.source.astype(np.int32))),
    ]


@pytest.mark.parametrize("case", range(7))
def test_the_law_refuses_wrong_answers(case: int) -> None:
    with pytest.raises(AssertionError):
        assert_law(*law_cases()[case])


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
def test_rows_stay_where_they_are_while_they_fit(dtype: type, index_dtype: type) -> None:
    rng = np.random.default_rng(1)
    W = build((20, 30), "even", rng, dtype=dtype, index_dtype=index_dtype, spare=3)
    drop = W.live_slots()[::3]
    result = rewrite(W, drop, W.positions()[::3])
    assert_same_bits(result.matrix.indptr, W.indptr)
    assert result.matrix.indices.dtype == np.uint16
    assert result.matrix.dtype == dtype
    survivors = np.setdiff1d(W.live_slots(), drop)
    assert set(survivors.tolist()) <= set(result.source.tolist())


def test_a_row_that_outgrows_its_slots_is_repacked_into_the_same_capacity() -> None:
    W = PaddedCSR.from_dense(np.array([[1, 0, 0, 0], [1, 1, 1, 1]], np.float32))
    drop, grow = np.array([1, 2]), np.array([1, 3])
    result = rewrite(W, drop, grow)
    assert_law(W, drop, grow, result)
    assert result.matrix.capacity == W.capacity
    assert not np.array_equal(result.matrix.indptr, W.indptr)


def test_spare_slots_before_the_first_row_do_not_move_it() -> None:
    W = PaddedCSR(
        (2, 4), np.array([3, 5, 8]), np.array([2, 2]), np.array([0] * 3 + [0, 2, 1, 3, 0]), np.ones(8)
    )
    drop, grow = np.array([3, 6]), np.array([1, 4, 6])
    result = rewrite(W, drop, grow)
    assert_law(W, drop, grow, result)
    assert_same_bits(result.source, plain_rewrite(W.topology, drop, grow)[1])


def test_a_connection_dropped_and_grown_survives_with_its_value() -> None:
    W = PaddedCSR.from_dense(np.array([[0, 2, 3]], np.float32))
    result = rewrite(W, np.array([0, 1]), np.array([1]))
    np.testing.assert_array_equal(result.matrix.to_dense(), [[0, 2, 0]])
    assert result.source[0] == 0


def test_order_and_integer_type_of_the_arguments_do_not_matter() -> None:
    W = PaddedCSR.from_dense(np.array([[0, 2, 3], [0, 0, 4]], np.float32))
    expected = rewrite(W, np.array([0, 2]), np.array([0, 3, 4]))
    for drop, grow in (([2, 0], [4, 0, 3]), (np.uint16([2, 0]), np.int32([3, 4, 0]))):
        result = rewrite(W, drop, grow)  # type: ignore[arg-type]
        assert_same_bits(result.matrix.to_dense(), expected.matrix.to_dense())
        assert_same_bits(result.source, expected.source)
    unchanged = rewrite(W, [], [])  # type: ignore[arg-type]
    assert_same_bits(unchanged.matrix.to_dense(), W.to_dense())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (4, 5)])
def test_matrices_without_slots(shape: tuple[int, int]) -> None:
    W = PaddedCSR.from_dense(np.zeros(shape, np.float32))
    assert rewrite(W, [], []).matrix.nnz == 0  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="drop must hold live slots, got 0"):
        rewrite(W, [0], [])  # type: ignore[arg-type]
    if W.density:
        return
    grown = rewrite(W, [], [3, 19])  # type: ignore[arg-type]
    np.testing.assert_array_equal(grown.matrix.positions(), [3, 19])


W = PaddedCSR((2, 4), np.array([0, 3, 5]), np.array([2, 1]), np.array([0, 2, 9, 1, 9], np.uint16), np.ones(5))


@pytest.mark.parametrize(
    ("drop", "grow", "error", "message"),
    [
        ([2], [], ValueError, "drop must hold live slots, got 2"),
        ([-1], [], ValueError, "drop must hold live slots, got -1"),
        ([0, 5], [], ValueError, "drop must hold live slots, got 5"),
        ([0, 1, 0], [], ValueError, "drop must name each slot once"),
        ([0.0], [], TypeError, "drop must be a 1-D integer array, got float64"),
        ([[0]], [], TypeError, r"drop must be a 1-D integer array, got int64 of shape \(1, 1\)"),
        ([True], [], TypeError, "drop must be a 1-D integer array, got bool"),
        ([], [8], ValueError, r"grow must hold positions of 0\.\.7, got 8"),
        ([], [3, -1], ValueError, r"grow must hold positions of 0\.\.7, got -1"),
        ([], [2], ValueError, r"grow must hold distinct positions that are free or dropped, got \(0, 2\)"),
        ([], [5], ValueError, r"grow must hold distinct positions that are free or dropped, got \(1, 1\)"),
        ([], [3, 1, 3], ValueError, r"grow must hold distinct .*, got \(0, 3\)"),
        ([1], [2, 2], ValueError, r"grow must hold distinct .*, got \(0, 2\)"),
        ([], [1.5], TypeError, "grow must be a 1-D integer array, got float64"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("compact", [False, True])
def test_refusals(drop: Any, grow: Any, compact: bool, error: type[Exception], message: str) -> None:
    before = W.copy()
    with pytest.raises(error, match=message):
        rewrite(W, drop, grow, compact=compact)
    assert_same_bits(W.to_dense(), before.to_dense())
