"""Images in planes, and the products with shifted rows of them, against loops that say what they are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselab.kernels.cpu.conv.planes import (
    fill_planes,
    input_grid,
    output_grid,
    plane_stride,
    read_planes,
    whole_tiles,
)
from sparselab.kernels.cpu.conv.shifted import multiply_shifted, sample_shifted
from sparselab.kernels.cpu.csr.plan import plan_shifted
from tests.oracle import Exact, assert_close
from tests.oracle import product as exact_product
from tests.strategies import PATTERNS, build

DTYPES = [np.float32, np.float64]


@st.composite
def axes(draw):
    kernel, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    padding = draw(st.integers(0, 4))
    least = max(1, dilation * (kernel - 1) + 1 - 2 * padding)
    return least + draw(st.integers(0, 6)), kernel, draw(st.integers(1, 3)), padding, dilation


@settings(max_examples=60, deadline=None)
@given(axes(), axes(), st.integers(1, 3))
def test_every_window_is_found_at_a_shift(down, right, n):
    (size, kernel, stride, padding, dilation) = zip(down, right, strict=True)
    grid = input_grid(size, kernel, stride, padding, dilation)
    x = np.random.default_rng(0).standard_normal((n, 2, *size))
    planes = np.full((2 * len(grid.phases), plane_stride(n * grid.tokens + grid.tail, 8)), np.nan)
    fill_planes(x, grid, planes)
    sides = [(p, p + k * d) for p, k, d in zip(padding, kernel, dilation, strict=True)]
    padded = np.pad(x, ((0, 0), (0, 0), *sides))
    assert grid.outputs[0] * grid.outputs[1] > 0
    places = set()
    for image, row, column in itertools.product(range(n), *map(range, grid.outputs)):
        token = (image * grid.rows + row) * grid.pitch + column
        places.add(token)
        for e, (i, j) in enumerate(itertools.product(*map(range, kernel))):
            found = planes[grid.phase[e] :: len(grid.phases), token + grid.shift[e]]
            at = row * stride[0] + i * dilation[0], column * stride[1] + j * dilation[1]
            np.testing.assert_array_equal(found, padded[image, :, at[0], at[1]])
    assert len(places) == n * grid.outputs[0] * grid.outputs[1], "two outputs fell together"
    assert not np.isnan(planes).any()
    again = np.full_like(x, np.nan)
    read_planes(again, grid, planes)
    seen = ~np.isnan(again)
    np.testing.assert_array_equal(again[seen], x[seen])
    assert seen.all() == grid.is_onto(size)


@pytest.mark.any_width
@settings(max_examples=60, deadline=None)
@given(axes(), axes(), st.sampled_from([3, 8, 16]), st.sampled_from(DTYPES), st.integers(0, 2))
def test_images_in_channels_last_give_the_same_planes(down, right, n_channels, dtype, margin):
    (size, kernel, stride, padding, dilation) = zip(down, right, strict=True)
    grid = input_grid(size, kernel, stride, padding, dilation)
    last = (
        np.random.default_rng(0).standard_normal((2, *size, n_channels)).astype(dtype).transpose(0, 3, 1, 2)
    )
    tokens = plane_stride(2 * grid.tokens + grid.tail + margin, last.itemsize)
    planes, expected = (np.full((n_channels * len(grid.phases), tokens), np.nan, dtype) for _ in range(2))
    fill_planes(last, grid, planes, margin)
    fill_planes(np.ascontiguousarray(last), grid, expected, margin)
    np.testing.assert_array_equal(planes, expected)
    base = np.full((2, *size, n_channels), -77, dtype)
    first = np.full((2, n_channels, *size), -77, dtype)
    filled = np.random.default_rng(1).standard_normal(planes.shape).astype(dtype)
    read_planes(base.transpose(0, 3, 1, 2), grid, filled)
    read_planes(first, grid, filled)
    np.testing.assert_array_equal(base.transpose(0, 3, 1, 2), first)


def test_planes_begin_at_a_margin_and_are_read_into_any_strides():
    grid = output_grid(input_grid((4, 5), (3, 3), (1, 1), (1, 1), (1, 1)))
    x = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 4, 5, 3).transpose(0, 3, 1, 2)
    planes = np.full((3, plane_stride(2 * grid.tokens + 7, 4)), np.nan, np.float32)
    fill_planes(x, grid, planes, margin=7)
    assert not planes[:, :7].any()
    out = np.full((2, 3, 4, 10), -1, np.float32)
    read_planes(out[..., ::2], grid, np.ascontiguousarray(planes[:, 7:]))
    np.testing.assert_array_equal(out[..., ::2], x)
    assert (out[..., 1::2] == -1).all()


def test_planes_do_not_share_cache_sets():
    assert all(plane_stride(n, size) * size // 64 % 2 == 1 for n in (1, 16, 1000, 4096) for size in (4, 8))
    assert all(plane_stride(n, 4) >= n for n in range(200))


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", [1, 9])
def test_products_with_shifted_rows(kind, dtype, elements):
    rng = np.random.default_rng(0)
    W = build((40, 300), kind, rng, dtype=dtype)
    n_tokens = whole_tiles(100, np.dtype(dtype).itemsize)
    starts = rng.integers(0, 5000, 300)
    P = rng.standard_normal((5, (5000 + n_tokens + 4) // 5)).astype(dtype)
    X = np.array([P.reshape(-1)[start : start + n_tokens] for start in starts])
    bias = rng.standard_normal(40).astype(dtype)
    dense, live = W.to_dense(), np.zeros(W.shape, bool)
    live.reshape(-1)[W.positions()] = True
    plan = plan_shifted(W.indptr[:-1], W.row_nnz, W.indices, W.shape, elements)
    Y = np.full((40, n_tokens + 3), np.nan, dtype)
    multiply_shifted(W.values, W.indices, plan, starts, P, Y, n_tokens, bias)
    assert_close(Y[:, :n_tokens].copy(), exact_product(dense, X, live=live, bias=bias), dtype)
    assert np.isnan(Y[:, n_tokens:]).all(), "written past the tokens"

    DY = rng.standard_normal((40, n_tokens + 3)).astype(dtype)
    out = np.ones(W.capacity, dtype)
    sample_shifted(W.indices, W.indptr[:-1], W.indptr[:-1] + W.row_nnz, starts, DY, P, n_tokens, out)
    exact = exact_product(DY[:, :n_tokens], X.T)
    at = W.positions()
    value, magnitude = exact.value.reshape(-1)[at] + 1, exact.magnitude.reshape(-1)[at] + 1
    assert_close(out, Exact(value, magnitude, np.full(at.shape, n_tokens + 1)), dtype)


def test_long_rows_of_tokens_are_cut(monkeypatch):
    from sparselab.kernels.cpu.conv import shifted as _shifted

    rng = np.random.default_rng(0)
    W = build((9, 20), "even", rng)
    starts, P, DY = rng.integers(0, 50, 20), rng.standard_normal((1, 700)), rng.standard_normal((9, 640))
    results = []
    for long_tile in (1 << 20, 512):
        monkeypatch.setattr(_shifted, "_LONG_TILE_BYTES", long_tile)
        results.append(np.zeros(W.nnz))
        sample_shifted(W.indices, W.indptr[:-1], W.indptr[1:], starts, DY, P, 640, results[-1])
    np.testing.assert_allclose(*results, rtol=1e-10, atol=1e-10)
