"""PaddedCSR: conversions, random matrices, and the invariants that protect kernels without bounds checks."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from sparselab.kernels import PaddedCSR
from sparselab.kernels.arrays import index_dtype, n_connections, slot_dtype
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.kernels.layouts.sampling import sample_distinct
from tests import strategies
from tests.kernels.contract import assert_same_bits, dense
from tests.strategies import VALUE_DTYPES


def assert_same_matrix(actual: PaddedCSR, expected: PaddedCSR) -> None:
    """Fail unless shape, dtypes, live connections and their values are the same; spare slots may differ."""
    assert actual.shape == expected.shape
    assert (actual.dtype, actual.indices.dtype) == (expected.dtype, expected.indices.dtype)
    assert_same_bits(actual.row_nnz, expected.row_nnz)
    assert_same_bits(actual.positions(), expected.positions())
    assert_same_bits(actual.values[actual.live_slots()], expected.values[expected.live_slots()])


def test_the_comparison_of_matrices_sees_each_difference() -> None:
    W = PaddedCSR.from_dense(np.array([[0, 2, 3], [4, 0, 0]], np.float32))
    assert_same_matrix(W, W.padded(1.0))
    others = [
        W.astype(np.float64),
        W.with_values(2 * W.values),
        PaddedCSR((2, 4), W.indptr, W.row_nnz, W.indices, W.values),
        PaddedCSR.from_dense(np.array([[2, 0, 3], [4, 0, 0]], np.float32)),
        PaddedCSR.from_dense(np.array([[2, 3, 4], [0, 0, 0]], np.float32)),
    ]
    for other in others:
        with pytest.raises(AssertionError):
            assert_same_matrix(other, W)


@given(W=strategies.matrices())
def test_dense_and_back(W: PaddedCSR) -> None:
    matrix = W.to_dense()
    assert_same_bits(matrix, dense(W)[0].astype(W.dtype))
    back = PaddedCSR.from_dense(matrix)
    assert_same_matrix(back, W)
    assert back.capacity == back.nnz == np.count_nonzero(matrix)


@given(W=strategies.matrices(sizes=(1, 7, 33, 129)))
def test_scipy_and_back(W: PaddedCSR) -> None:
    theirs = W.to_scipy()
    assert theirs.has_canonical_format
    assert_same_bits(theirs.toarray(), W.to_dense())
    for format in ("csr", "csc", "coo"):
        assert_same_matrix(PaddedCSR.from_scipy(theirs.asformat(format)), W)


def test_from_scipy_sorts_sums_duplicates_keeps_zeros_and_the_original() -> None:
    coo = scipy.sparse.coo_array((np.array([3, 1, 0, 2]), ([0, 0, 0, 0], [4, 1, 3, 1])), (2, 5))
    W = PaddedCSR.from_scipy(coo, padding=1.0)
    assert W.dtype == np.float32
    np.testing.assert_array_equal(W.positions(), [1, 3, 4])
    np.testing.assert_array_equal(W.values[W.live_slots()], [3, 0, 3])
    unsorted = scipy.sparse.csr_array((np.array([1.0, 2.0]), np.array([3, 0]), np.array([0, 2])), (1, 4))
    assert PaddedCSR.from_scipy(unsorted).values.tolist() == [2, 1]
    assert unsorted.indices.tolist() == [3, 0]


@given(W=strategies.matrices(sizes=(1, 7, 33, 129)))
def test_transpose(W: PaddedCSR) -> None:
    transposed = W.transpose()
    assert_same_bits(np.ascontiguousarray(transposed.to_dense().T), W.to_dense())
    assert transposed.capacity == W.nnz
    back = transposed.transpose()
    assert_same_matrix(back, W)


@given(W=strategies.matrices(sizes=(1, 7, 33, 129)))
def test_positions_and_live_slots(W: PaddedCSR) -> None:
    expected = [
        (i * W.shape[1] + int(W.indices[slot]), slot)
        for i in range(W.shape[0])
        for slot in range(W.indptr[i], W.indptr[i] + W.row_nnz[i])
    ]
    positions, slots = np.array(expected, np.int64).reshape(-1, 2).T
    assert_same_bits(W.positions(), np.ascontiguousarray(positions))
    assert_same_bits(W.live_slots(), np.ascontiguousarray(slots))
    assert W.nnz == len(expected)
    assert W.density == len(expected) / (W.shape[0] * W.shape[1])
    assert W.sparsity == 1 - W.density


@given(W=strategies.matrices(sizes=(1, 8, 33)))
def test_padded(W: PaddedCSR) -> None:
    for padding in (0.0, 0.5, 2.0):
        padded = W.padded(padding)
        assert_same_matrix(padded, W)
        np.testing.assert_array_equal(np.diff(padded.indptr), W.row_nnz + np.ceil(padding * W.row_nnz))


@pytest.mark.parametrize("padding", [-0.1, np.inf, np.nan])
def test_padding_must_be_finite(padding: float) -> None:
    with pytest.raises(ValueError, match=f"padding must be a finite number of at least 0, got {padding}"):
        PaddedCSR.random((3, 4), 0.5, 0, padding=padding)


def test_copies_share_the_topology_only() -> None:
    W = PaddedCSR.random((8, 9), 0.5, 0, padding=0.5)
    copy, other = W.copy(), W.with_values(2 * W.values)
    assert_same_matrix(copy, W)
    assert copy.topology is W.topology
    assert other.topology is W.topology
    assert not np.shares_memory(copy.values, W.values)
    np.testing.assert_array_equal(other.to_dense(), 2 * W.to_dense())
    assert_same_matrix(W.astype(np.float64).astype(np.float32), W)
    with pytest.raises(ValueError, match=r"values must have shape \(\d+,\)"):
        W.with_values(W.values[:-1])
    with pytest.raises(TypeError, match="values must have dtype float32 or float64, got int64"):
        W.with_values(W.indptr)


@pytest.mark.parametrize("bad", [np.ones(3), np.ones((2, 2, 2)), 1.0])
def test_from_dense_wants_two_dimensions(bad: Any) -> None:
    with pytest.raises(ValueError, match="matrix must have 2 dimensions, got shape"):
        PaddedCSR.from_dense(bad)


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (64, 65), (0, 5), (5, 0)])
@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.9, 0.95, 0.99, 1])
def test_random_has_the_exact_count(shape: tuple[int, int], sparsity: float, dtype: type) -> None:
    W = PaddedCSR.random(shape, sparsity, 0, dtype=dtype, padding=0.5)
    W.topology.check()
    assert W.dtype == dtype
    exact = (1 - Fraction(str(sparsity))) * shape[0] * shape[1]
    assert abs(W.nnz - exact) <= Fraction(1, 2)
    assert W.nnz == n_connections(shape, sparsity)


def test_random_repeats_with_its_seed() -> None:
    first, again, other = (PaddedCSR.random((50, 60), 0.8, seed) for seed in (7, 7, 8))
    assert_same_matrix(first, again)
    assert not np.array_equal(first.positions(), other.positions())
    assert not np.array_equal(first.values, other.values)
    assert_same_matrix(PaddedCSR.random((50, 60), 0.8, np.random.default_rng(7)), first)


@pytest.mark.parametrize(("shape", "sparsity"), [((9, 7), 0.4), ((300, 129), 0.9), ((129, 300), 0.05)])
@pytest.mark.parametrize("seed", range(3))
def test_random_draws_positions_as_a_uniform_set(shape: tuple[int, int], sparsity: float, seed: int) -> None:
    """Its positions are a draw of `sample_distinct` over all of them, which test_sampling proves uniform."""
    drawn = sample_distinct(np.random.default_rng(seed), shape[0] * shape[1], n_connections(shape, sparsity))
    assert_same_bits(PaddedCSR.random(shape, sparsity, seed).positions(), drawn)


def test_a_large_random_matrix_needs_memory_for_its_connections_only() -> None:
    shape = (65_536, 65_536)
    tracemalloc.start()
    W = PaddedCSR.random(shape, 0.99999, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert W.nnz == n_connections(shape, 0.99999) == round(Fraction(1, 100_000) * 2**32)
    assert W.indices.dtype == np.uint16
    assert W.indices.max() > 65_000
    assert peak < 250 * W.nnz + 100 * 65_536, "a few arrays per connection and per row, far below 2**32"


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, np.nan, np.inf])
def test_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"sparsity must be a finite number in \[0, 1\]"):
        n_connections((2, 2), sparsity)


@pytest.mark.parametrize("sparsity", ["0.5", None, True])
def test_sparsity_of_another_type(sparsity: Any) -> None:
    with pytest.raises(TypeError, match=r"sparsity must be a number in \[0, 1\]"):
        n_connections((2, 2), sparsity)


def test_index_dtypes() -> None:
    assert index_dtype(0) == index_dtype(65_536) == np.uint16
    assert index_dtype(65_537) == index_dtype(2**31 - 1) == np.int32
    assert index_dtype(2**31) == np.int64
    assert slot_dtype(2**31 - 1) == np.int32
    assert slot_dtype(2**31) == np.int64
    for columns, dtype in ((65_536, np.uint16), (65_537, np.int32)):
        row = np.zeros((1, columns), np.float32)
        row[0, -1] = 1
        W = PaddedCSR.from_dense(row)
        assert W.indices.dtype == dtype
        assert W.indices.tolist() == [columns - 1]


GOOD: dict[str, Any] = {
    "shape": (3, 9),
    "indptr": np.array([0, 3, 4, 6]),
    "row_nnz": np.array([2, 0, 2]),
    "indices": np.array([1, 8, 65_535, 65_535, 0, 1], np.uint16),
    "values": np.full(6, np.nan, np.float32),
}
BIGGEST = np.iinfo(np.int64).max


def signed(*columns: int) -> np.ndarray[Any, Any]:
    return np.array(columns, np.int32)


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("shape", (3,), TypeError, r"shape must be two integers, got \(3,\)"),
        ("shape", (3, -1), ValueError, r"shape must be two sizes of at least 0, got \(3, -1\)"),
        ("indptr", [0, 3, 4, 6], TypeError, "indptr must be a NumPy array, got list"),
        ("indptr", np.array([0, 3, 4, 6], np.int32), TypeError, "indptr must have dtype int64, got int32"),
        ("indptr", np.array([0, 3, 6]), ValueError, r"indptr must have shape \(4,\), got \(3,\)"),
        ("indptr", np.array([[0, 3, 4, 6]]), ValueError, r"indptr must have shape \(4,\), got \(1, 4\)"),
        ("indptr", np.array([-1, 3, 4, 6]), ValueError, "indptr must start at 0 or above"),
        ("indptr", np.array([0, 5, 4, 6]), ValueError, "indptr must start at 0 or above"),
        ("indptr", np.array([0, BIGGEST, -2, 6]), ValueError, "indptr must start at 0 or above"),
        ("row_nnz", np.array([2, 0, 2], np.uint16), TypeError, "row_nnz must have dtype int64, got uint16"),
        ("row_nnz", np.array([2, 0]), ValueError, r"row_nnz must have shape \(3,\), got \(2,\)"),
        ("row_nnz", np.array([2, 0, 3]), ValueError, r"row_nnz\[2\] must be between .* 2 slots, got 3"),
        ("row_nnz", np.array([2, -1, 2]), ValueError, r"row_nnz\[1\] must be between .* 1 slots, got -1"),
        ("indices", np.zeros(6, np.uint32), TypeError, "indices must have dtype uint16 or int32 or"),
        ("indices", signed(1, 8, 0, 0, 0), ValueError, r"indices must have shape \(6,\), got \(5,\)"),
        ("indices", signed(1, 9, 0, 0, 0, 1), ValueError, r"indices must be columns of 0\.\.8, got 9"),
        ("indices", signed(-1, 8, 0, 0, 0, 1), ValueError, r"indices must be columns of 0\.\.8, got -1"),
        ("indices", signed(8, 8, 0, 0, 0, 1), ValueError, "ascending within a row, got 8 before 8 in row 0"),
        ("indices", signed(1, 8, 0, 0, 2, 1), ValueError, "ascending within a row, got 2 before 1 in row 2"),
        ("values", np.zeros(6, np.float16), TypeError, "values must have dtype float32 or float64, got f"),
        ("values", np.zeros(7, np.float32), ValueError, r"values must have shape \(6,\), got \(7,\)"),
        ("values", np.zeros((6, 1), np.float32), ValueError, r"values must have shape \(6,\), got \(6, 1\)"),
    ],
)  # fmt: skip
def test_every_invariant_is_checked(field: str, value: Any, error: type[Exception], message: str) -> None:
    PaddedCSR(**GOOD)
    with pytest.raises(error, match=message):
        PaddedCSR(**{**GOOD, field: value})


def test_a_descent_between_rows_is_no_error() -> None:
    W = PaddedCSR((3, 9), np.array([0, 2, 2, 3]), np.array([2, 0, 1]), signed(1, 8, 0), np.ones(3))
    assert W.to_dense()[[0, 0, 2], [1, 8, 0]].tolist() == [1, 1, 1]


def test_repr() -> None:
    assert repr(PaddedCSR.random((20, 30), 0.75, 0)) == (
        "PaddedCSR(shape=(20, 30), nnz=150, sparsity=0.7500, dtype=float32)"
    )


@given(rows=st.integers(0, 12), columns=st.integers(1, 12), rng=strategies.generators())
def test_a_topology_from_positions_has_them(rows: int, columns: int, rng: np.random.Generator) -> None:
    positions = np.flatnonzero(rng.random(rows * columns) < 0.4)
    topology = RowTopology.from_positions((rows, columns), positions)
    topology.check()
    assert topology.shape == (rows, columns)
    assert topology.capacity == topology.nnz
    np.testing.assert_array_equal(topology.positions(), positions)
