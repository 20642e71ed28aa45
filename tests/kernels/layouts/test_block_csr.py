"""The layout of blocks: conversions, counts, and what `check` refuses."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from sparselab.kernels import BlockCSR
from sparselab.kernels.arrays import n_connections
from tests.kernels.blocks import BLOCKS, PATTERNS, build
from tests.kernels.contract import dense


@pytest.mark.parametrize("kind", sorted(PATTERNS))
@pytest.mark.parametrize("block_shape", BLOCKS)
def test_dense_and_back(block_shape: tuple[int, int], kind: str) -> None:
    W = build((37, 50), block_shape, kind, np.random.default_rng(0))
    matrix, _ = dense(W)
    np.testing.assert_array_equal(W.to_dense(), matrix)
    again = BlockCSR.from_dense(W.to_dense(), block_shape)
    for mine, theirs in zip(
        (W.indptr, W.indices, W.values), (again.indptr, again.indices, again.values), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(W.transpose().to_dense(), matrix.T)
    np.testing.assert_array_equal(W.to_scipy().toarray()[:37, :50], matrix)


@pytest.mark.parametrize("block_shape", BLOCKS)
def test_a_random_matrix_has_the_exact_number_of_blocks(block_shape: tuple[int, int]) -> None:
    W = BlockCSR.random((37, 50), 0.7, block_shape, 3)
    assert W.nnz == n_connections(W.grid, 0.7)
    assert W.grid == (-(-37 // block_shape[0]), -(-50 // block_shape[1]))
    np.testing.assert_array_equal(W.values, BlockCSR.random((37, 50), 0.7, block_shape, 3).values)
    W.topology.blocks.check()


def parts(**changed: Any) -> dict[str, Any]:
    good: dict[str, Any] = {
        "shape": (5, 6), "block_shape": (2, 4), "indptr": np.array([0, 1, 1, 2]),
        "indices": np.array([1, 0], np.uint16), "values": np.zeros((2, 2, 4), np.float32),
    }  # fmt: skip
    return {**good, **changed}


def test_the_parts_that_the_others_break_are_good() -> None:
    assert BlockCSR(**parts()).nnz == 2


OUTSIDE = np.zeros((2, 2, 4), np.float32)
OUTSIDE[0, 0, 2] = 1


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"shape": (-1, 6)}, ValueError, "shape must be two sizes of at least 0"),
        ({"block_shape": (0, 4)}, ValueError, "block_shape must be two integers of at least 1"),
        ({"block_shape": (2.0, 4)}, TypeError, "block_shape must be two integers, got"),
        ({"block_shape": 4}, TypeError, "block_shape must be two integers, got 4"),
        ({"indptr": np.array([0, 1, 2])}, ValueError, r"indptr must have shape \(4,\)"),
        ({"indptr": np.array([1, 1, 1, 2])}, ValueError, "indptr must start at 0 and never decrease, got"),
        ({"indptr": np.array([0, 2, 1, 2])}, ValueError, "never decrease"),
        ({"indptr": np.array([0, 2, 2, 2])}, ValueError, "indices must be strictly ascending"),
        ({"indices": np.array([2, 0], np.uint16)}, ValueError, r"columns of 0\.\.1, got 2"),
        ({"indices": np.array([1, 0], np.int16)}, TypeError, "indices must have dtype"),
        ({"values": [[1.0]]}, TypeError, "values must be a NumPy array, got list"),
        ({"values": np.zeros((2, 2, 4), np.float16)}, TypeError, "values must have dtype float32 or float64"),
        ({"values": np.zeros((2, 4, 2), np.float32)}, ValueError, r"values must have shape \(2, 2, 4\)"),
        ({"values": OUTSIDE}, ValueError, "values must be 0 where blocks reach beyond the matrix"),
        ({"values": OUTSIDE * np.nan}, ValueError, "values must be 0 where blocks reach beyond the matrix"),
    ],
)
def test_what_is_wrong_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BlockCSR(**parts(**changed))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_matrices_without_positions(shape: tuple[int, int]) -> None:
    W = BlockCSR.from_dense(np.zeros(shape), (2, 2))
    assert (W.shape, W.nnz, W.dtype) == (shape, 0, np.float64)
    assert W.to_dense().shape == shape


def test_from_dense_needs_no_copy_of_the_matrix() -> None:
    dense = np.zeros((1500, 1500), np.float32)
    dense[::100, ::100] = 1
    tracemalloc.start()
    W = BlockCSR.from_dense(dense, (4, 4))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert W.nnz == 225
    assert peak < dense.nbytes // 4, "the blocks, a flag for each position, and some rows at a time"


@pytest.mark.parametrize(
    ("positions", "blocks", "error", "message"),
    [
        ([0], np.zeros((5, 2, 2)), ValueError, r"blocks must have shape \(6, 2, 2\), got \(5, 2, 2\)"),
        ([0], np.zeros((6, 2, 2), np.int64), TypeError, "blocks must have dtype float32 or float64, got i"),
        ([3, 0], None, ValueError, "positions must be strictly ascending, got 0 after 3"),
        ([6], None, ValueError, r"positions must lie in 0\.\.5, got 6"),
        ([0.0], None, TypeError, "positions must be a 1-D integer array, got float64"),
    ],
)
def test_wrong_positions_and_blocks(
    positions: Any, blocks: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        BlockCSR.from_positions((4, 5), (2, 2), positions, blocks)


def test_which_blocks_reach_beyond_the_matrix_cannot_be_changed() -> None:
    topology = BlockCSR.random((6, 7), 0, (4, 4), 0).topology
    for part in topology.outside():
        with pytest.raises(ValueError, match="cannot set WRITEABLE"):
            part.flags.writeable = True
    assert topology.outside() is topology.outside()
