"""What must not change a bit of a result: plans made before, threads, cache sizes, the place of a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numba
import numpy as np
import pytest

from sparselab.kernels import PaddedCSR, sddmm_dw, spmm, spmm_t
from sparselab.kernels.cpu.csr import plan as _plan
from sparselab.kernels.cpu.csr import sddmm_dw as _sddmm_dw
from sparselab.kernels.cpu.csr import skinny as _skinny
from sparselab.kernels.cpu.csr import skinny_dw as _skinny_dw
from sparselab.kernels.cpu.csr import spmm as _spmm
from sparselab.kernels.cpu.runtime.target import TARGET, TILE_BYTES
from tests.kernels.contract import Operation, assert_same_bits, every_operation
from tests.oracle import Exact, assert_close
from tests.strategies import PATTERNS, VALUE_DTYPES, build

needs_two_threads = pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")


class Launches(list[tuple[int, int]]):
    """(workers, groups or rectangles) of every product launched while the test runs."""

    def record(self, kernel: Any, n_workers: int, *args: Any) -> None:
        if kernel in (_skinny._multiply_skinny, _skinny._multiply_wide, _skinny_dw._sample_skinny):
            parts = 0
        else:
            work = args[6] if kernel is _spmm._multiply_tiles else args[2]
            parts = len(work) - (kernel is _spmm._multiply_tiles)
        self.append((n_workers, parts))
        self.launch(kernel, n_workers, *args)

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launch = _spmm.launch
        for module in (_spmm, _sddmm_dw, _skinny, _skinny_dw):
            monkeypatch.setattr(module, "launch", self.record)
        monkeypatch.setattr(_skinny, "_MIN_PART", 1)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(monkeypatch)


def example(dtype: type = np.float32, kind: str = "unequal") -> PaddedCSR:
    return build((200, 300), kind, np.random.default_rng(0), dtype=dtype, spare=2)


@every_operation
@pytest.mark.parametrize("kind", sorted(PATTERNS))
def test_a_plan_made_before_gives_the_same_bits(operation: Operation, kind: str) -> None:
    rng = np.random.default_rng(1)
    W = example(kind=kind)
    other_values = W.with_values(np.where(np.isnan(W.values), W.values, 3 * W.values))
    for matrix in (W, other_values):
        operands = operation.draw(rng, matrix, 70)
        W.topology.forget()
        first = operation.call(matrix, *operands)
        plans = W.topology.plans()
        assert plans
        assert_same_bits(operation.call(matrix, *operands), first)
        assert {key: id(plan) for key, plan in W.topology.plans().items()} == {
            key: id(plan) for key, plan in plans.items()
        }


@pytest.mark.any_width
@needs_two_threads
@every_operation
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("tokens", [1, 9, 200])
def test_threads_change_no_bit(operation: Operation, dtype: type, tokens: int, launches: Launches) -> None:
    W = example(dtype)
    operands = operation.draw(np.random.default_rng(2), W, tokens)
    results = []
    for threads in (1, 2):
        numba.set_num_threads(threads)
        results.append(operation.call(W, *operands))
    assert [workers for workers, _ in launches] == [1, 2]
    assert_same_bits(*results)


@pytest.mark.any_width
@needs_two_threads
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 9, 200])
@pytest.mark.parametrize(
    ("shape", "kind"), [((200, 300), "unequal"), ((8, 300), "unequal"), ((30, 20), "nothing")]
)
def test_sums_of_tokens_are_right_and_threads_change_no_bit(
    shape: tuple[int, int], kind: str, tokens: int, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_plan, "_GRADIENT_BLOCK_COLUMNS", 64)  # of 8 rows, threads share the columns
    rng = np.random.default_rng(10)
    W = build(shape, kind, rng, dtype=dtype)
    DY, X = (rng.standard_normal((tokens, n)).astype(dtype).T for n in shape)
    plan = _plan.gradient_plan(W.topology)
    results = []
    for threads in (1, 2):
        numba.set_num_threads(threads)
        out, sums = np.full(W.capacity, np.nan, dtype), np.full(shape[0], np.nan, dtype)
        _sddmm_dw.sample(W.indices, plan, DY, X, out, sums)
        assert_same_bits(out, sddmm_dw(W, DY, X))
        results.append(sums)
    assert_same_bits(*results)
    wide = DY.astype(np.float64)
    assert_close(results[0], Exact(wide.sum(1), np.abs(wide).sum(1), np.array(tokens)), dtype)


@every_operation
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=needs_two_threads)])
def test_the_size_of_the_cache_changes_no_bit(
    operation: Operation, threads: int, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    numba.set_num_threads(threads)
    monkeypatch.setattr(_plan, "_GRADIENT_BLOCK_COLUMNS", 64)
    W = example()
    operands = operation.draw(np.random.default_rng(3), W, 150)
    results = []
    for budget in (1 << 40, 1 << 15, 1 << 12, 1):
        monkeypatch.setattr(_plan, "TARGET", replace(TARGET, cache_budget_bytes=budget))
        results.append(operation.call(W, *operands))
    parts = [part for _, part in launches]
    assert len(set(parts)) >= 3, parts
    assert max(parts) > threads
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [1, 4096, 1 << 40])
def test_groups_and_rectangles_cover_every_chunk_and_block_once(
    workers: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_plan, "TARGET", replace(TARGET, cache_budget_bytes=budget))
    monkeypatch.setattr(_plan, "_GRADIENT_BLOCK_COLUMNS", 64)
    plan = _plan.gradient_plan(example().topology)
    covered = np.zeros((plan.ptr.shape[0], plan.ptr.shape[1] - 1), np.int64)
    assert min(covered.shape) > 1
    for tiles in (1, 2, 9):
        covered[:] = 0
        for chunk0, chunk1, block0, block1 in _plan.gradient_rectangles(plan, tiles, workers, 6):
            covered[chunk0:chunk1, block0:block1] += 1
        np.testing.assert_array_equal(covered, 1)
        groups = _plan.product_groups(plan, tiles, workers, 6)
        assert groups[0] == 0
        assert groups[-1] == len(covered)
        assert np.all(np.diff(groups) > 0)


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("kind", sorted(PATTERNS))
@pytest.mark.parametrize("shape", [(1, 1), (9, 7), (200, 700)])
def test_segments_hold_every_connection_once(shape: tuple[int, int], kind: str, spare: int) -> None:
    W = build(shape, kind, np.random.default_rng(4), spare=spare)
    for plan in (_plan.product_plan(W.topology), _plan.gradient_plan(W.topology)):
        slots = [np.arange(start, start + n) for start, n in zip(plan.start, plan.length, strict=True)]
        np.testing.assert_array_equal(np.sort(np.concatenate([*slots, []])), W.live_slots())
        for c in range(plan.ptr.shape[0]):
            for b in range(plan.ptr.shape[1] - 1):
                part = slice(plan.ptr[c, b], plan.ptr[c, b + 1])
                assert np.all(np.diff(plan.length[part]) >= 0)
                assert np.all(
                    (plan.row[part] >= plan.chunk_rows[c]) & (plan.row[part] < plan.chunk_rows[c + 1])
                )
                for start, n, row in zip(plan.start[part], plan.length[part], plan.row[part], strict=True):
                    assert W.indptr[row] <= start
                    assert start + n <= W.indptr[row] + W.row_nnz[row]
                    assert np.all(W.indices[start : start + n] // plan.block_columns == b)


@pytest.mark.any_width
@every_operation
def test_several_blocks_of_columns(operation: Operation) -> None:
    rng = np.random.default_rng(5)
    W = PaddedCSR.random((3000, 3000), 0.9, rng)
    operands = operation.draw(rng, W, 70)
    result = operation.call(W, *operands)
    plan = next(plan for key, plan in W.topology.plans().items() if key != "rows")
    segments = plan if isinstance(plan, _plan.Segments) else plan.segments
    assert segments.ptr.shape[1] - 1 > 1
    assert segments.ptr.shape[0] > 1
    assert_close(result, operation.exact(W, *operands), np.float32)


@pytest.mark.any_width
@every_operation
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_the_order_of_rows_changes_no_bit(operation: Operation, dtype: type) -> None:
    rng = np.random.default_rng(6)
    matrix = np.where(rng.random((90, 130)) < rng.random((90, 1)), rng.standard_normal((90, 130)), 0).astype(
        dtype
    )
    order = rng.permutation(90)
    W, moved = PaddedCSR.from_dense(matrix), PaddedCSR.from_dense(matrix[order])
    X, DY = (rng.standard_normal((n, 70)).astype(dtype) for n in (130, 90))
    if operation.call is spmm:
        assert_same_bits(spmm(moved, X), spmm(W, X)[order])
    elif operation.call is spmm_t:
        columns = W.transpose(), moved.transpose()
        assert_same_bits(spmm_t(columns[1], X), spmm_t(columns[0], X)[order])
    else:
        full = np.zeros_like(matrix)
        full[np.nonzero(matrix)] = operation.call(W, DY, X)
        assert_same_bits(operation.call(moved, DY[order], X), full[order][np.nonzero(matrix[order])])


@every_operation
def test_the_order_of_columns_changes_rounding_only(operation: Operation) -> None:
    rng = np.random.default_rng(7)
    matrix = np.where(rng.random((40, 130)) < 0.3, rng.standard_normal((40, 130)), 0).astype(np.float32)
    order = rng.permutation(130)
    W, moved = PaddedCSR.from_dense(matrix), PaddedCSR.from_dense(matrix[:, order])
    X, DY = (rng.standard_normal((n, 70)).astype(np.float32) for n in (130, 40))
    if operation.call is spmm:
        assert_close(spmm(moved, X[order]), operation.exact(W, X), np.float32)
    elif operation.call is spmm_t:
        exact = operation.exact(W, DY)
        assert_close(
            spmm_t(moved, DY),
            Exact(exact.value[order], exact.magnitude[order], exact.terms[order]),
            np.float32,
        )
    else:
        exact = operation.exact(W, DY, X)
        back = np.zeros_like(matrix)
        back[:, order] = scatter(matrix[:, order], operation.call(moved, DY, X[order]))
        assert_close(back[np.nonzero(matrix)], exact, np.float32)


def scatter(pattern: np.ndarray[Any, Any], entries: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    full = np.zeros_like(pattern)
    full[np.nonzero(pattern)] = entries
    return full


@pytest.mark.any_width
@pytest.mark.parametrize("kind", sorted(PATTERNS))
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("tokens", [1, 70])
def test_the_transposed_product_is_the_product_of_the_transpose(kind: str, dtype: type, tokens: int) -> None:
    W = example(dtype, kind)
    DY = np.random.default_rng(8).standard_normal((200, tokens)).astype(dtype)
    assert_same_bits(spmm_t(W, DY), spmm(W.transpose(), DY))


@every_operation
def test_read_only_and_strided_matrices_give_the_same_bits(operation: Operation) -> None:
    W = example()
    operands = operation.draw(np.random.default_rng(9), W, 20)
    expected = operation.call(W, *operands)
    arrays = [np.repeat(array, 2) for array in (W.indptr, W.row_nnz, W.indices, W.values)]
    for array in arrays:
        array.flags.writeable = False
    strided = PaddedCSR(W.shape, *(array[::2] for array in arrays))
    read_only = strided.with_values(np.array(strided.values))
    read_only.values.flags.writeable = False
    for same in (strided, read_only):
        assert_same_bits(operation.call(same, *operands), expected)


def test_a_tile_row_is_a_whole_number_of_cache_lines() -> None:
    assert TILE_BYTES % 64 == 0
