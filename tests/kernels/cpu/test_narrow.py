"""Kernels that read weights in bfloat16 and int8, beside a dense float64 product of what they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselab.kernels import BlockCSR, PaddedCSR
from sparselab.kernels.arrays import address
from sparselab.kernels.cpu import narrow as _narrow
from sparselab.kernels.cpu.bsr import skinny as _block_skinny
from sparselab.kernels.cpu.bsr.skinny import MOST_BLOCK_TOKENS, multiply_skinny_blocks
from sparselab.kernels.cpu.csr import skinny as _skinny
from sparselab.kernels.cpu.csr.skinny import MOST_TOKENS, matrix, multiply_skinny
from sparselab.kernels.cpu.narrow import expand
from tests import strategies
from tests.kernels import blocks
from tests.kernels.contract import note_workers, places
from tests.kernels.narrow import FLOAT32, NARROW, Array, Stored, draw
from tests.oracle import Exact, assert_close, product

#: Around the tokens that one vector, two and four hold, and that are gathered one by one.
TOKENS = [n for n in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64) if n <= MOST_BLOCK_TOKENS]
every_dtype = pytest.mark.parametrize("dtype", NARROW)


def multiply(W: Any, stored: Stored, X: Array, Y: Array, bias: Array) -> None:
    """By the kernel for few tokens."""
    operands = address(bias), FLOAT32, matrix(X), matrix(Y), 2
    if isinstance(W, BlockCSR):
        rows = W.topology.blocks.rows
        multiply_skinny_blocks(stored.weights, rows.indices, rows.indptr, W.block_shape, *operands)
    else:
        rows, begin = W.topology.rows, W.topology.rows.indptr[:-1]
        multiply_skinny(stored.weights, rows.indices, begin, begin + rows.row_nnz, *operands)


def exact(W: Any, stored: Stored, X: Array, bias: Array) -> Exact:
    slots, rows, columns = places(W)
    whole = np.zeros(W.values.size)
    whole[slots] = stored.numbers(rows_of_values(W))[slots]
    dense, live = np.zeros(W.shape), np.zeros(W.shape, np.bool_)
    dense[rows, columns], live[rows, columns] = whole[slots], True
    return product(dense, X, live=live, bias=bias)


def rows_of_values(W: Any) -> Array:
    """The row of every value, flat, also of those beyond the matrix and in spare slots."""
    if isinstance(W, BlockCSR):
        block_row = np.repeat(np.arange(len(W.indptr) - 1), np.diff(W.indptr))
        rows = block_row[:, None, None] * W.block_shape[0] + np.arange(W.block_shape[0])[:, None]
        return np.broadcast_to(rows, W.values.shape).reshape(-1)
    found = np.zeros(W.values.size, np.int64)
    slots, rows, _ = places(W)
    found[slots] = rows
    return found


def check(W: Any, dtype: str, tokens: int, layout: str, rng: np.random.Generator) -> None:
    stored = draw(rng, dtype, W.values.size, W.shape[0])
    X = strategies.operand(rng, (W.shape[1], tokens), np.float32, layout)
    bias = rng.standard_normal(W.shape[0]).astype(np.float32)
    for order in "CF":
        Y: Array = np.full((W.shape[0], tokens), np.nan, np.float32, order=order)  # type: ignore[call-overload]
        multiply(W, stored, X, Y, bias)
        assert_close(Y, exact(W, stored, X, bias), np.float32)


@pytest.mark.any_width
@every_dtype
@given(
    W=strategies.matrices(index_dtypes=(np.uint16,)),
    tokens=st.sampled_from([n for n in TOKENS if n <= MOST_TOKENS]),
    layout=strategies.operand_layouts().filter(lambda layout: layout != "unaligned"),
    rng=strategies.generators(),
)
def test_few_tokens_of_single_connections(
    W: PaddedCSR, dtype: str, tokens: int, layout: str, rng: np.random.Generator
) -> None:
    check(W, dtype, tokens, layout, rng)


@pytest.mark.any_width
@every_dtype
@given(
    W=blocks.matrices(),
    tokens=st.sampled_from(TOKENS),
    layout=strategies.operand_layouts().filter(lambda layout: layout != "unaligned"),
    rng=strategies.generators(),
)
def test_few_tokens_of_blocks(
    W: BlockCSR, dtype: str, tokens: int, layout: str, rng: np.random.Generator
) -> None:
    check(W, dtype, tokens, layout, rng)


def expanded(W: Any, stored: Stored, threads: int = 1) -> Array:
    rows = W.topology.blocks.rows if isinstance(W, BlockCSR) else W.topology.rows
    out = np.full(W.values.size, np.nan, np.float32)
    shape = W.block_shape if isinstance(W, BlockCSR) else (1, 1)
    expand(stored.weights, rows.indptr[:-1], rows.indptr[1:], shape, W.shape[0], threads, out)
    return out


@pytest.mark.any_width
@every_dtype
@given(
    W=st.one_of(strategies.matrices(index_dtypes=(np.uint16,), spares=(0,)), blocks.matrices()),
    rng=strategies.generators(),
)
def test_expanded_weights_are_the_products_with_the_scales(
    W: Any, dtype: str, rng: np.random.Generator
) -> None:
    stored = draw(rng, dtype, W.values.size, W.shape[0])
    # Of a float32 and 8 bits: exact in float64, then rounded once.
    expected = stored.numbers(rows_of_values(W)).astype(np.float32)
    np.testing.assert_array_equal(expanded(W, stored), expected)
    lent = expand_lent(W, stored)
    np.testing.assert_array_equal(lent, expected)


def expand_lent(W: Any, stored: Stored) -> Array:
    rows = W.topology.blocks.rows if isinstance(W, BlockCSR) else W.topology.rows
    shape = W.block_shape if isinstance(W, BlockCSR) else (1, 1)
    return expand(stored.weights, rows.indptr[:-1], rows.indptr[1:], shape, W.shape[0], 1)[: W.values.size]


@every_dtype
@pytest.mark.parametrize("tokens", [1, 2, 9, 20])
@pytest.mark.parametrize("single", [True, False])
def test_threads_change_no_bit(
    single: bool, tokens: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    W: Any = PaddedCSR.random((90, 130), 0.7, rng) if single else BlockCSR.random((90, 130), 0.5, (4, 3), rng)
    stored, bias = draw(rng, dtype, W.values.size, 90), np.ones(90, np.float32)
    X = rng.standard_normal((130, tokens)).astype(np.float32)
    results, wide = [], []
    workers = note_workers(monkeypatch, _skinny, _block_skinny, _narrow)
    for part in (1 << 20, 1):
        for module in (_skinny, _block_skinny, _narrow):
            monkeypatch.setattr(module, "_MIN_PART", part)
        Y = np.full((90, tokens), np.nan, np.float32)
        multiply(W, stored, X, Y, bias)
        results.append(Y)
        wide.append(expanded(W, stored, 2))
    assert workers == [1, 1, 2, 2]
    np.testing.assert_array_equal(*results)
    np.testing.assert_array_equal(*wide)


@every_dtype
@pytest.mark.parametrize("single", [True, False])
def test_what_is_wrong_is_seen(single: bool, dtype: str) -> None:
    rng = np.random.default_rng(0)
    W: Any = PaddedCSR.random((9, 33), 0.5, rng) if single else BlockCSR.random((9, 33), 0.5, (4, 3), rng)
    stored, bias = draw(rng, dtype, W.values.size, 9), np.ones(9, np.float32)
    X, Y = rng.standard_normal((33, 3)).astype(np.float32), np.empty((9, 3), np.float32)
    multiply(W, stored, X, Y, bias)
    row = int(np.argmax(np.abs(exact(W, stored, X, 0 * bias).value).sum(1)))
    if stored.scales is None:
        wrong = stored._replace(values=stored.values ^ np.uint16(1 << 6))
    else:
        scales = stored.scales.copy()
        scales[row] *= np.float32(1.001)
        wrong = stored._replace(scales=scales)
    with pytest.raises(AssertionError, match="off by more than the bound"):
        assert_close(Y, exact(W, wrong, X, bias), np.float32)
    np.testing.assert_raises(
        AssertionError, np.testing.assert_array_equal, expanded(W, wrong), expanded(W, stored)
    )


@every_dtype
def test_a_nan_or_an_infinity_of_a_token_comes_out(dtype: str) -> None:
    rng = np.random.default_rng(0)
    for tokens in (1, 2, 5, 20):
        W = PaddedCSR.random((30, 40), 0.5, rng)
        stored, bias = draw(rng, dtype, W.values.size, 30), np.zeros(30, np.float32)
        X = rng.standard_normal((40, tokens)).astype(np.float32)
        X[3, tokens - 1], X[7, 0] = np.nan, np.inf
        Y = np.empty((30, tokens), np.float32)
        multiply(W, stored, X, Y, bias)
        live = np.zeros((30, 40), np.bool_)
        _, rows, columns = places(W)
        live[rows, columns] = True
        assert np.isnan(Y[live[:, 3], tokens - 1]).all()
        assert not np.isfinite(Y[live[:, 7], 0]).any()
        assert np.isfinite(Y[~live[:, 3] & ~live[:, 7]]).all()
