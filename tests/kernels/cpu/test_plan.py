"""Plans against plain loops, and where they are kept."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given

from sparselab.kernels import PaddedCSR, rewrite
from sparselab.kernels.arrays import address
from sparselab.kernels.cpu import partition as _shares
from sparselab.kernels.cpu.csr import order as _order
from sparselab.kernels.cpu.csr import plan as _plan
from sparselab.kernels.cpu.csr.order import into_order, out_of_order
from sparselab.kernels.cpu.csr.plan import Segments, gradient_plan, product_plan, transpose_plan
from sparselab.kernels.cpu.runtime.target import TARGET
from tests import strategies
from tests.kernels.contract import assert_same_bits
from tests.strategies import PATTERNS, build

Array = np.ndarray[Any, Any]
Segment = tuple[int, int, int]


@pytest.fixture(autouse=True)
def _small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_plan, _shares, _order):
        monkeypatch.setattr(module, "_MIN_PART", 4)
    monkeypatch.setattr(_order, "_MIN_RANGE", 4)
    monkeypatch.setattr(_order, "_PER_COLUMN", 0)


def slow_segments(W: PaddedCSR, block: int, chunk_rows: Array) -> list[list[list[Segment]]]:
    """``[chunk][block]`` is the list of (row, start, length), the short ones first, else by row."""
    n_blocks = max(-(-W.shape[1] // block), 1)
    found: list[list[list[Segment]]] = []
    for first, last in pairwise(chunk_rows):
        found.append([[] for _ in range(n_blocks)])
        for i in range(first, last):
            slots = range(W.indptr[i], W.indptr[i] + W.row_nnz[i])
            for b in range(n_blocks):
                inside = [slot for slot in slots if W.indices[slot] // block == b]
                if inside or b == 0:
                    start = inside[0] if inside else int(W.indptr[i])
                    found[-1][b].append((i, start, len(inside)))
        for segments in found[-1]:
            segments.sort(key=lambda segment: segment[2])
    return found


def assert_segments(W: PaddedCSR, plan: Segments) -> None:
    """Fail unless the plan is what plain loops make of W with the plan's chunks and blocks."""
    expected = slow_segments(W, plan.block_columns, plan.chunk_rows)
    assert plan.n_connections == W.nnz
    assert plan.chunk_rows[0] == 0
    assert plan.chunk_rows[-1] == W.shape[0]
    assert plan.ptr.shape == (len(expected), max(-(-W.shape[1] // plan.block_columns), 1) + 1)
    segments = list(zip(plan.row.tolist(), plan.start.tolist(), plan.length.tolist(), strict=True))
    assert segments == [segment for chunk in expected for block in chunk for segment in block]
    ends = np.cumsum([len(block) for chunk in expected for block in chunk])
    assert plan.ptr[:, 1:].reshape(-1).tolist() == ends.tolist()
    assert plan.ptr[:, 0].tolist() == [0, *plan.ptr[:-1, -1].tolist()][: len(expected)]


def plans(W: PaddedCSR, n_threads: int) -> list[Any]:
    numba.set_num_threads(min(n_threads, numba.config.NUMBA_NUM_THREADS))
    W.topology.forget()
    return [product_plan(W.topology), gradient_plan(W.topology), transpose_plan(W.topology)]


def arrays(plan: Any) -> list[Array]:
    if isinstance(plan, np.ndarray):
        return [plan]
    return [each for part in plan for each in arrays(part)] if isinstance(plan, tuple) else []


@given(W=strategies.matrices(sizes=(1, 9, 33, 300)))
def test_plans_are_those_of_plain_loops(W: PaddedCSR) -> None:
    forward, gradient, transposed = plans(W, 2)
    assert_segments(W, forward)
    assert_segments(W, gradient)
    order = np.argsort(W.indices[W.live_slots()], kind="stable")
    rows = np.repeat(np.arange(W.shape[0]), W.row_nnz)
    np.testing.assert_array_equal(transposed.indices, rows[order])
    slots = np.arange(len(W.values)).astype(np.float64)
    W_rows, places = W.topology.rows, transposed.order
    turned = into_order(address(slots), slots, W_rows, places, slots.dtype)[: W.nnz]
    np.testing.assert_array_equal(turned, W.live_slots()[order])
    back = np.full(len(W.values), -1.0)
    out_of_order(turned.copy(), W_rows, places, back)
    np.testing.assert_array_equal(back[W.live_slots()], W.live_slots())
    np.testing.assert_array_equal(np.delete(back, W.live_slots()), -1.0)
    assert_segments(W.transpose(), transposed.segments)
    for one, two in zip(plans(W, 1), (forward, gradient, transposed), strict=True):
        for first, second in zip(arrays(one), arrays(two), strict=True):
            assert_same_bits(first, second)


def test_wrong_segments_are_seen() -> None:
    W = build((40, 300), "even", np.random.default_rng(0))
    plan = product_plan(W.topology)
    assert_segments(W, plan)
    for wrong in (
        plan._replace(n_connections=plan.n_connections + 1),
        plan._replace(start=plan.start[::-1]),
        plan._replace(row=plan.row[:-1]),
        plan._replace(ptr=plan.ptr + 1),
    ):
        with pytest.raises((AssertionError, ValueError)):
            assert_segments(W, wrong)


def test_an_order_has_several_ranges() -> None:
    W = PaddedCSR.random((40, 30), 0.5, 0)
    assert len(transpose_plan(W.topology).order.first) > 4


def test_a_transpose_of_a_large_layer_costs_less_than_four_bytes_per_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    W = PaddedCSR.random((2048, 1024), 0.9, 0)
    assert sum(each.nbytes for each in arrays(transpose_plan(W.topology))) < 4 * W.nnz


@pytest.mark.parametrize("kind", sorted(PATTERNS))
def test_large_plans_do_not_depend_on_threads(kind: str) -> None:
    W = build((700, 900), kind, np.random.default_rng(0), spare=1)
    for one, two in zip(plans(W, 1), plans(W, 2), strict=True):
        for first, second in zip(arrays(one), arrays(two), strict=True):
            assert_same_bits(first, second)


def test_a_plan_belongs_to_its_topology() -> None:
    W = PaddedCSR.random((20, 30), 0.5, 0)
    plan = product_plan(W.topology)
    assert product_plan(W.with_values(2 * W.values).topology) is plan
    assert product_plan(W.copy().topology) is plan
    # As many connections dropped as grown, in the same rows: only the columns differ.
    slots = W.indptr[:-1][W.row_nnz > 0]
    rows = np.flatnonzero(W.row_nnz)
    free = [np.setdiff1d(np.arange(30), W.indices[W.indptr[i] : W.indptr[i + 1]])[-1] for i in rows]
    new = rewrite(W, slots, rows * 30 + np.array(free)).matrix
    assert (new.nnz, new.capacity) == (W.nnz, W.capacity)
    assert not new.topology.plans()
    assert product_plan(new.topology) is not plan


def test_plans_are_let_go_and_made_anew() -> None:
    W = PaddedCSR.random((20, 30), 0.5, 0)
    plan, gradient = product_plan(W.topology), gradient_plan(W.topology)
    W.topology.forget(lambda key: key == _plan.GRADIENT)
    assert list(W.topology.plans()) == [_plan.GRADIENT]
    assert gradient_plan(W.topology) is gradient
    for first, second in zip(arrays(product_plan(W.topology)), arrays(plan), strict=True):
        assert_same_bits(first, second)


@pytest.mark.parametrize(("shape", "one_group"), [((64, 8192), True), ((2048, 256), False)])
def test_a_wide_layer_packs_its_tokens_once(
    shape: tuple[int, int], one_group: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_plan, "TARGET", replace(TARGET, cache_budget_bytes=3 << 16))
    W = PaddedCSR.random(shape, 0.75, 0)
    groups = _plan.product_groups(product_plan(W.topology), 2, 1, 6)
    assert (len(groups) == 2) == one_group
    rectangles = _plan.gradient_rectangles(gradient_plan(W.topology), 2, 1, 6)
    assert (len(rectangles) == 1) == one_group
