"""Products of dense blocks by the CPU's matrix unit, against float64 on the same bfloat16 numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparselab.kernels.cpu.amx import gradient, product
from sparselab.kernels.cpu.amx.plan import fits
from sparselab.kernels.cpu.bsr.plan import block_plan
from sparselab.kernels.cpu.runtime import matrix_unit
from sparselab.kernels.cpu.runtime.matrix_unit import has_matrix_unit
from sparselab.kernels.layouts.block_csr import BlockCSR

needs_unit = pytest.mark.skipif(
    not has_matrix_unit(), reason="this CPU has no AMX for bfloat16, or may not use it"
)
SHAPES = [
    ((64, 96), (32, 32)), ((64, 64), (16, 16)), ((70, 100), (32, 32)), ((100, 70), (16, 48)),
    ((96, 128), (48, 32)), ((1, 1), (16, 16)), ((200, 40), (64, 16)),
]  # fmt: skip
TOKENS = (1, 15, 32, 33, 100)


def to_bits(numbers: Any) -> Any:
    """The bits of bfloat16, to nearest even."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bits(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def drawn(shape: tuple[int, int], block: tuple[int, int], seed: int = 0) -> tuple[BlockCSR, Any, Any]:
    """A matrix, the bits of its blocks, and the same as float64, dense."""
    W = BlockCSR.random(shape, 0.5, block, seed)
    bits = to_bits(W.values)
    rounded = W.with_values(from_bits(bits).astype(np.float32))
    return W, bits.reshape(-1), rounded.to_dense().astype(np.float64)


@needs_unit
@pytest.mark.parametrize("n_tokens", TOKENS)
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_products(shape: Any, block: Any, n_tokens: int) -> None:
    rng = np.random.default_rng(1)
    W, values, dense = drawn(shape, block)
    bias = rng.standard_normal(shape[0]).astype(np.float32)
    for transposed in (False, True):
        M = dense.T if transposed else dense
        X = to_bits(rng.standard_normal((n_tokens, M.shape[1] + 3)))[:, :-3]
        Y = np.full((n_tokens, M.shape[0]), 0x7FC0, np.uint16)
        product.multiply_blocks(
            values, block_plan(W.topology, transposed), X, Y, None if transposed else bias
        )
        exact = from_bits(X) @ M.T + (0 if transposed else bias)
        terms = np.abs(from_bits(X)) @ np.abs(M.T) + 4
        assert (np.abs(from_bits(Y) - exact) <= 2**-8 * np.abs(exact) + 2**-20 * terms).all()


@needs_unit
@pytest.mark.parametrize("n_tokens", [0, *TOKENS, 1100])
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_gradients(shape: Any, block: Any, n_tokens: int) -> None:
    rng = np.random.default_rng(2)
    W, values, _ = drawn(shape, block)
    X, DY = (to_bits(rng.standard_normal((n_tokens, n))) for n in shape[::-1])
    out = np.full(values.size, np.nan, np.float32)
    gradient.sample_blocks(block_plan(W.topology, False), DY, X, out)
    exact, terms = from_bits(DY).T @ from_bits(X), np.abs(from_bits(DY)).T @ np.abs(from_bits(X))
    found = out.reshape(W.values.shape)
    assert not np.isnan(found).any()
    (height, width), blocks = block, W.topology.blocks
    for entries, r, c in zip(found, blocks.row_of_slots(), blocks.indices.astype(int), strict=True):
        at = slice(r * height, (r + 1) * height), slice(c * width, (c + 1) * width)
        inside = entries[: exact[at].shape[0], : exact[at].shape[1]]
        assert (np.abs(inside - exact[at]) <= 2**-18 * terms[at]).all()


@needs_unit
def test_the_same_bits_for_any_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    W, values, _ = drawn((160, 96), (32, 32))
    X, DY = (to_bits(rng.standard_normal((700, n))) for n in (96, 160))
    results = []
    for n_workers in (1, 2, 5):
        for module in (product, gradient):
            monkeypatch.setattr(module, "worker_count", lambda work=None, n=n_workers: n)
        Y, out = np.empty((700, 160), np.uint16), np.empty(values.size, np.float32)
        product.multiply_blocks(values, block_plan(W.topology, False), X, Y)
        gradient.sample_blocks(block_plan(W.topology, False), DY, X, out)
        results.append((Y.tobytes(), out.tobytes()))
    assert results[0] == results[1] == results[2]


@needs_unit
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_pass_through(bad: float) -> None:
    W, values, dense = drawn((64, 64), (16, 16))
    X = to_bits(np.ones((40, 64)))
    X[3, 5] = to_bits(np.array([bad]))[0]
    Y = np.empty((40, 64), np.uint16)
    product.multiply_blocks(values, block_plan(W.topology, False), X, Y)
    finite = np.isfinite(from_bits(Y))
    assert finite[np.arange(40) != 3].all()
    assert (finite[3] == (dense[:, 5] == 0)).all()


def test_without_a_unit_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_unit, "has_matrix_unit", lambda: False)
    W, values, _ = drawn((32, 32), (16, 16))
    X = np.zeros((1, 32), np.uint16)
    with pytest.raises(RuntimeError, match="AMX"):
        product.multiply_blocks(values, block_plan(W.topology, False), X, X.copy())
    with pytest.raises(RuntimeError, match="AMX"):
        gradient.sample_blocks(block_plan(W.topology, False), X, X, np.empty(values.size, np.float32))


def test_blocks_that_fit() -> None:
    assert [shape for shape in ((16, 16), (32, 64), (4, 4), (32, 8), (48, 16)) if fits(shape)] == [
        (16, 16), (32, 64), (48, 16),
    ]  # fmt: skip
