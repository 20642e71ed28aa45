"""Which way the gradient of several processes is looked at; what they find is tested in `test_together`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sparselab.dst import Replicas
from sparselab.dst.parts.agreed import Meeting, _entries


def meeting(tokens: list[list[int]], growth: Any = "exact", plain: bool = True) -> Meeting:
    ranks: Any = SimpleNamespace(size=len(tokens), replicas=Replicas(growth=growth, candidates=2))
    return Meeting(ranks, 0, [np.array(each, np.int64) for each in tokens], plain)


@pytest.mark.parametrize(
    ("tokens", "growth", "plain", "k", "way"),
    [
        # In all tests of replicas: few tokens, many, and what is no product of two matrices.
        ([[8], [8]], "exact", True, 37, "factors"),
        ([[64], [64]], "exact", True, 37, "blocks"),
        ([[8], [8]], "exact", False, 37, "blocks"),
        # The tokens of all passes of the process that has most.
        ([[4, 4], []], "exact", True, 37, "factors"),
        ([[8], [4, 9]], "exact", True, 37, "blocks"),
        # Whatever sends least.
        ([[8], [8]], "candidates", True, 37, "factors"),
        ([[8], [8]], "candidates", False, 37, "candidates"),
        ([[64], [64]], "candidates", True, 37, "candidates"),
        ([[64], [64]], "candidates", True, 300, "blocks"),
    ],
)
def test_the_way_that_sends_least(
    tokens: list[list[int]], growth: str, plain: bool, k: int, way: str
) -> None:
    assert meeting(tokens, growth, plain).way((31, 20), 124, k, torch.float64) == way


@pytest.mark.parametrize("block_shape", [(1, 1), (3, 4), (4, 3), (7, 2)])
def test_entries_of_blocks_are_in_order(block_shape: tuple[int, int]) -> None:
    shape = 10, 9
    rows, columns = (-(-n // size) for n, size in zip(shape, block_shape, strict=True))
    positions = np.random.default_rng(0).permutation(rows * columns)[: rows * columns // 2]
    entries, inside, order = _entries(np.sort(positions), shape, block_shape)
    assert (np.diff(entries) > 0).all()
    matrix = np.arange(90.0).reshape(shape)
    blocks, found = np.zeros(inside.shape), np.empty(entries.size)
    found[order] = matrix.reshape(-1)[entries]
    blocks[inside] = found
    for position, block in zip(np.sort(positions), blocks, strict=True):
        i, j = (at * size for at, size in zip(divmod(position, columns), block_shape, strict=True))
        part = matrix[i : i + block_shape[0], j : j + block_shape[1]]
        np.testing.assert_array_equal(block[: part.shape[0], : part.shape[1]], part)
        assert block.sum() == part.sum()
