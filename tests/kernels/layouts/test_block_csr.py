"""The layout of blocks: conversions, counts, and what `check` refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparselab.kernels import BlockCSR
from sparselab.kernels.arrays import n_connections
from tests.kernels.cpu.test_block_products import BLOCKS, PATTERNS, build, dense


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
    W.check()


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
        ({"shape": (-1, 6)}, ValueError, "shape must be two sizes >= 0"),
        ({"block_shape": (0, 4)}, ValueError, "block_shape must be two integers of at least 1"),
        ({"block_shape": (2.0, 4)}, TypeError, "block_shape must be two integers, got"),
        ({"block_shape": 4}, TypeError, "block_shape must be two integers, got 4"),
        ({"indptr": np.array([0, 1, 2])}, ValueError, r"indptr must have shape \(4,\)"),
        ({"indptr": np.array([1, 1, 1, 2])}, ValueError, "indptr must start at 0, got 1"),
        ({"indptr": np.array([0, 2, 1, 2])}, ValueError, "never decrease"),
        ({"indptr": np.array([0, 2, 2, 2])}, ValueError, "indices must be strictly ascending"),
        ({"indices": np.array([2, 0], np.uint16)}, ValueError, r"columns of 0\.\.1, got 2"),
        ({"indices": np.array([1, 0], np.int16)}, TypeError, "indices must have dtype"),
        ({"values": [[1.0]]}, TypeError, "values must be a NumPy array, got list"),
        ({"values": np.zeros((2, 2, 4), np.float16)}, TypeError, "values must have dtype float32 or float64"),
        ({"values": np.zeros((2, 4, 2), np.float32)}, ValueError, r"values must have shape \(2, 2, 4\)"),
        ({"values": OUTSIDE}, ValueError, "values must be 0 outside the matrix"),
        ({"values": OUTSIDE * np.nan}, ValueError, "values must be 0 outside the matrix"),
    ],
)
def test_what_is_wrong_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BlockCSR(**parts(**changed))
