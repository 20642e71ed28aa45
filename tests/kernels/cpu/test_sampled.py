"""The gradient at connections and small blocks by the CPU's matrix unit, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparselab.kernels import BlockCSR, PaddedCSR
from sparselab.kernels.cpu.amx import sampled
from sparselab.kernels.cpu.amx.sampled import sample_connections, serves
from sparselab.kernels.cpu.runtime import matrix_unit
from tests.kernels.cpu.test_matrix_unit import from_bits, needs_unit, to_bits

SINGLE = 1, 1
SHAPES = [
    ((64, 96), SINGLE), ((300, 31), SINGLE), ((33, 600), SINGLE), ((1, 1), SINGLE), ((100, 70), (4, 4)),
    ((70, 300), (8, 8)), ((32, 260), (16, 1)), ((50, 300), (1, 128)), ((64, 64), (32, 32)),
]  # fmt: skip
TOKENS = (0, 1, 31, 100, 1100)

Array = np.ndarray[Any, Any]


class Case:
    """A topology, and where each of its slots is in the dense matrix."""

    def __init__(self, shape: tuple[int, int], block: tuple[int, int]) -> None:
        self.shape, self.block = shape, block
        if block == SINGLE:
            single = PaddedCSR.random(shape, 0.7, 0).topology
            # Room behind each row, which is not to be written to.
            self.begin = single.indptr[:-1] + 3 * np.arange(shape[0])
            self.end = self.begin + single.row_nnz
            self.rows = np.repeat(np.arange(shape[0]), single.row_nnz)
            self.slots = np.concatenate([np.arange(*ends) for ends in zip(self.begin, self.end, strict=True)])
            self.indices = np.full(int(self.end[-1]) + 3, 7, single.indices.dtype)
            self.indices[self.slots] = single.indices
        else:
            blocks = BlockCSR.random(shape, 0.7, block, 0).topology.blocks
            self.begin, self.end = blocks.indptr[:-1].copy(), blocks.indptr[1:].copy()
            self.rows, self.slots = blocks.row_of_slots(), np.arange(blocks.nnz)
            self.indices = blocks.rows.indices
        self.size = len(self.indices) * block[0] * block[1]

    def sample(self, DY: Array, X: Array) -> tuple[Array, Array]:
        out, sums = np.zeros(self.size, np.float32), np.zeros(self.shape[0], np.float32)
        sample_connections(self.shape, self.block, self.indices, self.begin, self.end, DY, X, out, sums)
        return out, sums

    def of(self, dense: Array) -> tuple[Array, Array]:
        """The entries that slots have of a dense matrix, and which of them are inside of it."""
        height, width = self.block
        padded = [-(-n // size) * size for n, size in zip(self.shape, self.block, strict=True)]
        whole = np.full(padded, np.nan)
        whole[: self.shape[0], : self.shape[1]] = dense
        found = np.zeros((len(self.indices), height, width))
        columns = self.indices[self.slots].astype(int)
        for slot, row, column in zip(self.slots, self.rows, columns, strict=True):
            inputs = slice(column * width, (column + 1) * width)
            found[slot] = whole[row * height : (row + 1) * height, inputs]
        found = found.reshape(-1)
        return found, ~np.isnan(found)


@needs_unit
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("n_tokens", TOKENS)
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_gradients_and_sums(shape: Any, block: Any, n_tokens: int, wide: bool) -> None:
    rng = np.random.default_rng(1)
    case = Case(shape, block)
    DY = to_bits(rng.standard_normal((n_tokens, shape[0] + 5)))[:, 2:-3]
    X = rng.standard_normal((n_tokens, shape[1])).astype(np.float32)
    left, right = from_bits(DY), from_bits(to_bits(X))
    out, sums = case.sample(DY, X if wide else to_bits(X))
    exact, inside = case.of(left.T @ right)
    terms, _ = case.of(np.abs(left).T @ np.abs(right))
    assert (np.abs(out - exact) <= 2**-18 * terms)[inside].all()
    assert (np.abs(sums - left.sum(0)) <= 2**-18 * np.abs(left).sum(0)).all()
    spare = np.setdiff1d(np.arange(len(case.indices)), case.slots)
    assert (out.reshape(len(case.indices), -1)[spare] == 0).all()


@needs_unit
def test_entries_are_added_to() -> None:
    case = Case((40, 50), SINGLE)
    X, DY = (to_bits(np.ones((64, n))) for n in (50, 40))
    out = np.ones(case.size, np.float32)
    sample_connections(case.shape, case.block, case.indices, case.begin, case.end, DY, X, out)
    assert (out[case.slots] == 65).all()


@needs_unit
@pytest.mark.parametrize("block", [SINGLE, (4, 4)])
def test_the_same_bits_for_any_number_of_workers(block: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    case = Case((500, 300), block)
    X, DY = (to_bits(rng.standard_normal((1500, n))) for n in (300, 500))
    results = []
    for n_workers in (1, 2, 5, 40):
        monkeypatch.setattr(sampled, "worker_count", lambda work=None, n=n_workers: n)
        results.append([each.tobytes() for each in case.sample(DY, X)])
    assert all(each == results[0] for each in results)


@needs_unit
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_with_their_connections(bad: float) -> None:
    case = Case((64, 90), SINGLE)
    X, DY = np.ones((70, 90)), np.ones((70, 64))
    X[3, 5] = DY[40, 7] = bad
    out, sums = case.sample(to_bits(DY), to_bits(X))
    columns = case.indices[case.slots]
    hit = (case.rows == 7) | (columns == 5)
    np.testing.assert_array_equal(np.isfinite(out[case.slots]), ~hit)
    np.testing.assert_array_equal(np.isfinite(sums), np.arange(64) != 7)
    np.testing.assert_array_equal(out[case.slots][hit], bad)


@needs_unit
def test_subnormal_numbers_count_as_zero() -> None:
    case = Case((40, 40), SINGLE)
    X, DY = np.full((40, 40), 0x0040, np.uint16), to_bits(np.full((40, 40), 2.0**100))
    assert from_bits(X).min() > 0
    out, _ = case.sample(DY, X)
    assert (out == 0).all()


def test_blocks_that_parts_are_made_of() -> None:
    shapes = SINGLE, (4, 4), (32, 32), (16, 1), (1, 256), (3, 4), (64, 1), (4, 12)
    assert [shape for shape in shapes if serves(shape)] == list(shapes[:5])


def test_without_a_unit_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_unit, "has_matrix_unit", lambda: False)
    case = Case((8, 8), SINGLE)
    with pytest.raises(RuntimeError, match="AMX"):
        case.sample(np.zeros((1, 8), np.uint16), np.zeros((1, 8), np.uint16))
