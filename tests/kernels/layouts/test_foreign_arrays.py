"""Arrays of other dtypes, classes and byte orders: right, or refused by the argument's name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse

from sparselab.kernels import BlockCSR, PaddedCSR, rewrite
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.kernels.reference.rewrite import rewrite as plain_rewrite

INT64 = np.iinfo(np.int64)


def test_narrow_columns_of_a_wide_matrix_take_any_column() -> None:
    W = PaddedCSR(
        (2, 70_000), np.array([0, 2, 3]), np.array([2, 1]), np.array([1, 9, 4], np.uint16), np.ones(3)
    )
    assert W.indices.dtype == np.int32
    new, source = rewrite(W, np.array([0]), np.array([66_000, 70_000 + 69_999]))
    assert new.positions().tolist() == [9, 66_000, 70_004, 139_999]
    assert source.tolist() == [1, -1, 2, -1]
    topology, origin = plain_rewrite(W.topology, np.array([0]), np.array([66_000, 70_000 + 69_999]))
    assert topology.positions().tolist() == new.positions().tolist()
    assert origin.tolist() == source.tolist()
    new.topology.check()


def test_columns_are_kept_as_the_narrowest_integers() -> None:
    for dtype in (np.uint16, np.int32, np.int64):
        for columns, narrow in ((65_536, np.uint16), (65_537, np.int32)):
            index = np.array([0, 65_535, 7], dtype)
            W = PaddedCSR((1, columns), np.array([0, 3]), np.array([2]), index, np.ones(3))
            assert W.indices.dtype == narrow
            assert W.indices[:2].tolist() == [0, 65_535]


def test_a_spare_slot_may_hold_any_column() -> None:
    index = np.array([2, -1, INT64.max])
    W = PaddedCSR((1, 9), np.array([0, 3]), np.array([1]), index, np.ones(3))
    assert W.positions().tolist() == [2]


@pytest.mark.parametrize("column", [65_586, 100, -1, 2**31 - 1])
def test_scipy_columns_out_of_range(column: int) -> None:
    matrix = scipy.sparse.csr_array((2, 100))
    matrix.data, matrix.indices = np.ones(1), np.array([column], np.int32)
    matrix.indptr = np.array([0, 1, 1], np.int32)
    with pytest.raises(ValueError, match=rf"indices must be columns of 0\.\.99, got {column}"):
        PaddedCSR.from_scipy(matrix)


def test_scipy_arrays_that_are_longer_or_shorter_than_their_rows() -> None:
    matrix = scipy.sparse.csr_array(np.array([[0, 2.0], [3, 0]]))
    matrix.data, matrix.indices = np.append(matrix.data, 9), np.append(matrix.indices, 0)
    assert PaddedCSR.from_scipy(matrix).to_dense().tolist() == [[0, 2], [3, 0]]
    short = scipy.sparse.csr_array(np.array([[0, 2.0], [3, 0]]))
    short.indptr = np.array([0, 1, 7], np.int32)
    with pytest.raises(ValueError, match="index pointer"):  # SciPy's own check
        PaddedCSR.from_scipy(short)


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex_numbers(dtype: type) -> None:
    with pytest.raises(TypeError, match=f"matrix must hold real numbers, got {np.dtype(dtype)}"):
        PaddedCSR.from_scipy(scipy.sparse.csr_array(np.eye(2, dtype=dtype)))
    for build in (PaddedCSR.from_dense, lambda matrix: BlockCSR.from_dense(matrix, (2, 2))):
        with pytest.raises(TypeError, match=f"matrix must hold real numbers, got {np.dtype(dtype)}"):
            build(np.eye(2, dtype=dtype))


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (np.eye(2, dtype=object), TypeError, "matrix must hold real numbers, got object"),
        (np.array([["a", "b"]]), TypeError, "matrix must hold real numbers, got <U1"),
        (np.zeros((2, 2), "M8[s]"), TypeError, "matrix must hold real numbers, got datetime64"),
        (np.ma.masked_equal(np.eye(2), 1), TypeError, "matrix must be an array without a mask"),
        (scipy.sparse.csr_array(np.eye(2)), ValueError, "matrix must have 2 dimensions"),
        (np.zeros((2, 2), [("a", "f4")]), TypeError, "matrix must hold real numbers, got"),
    ],
)
def test_dense_matrices_of_no_numbers(matrix: Any, error: type[Exception], message: str) -> None:
    for build in (PaddedCSR.from_dense, lambda matrix: BlockCSR.from_dense(matrix, (2, 2))):
        with pytest.raises(error, match=message):
            build(matrix)


@pytest.mark.parametrize("dtype", ["?", "i1", "u8", ">i4", "f2", ">f4", "f8", ">f8", "g"])
def test_dense_matrices_of_numbers_of_any_kind(dtype: str) -> None:
    matrix = np.array([[0, 1, 1], [1, 0, 0]]).astype(dtype)
    wide = np.dtype(dtype).kind == "f" and np.dtype(dtype).itemsize == 8
    for W in (PaddedCSR.from_dense(matrix), BlockCSR.from_dense(matrix, (2, 2))):
        assert W.dtype == (np.float64 if wide else np.float32)
        assert W.to_dense().tolist() == [[0, 1, 1], [1, 0, 0]]
    for same in (matrix.view(np.matrix), matrix.tolist(), matrix[::-1, ::-1][::-1, ::-1]):
        assert PaddedCSR.from_dense(same).to_dense().tolist() == [[0, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        ([4, 0], ValueError, "positions must be strictly ascending, got 0 after 4"),
        ([0, 0], ValueError, "positions must be strictly ascending, got 0 after 0"),
        ([5, -3, 4], ValueError, "positions must be strictly ascending, got -3 after 5"),
        ([-1, 2], ValueError, r"positions must lie in 0\.\.5, got -1"),
        ([2, 6], ValueError, r"positions must lie in 0\.\.5, got 6"),
        (np.array([0, 2**63], np.uint64), ValueError, r"positions must hold numbers below 2\*\*63, got 9223"),
        ([0, 2**64], TypeError, "positions must be a 1-D integer array, got object"),
        ([True, True], TypeError, "positions must be a 1-D integer array, got bool"),
        ([0.0, 1.0], TypeError, "positions must be a 1-D integer array, got float64"),
        ([[0, 1]], TypeError, r"positions must be a 1-D integer array, got int64 of shape \(1, 2\)"),
        (np.ma.masked_equal([0, 1], 1), TypeError, "positions must be an array without a mask"),
    ],
)
def test_positions(positions: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RowTopology.from_positions((2, 3), positions)


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i4", "u8", ">i8", "i8"])
def test_positions_of_any_integers(dtype: str) -> None:
    assert RowTopology.from_positions((2, 3), np.array([1, 4], dtype)).positions().tolist() == [1, 4]
    W = PaddedCSR.from_dense(np.ones((2, 3)))
    assert rewrite(W, np.array([5, 0], dtype), np.array([0], dtype)).matrix.positions().tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]


@pytest.mark.parametrize("shape", [(16, 1 << 60), (1 << 32, 1 << 31), (1, 1 << 63)])
def test_shapes_with_more_positions_than_64_bits_number(shape: tuple[int, int]) -> None:
    for build in (
        lambda: RowTopology.from_positions(shape, [0]),
        lambda: PaddedCSR.random(shape, 1.0, 0),
        lambda: BlockCSR.from_positions(shape, (1, 1), np.array([0])),
    ):
        with pytest.raises(ValueError, match=r"shape must have fewer than 2\*\*63 positions, got"):
            build()


def test_the_last_positions_of_the_largest_shapes() -> None:
    columns = (1 << 63) // 4 - 1
    topology = RowTopology.from_positions((4, columns), [columns - 1, 4 * columns - 1])
    assert topology.indices.tolist() == [columns - 1, columns - 1]
    new, source = topology.rewrite(np.array([0]), np.array([0, 4 * columns - 2]))
    assert new.positions().tolist() == [0, 4 * columns - 2, 4 * columns - 1]
    assert source.tolist() == [-1, -1, 1]


@pytest.mark.parametrize("name", ["drop", "grow"])
@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        (np.array([0, 2**63], np.uint64), ValueError, r"{} must hold numbers below 2\*\*63"),
        (np.array([INT64.min]), ValueError, "{} must hold"),
        (np.array([INT64.max]), ValueError, "{} must hold"),
        (np.ma.masked_equal([0, 1], 1), TypeError, "{} must be an array without a mask"),
        (np.array([0], object), TypeError, "{} must be a 1-D integer array, got object"),
        (np.array(["0"]), TypeError, "{} must be a 1-D integer array, got <U1"),
    ],
)
def test_slots_and_positions_to_rewrite(
    name: str, numbers: Any, error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"drop": [], "grow": [], name: numbers}
    for W in (PaddedCSR.from_dense(np.eye(3)), BlockCSR.from_dense(np.eye(6), (2, 2))):
        with pytest.raises(error, match=message.format(name)):
            rewrite(W, **arguments)


@pytest.mark.parametrize("name", ["drop", "grow"])
def test_a_topology_wants_slots_and_positions_in_order(name: str) -> None:
    arguments = {"drop": np.empty(0, np.int64), "grow": np.empty(0, np.int64), name: np.array([5, 2])}
    with pytest.raises(ValueError, match=f"{name} must be in ascending order, got"):
        PaddedCSR.from_dense(np.eye(6)).topology.rewrite(**arguments)


@pytest.mark.parametrize("padding", [1e300, 1e18])
def test_padding_beyond_what_can_be_counted(padding: float) -> None:
    with pytest.raises(ValueError, match="padding must leave fewer than"):
        PaddedCSR.from_dense(np.eye(9), padding=padding)


@pytest.mark.parametrize("dtype", [np.float16, np.int32, np.complex64, object, ">f4"])
def test_dtypes_of_random_values(dtype: Any) -> None:
    for build in (
        lambda: PaddedCSR.random((3, 4), 0.5, 0, dtype=dtype),
        lambda: BlockCSR.random((3, 4), 0.5, (2, 2), 0, dtype=dtype),
    ):
        with pytest.raises(TypeError, match="dtype must be float32 or float64, got"):
            build()


@pytest.mark.parametrize(
    ("counts", "columns"), [([2, -1], [0]), ([1, 0], [0, 1]), ([3, 0], [0, 1]), ([INT64.max, 2], [0])]
)
def test_rows_that_do_not_hold_their_columns(counts: list[int], columns: list[int]) -> None:
    with pytest.raises(ValueError, match="counts must be lengths of rows with"):
        RowTopology.from_sorted((2, 3), np.array(counts), np.array(columns))
