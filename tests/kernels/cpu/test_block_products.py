"""What the products of blocks compute, for every shape of blocks, pattern, layout and number of threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselab.kernels import (
    BlockCSR,
    PaddedCSR,
    plan_sddmm_dw,
    plan_spmm,
    plan_spmm_t,
    reference,
    rewrite,
    sddmm_dw,
    spmm,
    spmm_t,
)
from sparselab.kernels.cpu.bsr import products as _block_products
from sparselab.kernels.cpu.bsr import sddmm_dw as _block_gradient
from sparselab.kernels.cpu.bsr import skinny as _block_few_tokens
from sparselab.kernels.cpu.runtime.memory import scratch
from tests import strategies
from tests.kernels.contract import assert_same_bits, note_shares
from tests.oracle import Exact, assert_close, product
from tests.strategies import LAYOUTS, VALUE_DTYPES

Array = np.ndarray[Any, Any]

#: High, wide, square and odd ones, around the height of a strip and the width of a vector.
BLOCKS = ((1, 1), (4, 1), (1, 8), (2, 2), (4, 4), (3, 5), (6, 2), (8, 32), (16, 16), (64, 64))
SHAPES = ((1, 1), (7, 9), (64, 64), (37, 150), (150, 37), (129, 520))
TOKENS = (0, 1, 2, 4, 9, 16, 17, 64, 65, 97, 200)

#: Which blocks exist, from (rng, grid).
PATTERNS: dict[str, Callable[[np.random.Generator, tuple[int, int]], Array]] = {
    "some": lambda rng, grid: rng.random(grid) < 0.4,
    "nothing": lambda rng, grid: np.zeros(grid, np.bool_),
    "everything": lambda rng, grid: np.ones(grid, np.bool_),
    "empty and full rows": lambda rng, grid: np.broadcast_to(rng.random((grid[0], 1)) < 0.5, grid),
}


def build(
    shape: tuple[int, int], block_shape: tuple[int, int], kind: str, rng: np.random.Generator,
    dtype: Any = np.float32,
) -> BlockCSR:  # fmt: skip
    everything = BlockCSR.random(shape, 0.0, block_shape, rng, dtype=dtype)
    kept = np.flatnonzero(PATTERNS[kind](rng, everything.grid))
    return BlockCSR.from_positions(shape, block_shape, kept).with_values(everything.values[kept])


@st.composite
def matrices(draw: st.DrawFn) -> BlockCSR:
    return build(
        draw(st.sampled_from(SHAPES)), draw(st.sampled_from(BLOCKS)), draw(st.sampled_from(sorted(PATTERNS))),
        draw(strategies.generators()), draw(st.sampled_from(VALUE_DTYPES)),
    )  # fmt: skip


def dense(W: BlockCSR) -> tuple[Array, Array]:
    """W in float64, and where it is live: entry by entry, not by the package's own conversion."""
    matrix, live = np.zeros(W.shape), np.zeros(W.shape, np.bool_)
    for r in range(len(W.indptr) - 1):
        for slot in range(W.indptr[r], W.indptr[r + 1]):
            for i, j in np.ndindex(W.block_shape):
                at = r * W.block_shape[0] + i, int(W.indices[slot]) * W.block_shape[1] + j
                if at[0] < W.shape[0] and at[1] < W.shape[1]:
                    matrix[at], live[at] = W.values[slot, i, j], True
    return matrix, live


def gather(W: BlockCSR, full: Array) -> Array:
    """The blocks of a dense matrix, 0 outside."""
    blocks = np.zeros(W.values.shape)
    for r in range(len(W.indptr) - 1):
        for slot in range(W.indptr[r], W.indptr[r + 1]):
            top, left = r * W.block_shape[0], int(W.indices[slot]) * W.block_shape[1]
            part = full[top : top + W.block_shape[0], left : left + W.block_shape[1]]
            blocks[slot, : part.shape[0], : part.shape[1]] = part
    return blocks


def exact_gradient(W: BlockCSR, DY: Array, X: Array) -> Exact:
    full = product(DY, X.T)
    return Exact(gather(W, full.value), gather(W, full.magnitude), np.array(DY.shape[1]))


def draw_tokens(rng: np.random.Generator, W: BlockCSR, tokens: int, layout: str = "Fortran") -> list[Array]:
    """X and DY."""
    return [strategies.operand(rng, (n, tokens), W.dtype, layout) for n in W.shape[::-1]]


@pytest.mark.any_width
@given(
    W=matrices(),
    tokens=st.sampled_from(TOKENS),
    layout=strategies.operand_layouts(),
    rng=strategies.generators(),
)
def test_equals_the_oracle(W: BlockCSR, tokens: int, layout: str, rng: np.random.Generator) -> None:
    X, DY = draw_tokens(rng, W, tokens, layout)
    bias = rng.standard_normal(W.shape[0]).astype(W.dtype)
    before = [array.copy() for array in (X, DY, W.indptr, W.indices, W.values)]
    matrix, live = dense(W)
    assert_close(spmm(W, X, bias=bias), product(matrix, X, live=live, bias=bias), W.dtype)
    assert_close(spmm_t(W, DY), product(matrix.T, DY, live=live.T), W.dtype)
    assert_close(sddmm_dw(W, DY, X), exact_gradient(W, DY, X), W.dtype)
    for array, copy in zip((X, DY, W.indptr, W.indices, W.values), before, strict=True):
        assert_same_bits(array, copy)


