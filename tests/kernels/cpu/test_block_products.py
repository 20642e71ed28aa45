"""What is particular to the products of blocks: micro-panels, skinny products, edges, threads."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given

from sparselab.kernels import BlockCSR, rewrite, sddmm_dw, spmm, spmm_t
from sparselab.kernels.cpu.bsr import direct as _direct
from sparselab.kernels.cpu.bsr import direct_dw as _direct_dw
from sparselab.kernels.cpu.bsr import products as _products
from sparselab.kernels.cpu.bsr import sddmm_dw as _sddmm_dw
from sparselab.kernels.cpu.bsr import skinny as _skinny
from sparselab.kernels.cpu.bsr import spmm as _spmm
from sparselab.kernels.cpu.bsr.plan import BlockPlan, PanelPlan, block_plan, panel_plan
from sparselab.kernels.cpu.runtime.memory import scratch
from sparselab.kernels.cpu.runtime.target import TARGET
from tests import strategies
from tests.kernels.blocks import BLOCKS, build, matrices
from tests.kernels.contract import OPERATIONS, assert_same_bits, dense, note_workers
from tests.oracle import Exact, assert_close, product
from tests.strategies import LAYOUTS, VALUE_DTYPES

Array = np.ndarray[Any, Any]


def draw_tokens(rng: np.random.Generator, W: BlockCSR, tokens: int, layout: str = "Fortran") -> list[Array]:
    """X and DY."""
    return [strategies.operand(rng, (n, tokens), W.dtype, layout) for n in W.shape[::-1]]


@pytest.mark.any_width
@pytest.mark.parametrize("block_shape", BLOCKS)
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_skinny_products_need_no_plan(
    block_shape: tuple[int, int], dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_products, "multiply", None)
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
    assert_close(gradient, OPERATIONS[2].exact(W, DY, X), W.dtype)
    slots, outside = W.topology.outside()
    assert not gradient[slots][outside].any()


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
@pytest.mark.any_width
@pytest.mark.parametrize("block_shape", [(4, 1), (1, 8), (4, 4), (3, 5), (16, 16), (32, 32)])
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("shape", [(200, 90), (90, 900)])
def test_threads_change_no_bit(
    block_shape: tuple[int, int], dtype: type, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = note_workers(monkeypatch, _spmm, _sddmm_dw, _direct, _direct_dw)
    rng = np.random.default_rng(2)
    W = build(shape, block_shape, "some", rng, dtype)
    X, DY = draw_tokens(rng, W, 250)
    bias = rng.standard_normal(shape[0]).astype(dtype)
    results = []
    for threads in (1, 2):
        numba.set_num_threads(threads)
        results.append((spmm(W, X, bias=bias), spmm_t(W, DY), sddmm_dw(W, DY, X)))
    half = len(workers) // 2  # three products or, where one puts its weights in order first, more launches
    assert half >= 3
    assert workers == [1] * half + [2] * half
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
@pytest.mark.any_width
@pytest.mark.parametrize("block_shape", BLOCKS)
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 64])
def test_threads_change_no_bit_of_skinny_products(
    block_shape: tuple[int, int], dtype: type, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = note_workers(monkeypatch, _skinny)
    monkeypatch.setattr(_skinny, "_MIN_PART", 1)
    rng = np.random.default_rng(8)
    W = build((200, 90), block_shape, "some", rng, dtype)
    X, _ = draw_tokens(rng, W, tokens)
    results = []
    for threads in (1, 2):
        numba.set_num_threads(threads)
        results.append(spmm(W, X))
    assert workers == [1, 2]
    assert_same_bits(*results)


@pytest.mark.any_width
@pytest.mark.parametrize("block_shape", BLOCKS)
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("tokens", [1, 30, 250])
def test_sums_of_tokens_come_along(block_shape: tuple[int, int], dtype: type, tokens: int) -> None:
    rng = np.random.default_rng(3)
    W = build((130, 70), block_shape, "some", rng, dtype)
    X, DY = draw_tokens(rng, W, tokens)
    out, sums = np.full(W.values.shape, np.nan, dtype), np.full(len(DY), np.nan, dtype)
    _products.sample(W.topology, DY, X, out.reshape(-1), sums)
    wide = DY.astype(np.float64)
    assert_close(sums, Exact(wide.sum(1), np.abs(wide).sum(1), np.array(tokens)), dtype)


@pytest.mark.any_width
@pytest.mark.parametrize("block_shape", [(8, 32), (16, 16), (32, 16), (32, 32), (64, 64)])
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("shape", [(130, 70), (96, 128), (70, 530)])
@pytest.mark.parametrize("tokens", [9, 65, 130, 257])
def test_tokens_where_they_are_give_what_tiles_give(
    block_shape: tuple[int, int], dtype: type, shape: tuple[int, int], tokens: int
) -> None:
    rng = np.random.default_rng(10)
    W = build(shape, block_shape, "some", rng, dtype)
    blocks, values = W.topology, W.values.reshape(-1)
    X, DY = draw_tokens(rng, W, tokens)
    bias = rng.standard_normal(shape[0]).astype(dtype)
    for transposed, operand, rows in ((False, X, shape[0]), (True, DY, shape[1])):
        direct, tiles = (np.full((tokens, rows), np.nan, dtype).T for _ in range(2))
        offset = None if transposed else bias
        if _direct.serves(block_shape[int(transposed)], values.itemsize, tokens):
            plan = block_plan(blocks, transposed)
            _direct.multiply_direct(values, plan, operand, direct, offset)
            panels = panel_plan(blocks, transposed)
            _spmm.multiply(values, panels, transposed, operand, tiles, offset)
            assert_same_bits(direct, tiles)
    if _direct_dw.serves(block_shape, values.itemsize):
        out = np.full_like(values, np.nan)
        _direct_dw.sample_direct(block_plan(blocks, False), DY, X, out)
        inside = np.ones(W.values.shape, np.bool_)
        slots, outside = blocks.outside()
        inside[slots] = ~outside
        exact = OPERATIONS[2].exact(W, DY, X)
        found = np.where(inside, out.reshape(W.values.shape), 0)
        assert_close(found, exact, dtype)


def test_batches_of_wide_blocks_are_read_where_they_are() -> None:
    wide = max(TARGET.vector_bytes // 2, 8)
    served = TARGET.vector_bytes != 32
    for block_shape, by_height, by_width in (
        ((wide, wide), served, served), ((wide, 4), served, False), ((4, wide), False, served),
        ((4, 4), False, False),
    ):  # fmt: skip
        found = [_direct.serves(side, 4, 65) for side in block_shape]
        assert found == [by_height, by_width]
        assert not _direct.serves(block_shape[0], 4, 7)
    assert not any(_direct.serves(height, itemsize, 65) for height in (4, 12) for itemsize in (4, 8))
    assert _direct_dw.serves((8, TARGET.vector_bytes // 4), 4)
    assert not _direct_dw.serves((4, TARGET.vector_bytes // 4), 4)
    assert not _direct_dw.serves((8, TARGET.vector_bytes // 8), 4)


@pytest.mark.any_width
@pytest.mark.parametrize("block_shape", [(32, 32), (1, 8)])
def test_tokens_in_bfloat16_are_summed_in_float32(block_shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(11)
    W = build((96, 64), block_shape, "some", rng)
    bits = [rng.integers(0x3F00, 0x4080, (140, n)).astype(np.uint16).T for n in W.shape[::-1]]
    X, DY = ((each.astype(np.uint32) << 16).view(np.float32) for each in bits)
    out, sums = np.empty_like(W.values), np.empty(96, np.float32)
    _products.sample(W.topology, bits[1], bits[0], out.reshape(-1), sums)
    assert_close(out, OPERATIONS[2].exact(W, DY, X), np.float32)
    wide = DY.astype(np.float64)
    assert_close(sums, Exact(wide.sum(1), np.abs(wide).sum(1), np.array(140)), np.float32)


@pytest.mark.parametrize("block_shape", BLOCKS)
def test_a_plan_made_before_gives_the_same_bits(block_shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(4)
    W = build((60, 90), block_shape, "some", rng)
    X, DY = draw_tokens(rng, W, 70)
    for call, operands in ((spmm, [X]), (spmm_t, [DY]), (sddmm_dw, [DY, X])):
        for matrix in (W, W.with_values(3 * W.values)):
            W.topology.forget()
            first = call(matrix, *operands)
            assert any(isinstance(plan, (BlockPlan, PanelPlan)) for plan in W.topology.plans().values())
            assert_same_bits(call(matrix, *operands), first)


@pytest.mark.parametrize("block_shape", BLOCKS)
def test_no_plan_outlives_its_topology(block_shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(9)
    W = build((60, 90), block_shape, "some", rng)
    X, DY = draw_tokens(rng, W, 70)
    spmm(W, X), spmm_t(W, DY), sddmm_dw(W, DY, X)
    free = np.setdiff1d(np.arange(W.grid[0] * W.grid[1]), W.positions())
    n = min(3, W.nnz, len(free))
    new = rewrite(W, np.arange(n), free[:n]).matrix  # as many blocks as before
    assert new.nnz == W.nnz
    for operation, operands in zip(OPERATIONS, ([X], [DY], [DY, X]), strict=True):
        assert_close(operation.call(new, *operands), operation.exact(new, *operands), np.float32)


@pytest.mark.parametrize("block_shape", BLOCKS)
def test_the_transposed_product_is_the_product_of_the_transpose(block_shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    W = build((60, 90), block_shape, "some", rng)
    _, DY = draw_tokens(rng, W, 70)
    assert_same_bits(spmm_t(W, DY), spmm(W.transpose(), DY))


def test_low_blocks_scatter_and_others_gather() -> None:
    for block_shape, along in (((4, 1), (False, False)), ((1, 8), (True, True)), ((4, 4), (False, True))):
        topology = BlockCSR.random((16, 16), 0.5, block_shape, 0).topology
        assert tuple(panel_plan(topology, transposed).transposed for transposed in (False, True)) == along


def test_a_plan_names_blocks_by_the_narrowest_integers() -> None:
    for block_shape in ((1, 8), (4, 4)):
        plan = panel_plan(BlockCSR.random((16, 64), 0.5, block_shape, 0).topology, True)
        assert plan.transposed
        assert (plan.slots.dtype, plan.columns.dtype) == (np.uint16, np.uint16)
    many = panel_plan(BlockCSR.random((300, 300), 0.1, (1, 1), 0).topology, True)
    assert many.slots.dtype == np.int32


def test_more_than_65536_columns() -> None:
    rng = np.random.default_rng(6)
    W = BlockCSR.random((8, 70_000), 0.99, (4, 4), rng)
    assert panel_plan(W.topology, False).columns.dtype == np.int32
    X, DY = draw_tokens(rng, W, 3)
    wide = W.to_dense().astype(np.float64)
    assert_close(spmm(W, X), product(wide, X, live=wide != 0), np.float32)
    assert_close(spmm_t(W, DY), product(wide.T, DY), np.float32)


def test_numbers_where_blocks_reach_beyond_the_matrix_are_refused_in_every_product() -> None:
    W = BlockCSR.random((6, 7), 0, (4, 4), 0)
    X, DY = np.ones((7, 2), np.float32), np.ones((6, 2), np.float32)
    values = W.values.copy()
    changed = W.with_values(values)
    values[-1, -1, -1] = np.nan
    for function in (
        lambda: spmm(changed, X),
        lambda: spmm_t(changed, DY),
        lambda: W.with_values(values),
        lambda: changed.copy(),
        lambda: rewrite(changed, [], []),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="values must be 0 where blocks reach beyond the matrix, got"):
            function()


@given(W=matrices(), rng=strategies.generators())
def test_rewriting_moves_whole_blocks(W: BlockCSR, rng: np.random.Generator) -> None:
    old = W.positions()
    drop = rng.permutation(W.nnz)[: W.nnz // 3]
    free = np.setdiff1d(np.arange(W.grid[0] * W.grid[1]), old)
    grow = rng.permutation(free)[:5]
    new, source = rewrite(W, drop, grow)
    np.testing.assert_array_equal(new.positions(), np.union1d(np.delete(old, drop), grow))
    for slot, origin in enumerate(source):
        expected = np.zeros(W.block_shape, W.dtype) if origin < 0 else W.values[origin]
        assert_same_bits(new.values[slot], expected)
    new.topology.blocks.check()
    assert new.topology.blocks.capacity == new.nnz