@pytest.mark.any_width
@pytest.mark.parametrize("block_shape", BLOCKS)
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_few_tokens_need_no_strips(
    block_shape: tuple[int, int], dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_block_products, "multiply", None)
    rng = np.random.default_rng(7)
    W = build((37, 50), block_shape, "some", rng, dtype)
    matrix, live = dense(W)
    bias = rng.standard_normal(37).astype(dtype)
    for tokens in (*range(1, 18), 64):
        X, _ = draw_tokens(rng, W, tokens)
        scratch(1, 4096, W.dtype)[...] = np.nan
        assert_close(spmm(W, X, bias=bias), product(matrix, X, live=live, bias=bias), dtype)
    with pytest.raises(TypeError, match="not callable"):
        spmm(W, np.ones((50, 65), dtype))


@given(W=matrices(), rng=strategies.generators())
def test_equals_the_reference(W: BlockCSR, rng: np.random.Generator) -> None:
    X, DY = draw_tokens(rng, W, 5)
    matrix, live = dense(W)
    assert_close(reference.spmm(W, X), product(matrix, X, live=live), W.dtype)
    assert_close(reference.spmm_t(W, DY), product(matrix.T, DY, live=live.T), W.dtype)
    assert_close(reference.sddmm_dw(W, DY, X), exact_gradient(W, DY, X), W.dtype)


@pytest.mark.any_width
@pytest.mark.parametrize("block_shape", BLOCKS)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("tokens", [1, 2, 25, 65])
def test_writes_all_of_out_and_nothing_else(block_shape: tuple[int, int], layout: str, tokens: int) -> None:
    rng = np.random.default_rng(0)
    W = build((37, 50), block_shape, "some", rng)
    X, DY = draw_tokens(rng, W, tokens)
    for call, operand, rows in ((spmm, X, 37), (spmm_t, DY, 50)):
        base = strategies.base_array(layout, (rows, tokens), W.dtype)
        out = LAYOUTS[layout].cut(base)
        out[...] = np.nan
        written = LAYOUTS[layout].cut(inside := np.zeros_like(base, np.bool_))
        written[...] = True
        assert call(W, operand, out) is out
        np.testing.assert_array_equal(out, call(W, operand))
        np.testing.assert_array_equal(base[~inside], -77)
    out = np.full(W.values.shape, np.nan, W.dtype)
    assert sddmm_dw(W, DY, X, out) is out
    assert_same_bits(out, sddmm_dw(W, DY, X))


@pytest.mark.parametrize("block_shape", BLOCKS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("tokens", [1, 2, 4, 16, 26, 70])
def test_nan_and_infinity_reach_what_their_blocks_reach(
    block_shape: tuple[int, int], wrong: float, tokens: int
) -> None:
    rng = np.random.default_rng(1)
    W = build((37, 50), block_shape, "some", rng)
    X, DY = (np.array(operand) for operand in draw_tokens(rng, W, tokens))
    X[49, tokens // 8] = DY[36, tokens * 3 // 4] = X[0, tokens - 1] = wrong
    matrix, live = dense(W)
    assert_close(spmm(W, X), product(matrix, X, live=live), W.dtype)
    assert_close(spmm_t(W, DY), product(matrix.T, DY, live=live.T), W.dtype)
    gradient = sddmm_dw(W, DY, X)
    assert_close(gradient, exact_gradient(W, DY, X), W.dtype)
    slots, outside = W.outside()
    assert not gradient[slots][outside].any()


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
@pytest.mark.any_width
@pytest.mark.parametrize("block_shape", [(4, 1), (1, 8), (4, 4), (3, 5), (16, 16)])
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("shape", [(200, 90), (90, 900)])
def test_threads_change_no_bit(
    block_shape: tuple[int, int], dtype: type, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = note_shares(monkeypatch, _block_products, _block_gradient)
    rng = np.random.default_rng(2)
    W = build(shape, block_shape, "some", rng, dtype)
    X, DY = draw_tokens(rng, W, 250)
    bias = rng.standard_normal(shape[0]).astype(dtype)
    results = []
    for threads in (1, 2):
        numba.set_num_threads(threads)
        results.append((spmm(W, X, bias=bias), spmm_t(W, DY), sddmm_dw(W, DY, X)))
    assert shares == [1, 1, 1, 2, 2, 2]
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
@pytest.mark.any_width
@pytest.mark.parametrize("block_shape", BLOCKS)
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 64])
def test_threads_change_no_bit_of_few_tokens(
    block_shape: tuple[int, int], dtype: type, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = note_shares(monkeypatch, _block_few_tokens)
    monkeypatch.setattr(_block_few_tokens, "_MIN_PART", 1)
    rng = np.random.default_rng(8)
    W = build((200, 90), block_shape, "some", rng, dtype)
    X, _ = draw_tokens(rng, W, tokens)
    results = []
    for threads in (1, 2):
        numba.set_num_threads(threads)
        results.append(spmm(W, X))
    assert shares == [1, 2]
    assert_same_bits(*results)


@pytest.mark.any_width
@pytest.mark.parametrize("block_shape", BLOCKS)
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("tokens", [1, 30, 250])
def test_sums_of_tokens_come_along(block_shape: tuple[int, int], dtype: type, tokens: int) -> None:
    rng = np.random.default_rng(3)
    W = build((130, 70), block_shape, "some", rng, dtype)
    plan = plan_sddmm_dw(W)
    X, DY = draw_tokens(rng, W, tokens)
    R, C = (X, DY) if plan.transposed else (DY, X)
    out, sums = np.full(W.values.shape, np.nan, dtype), np.full(len(R), np.nan, dtype)
    _block_gradient.sample(plan, R, C, out.reshape(-1), sums)
    wide = R.astype(np.float64)
    assert_close(sums, Exact(wide.sum(1), np.abs(wide).sum(1), np.array(tokens)), dtype)


@pytest.mark.parametrize("block_shape", BLOCKS)
def test_a_plan_kept_from_before_gives_the_same_bits(block_shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(4)
    W = build((60, 90), block_shape, "some", rng)
    other = W.with_values(3 * W.values)
    X, DY = draw_tokens(rng, W, 70)
    for call, plan, operands in (
        (spmm, plan_spmm(W), [X]), (spmm_t, plan_spmm_t(W), [DY]), (sddmm_dw, plan_sddmm_dw(W), [DY, X])
    ):  # fmt: skip
        for matrix in (W, other):
            assert_same_bits(call(matrix, *operands, plan=plan), call(matrix, *operands))


@pytest.mark.parametrize("block_shape", BLOCKS)
def test_the_transposed_product_is_the_product_of_the_transpose(block_shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    W = build((60, 90), block_shape, "some", rng)
    _, DY = draw_tokens(rng, W, 70)
    assert_same_bits(spmm_t(W, DY), spmm(W.transpose(), DY))


def test_low_blocks_scatter_and_others_gather() -> None:
    for block_shape, strips in (((4, 1), (False, False)), ((1, 8), (True, True)), ((4, 4), (False, True))):
        W = BlockCSR.random((16, 16), 0.5, block_shape, 0)
        assert (plan_spmm(W).transposed, plan_spmm_t(W).transposed) == strips


def test_more_than_65536_columns() -> None:
    rng = np.random.default_rng(6)
    W = BlockCSR.random((8, 70_000), 0.99, (4, 4), rng)
    assert plan_spmm(W).columns.dtype == np.int32
    X, DY = draw_tokens(rng, W, 3)
    wide = W.to_dense().astype(np.float64)
    assert_close(spmm(W, X), product(wide, X, live=wide != 0), np.float32)
    assert_close(spmm_t(W, DY), product(wide.T, DY), np.float32)


def test_foreign_plans_are_refused() -> None:
    W = BlockCSR.random((16, 24), 0.5, (4, 4), 0)
    X = np.ones((24, 3), np.float32)
    other = BlockCSR.random((16, 24), 0.25, (4, 4), 0)
    with pytest.raises(
        ValueError, match=r"plan must be made for this topology .*12 of them\), got .*18 of them"
    ):
        spmm(W, X, plan=plan_spmm(other))
    unstructured = PaddedCSR.random((16, 24), 0.5, 0)
    with pytest.raises(TypeError, match="plan must be a PanelPlan, got Segments"):
        spmm(W, X, plan=plan_spmm(unstructured))
    with pytest.raises(TypeError, match="plan must be a Segments, got PanelPlan"):
        spmm(unstructured, X, plan=plan_spmm(W))


@given(W=matrices(), rng=strategies.generators())
def test_rewriting_moves_whole_blocks(W: BlockCSR, rng: np.random.Generator) -> None:
    old = W.positions()
    drop = rng.permutation(W.nnz)[: W.nnz // 3]
    free = np.setdiff1d(np.arange(W.grid[0] * W.grid[1]), old)
    grow = rng.permutation(free)[:5]
    new, source = rewrite(W, drop, grow)
    meant, meant_source = reference.rewrite(W, drop, grow)
    np.testing.assert_array_equal(new.positions(), np.union1d(np.delete(old, drop), grow))
    np.testing.assert_array_equal(source, meant_source)
    assert_same_bits(new.values, meant.values)
    for slot, origin in enumerate(source):
        expected = np.zeros(W.block_shape, W.dtype) if origin < 0 else W.values[origin]
        assert_same_bits(new.values[slot], expected)
    new.check()
