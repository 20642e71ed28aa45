"""Two layers with a nonlinearity between them, tile by tile: the functions, every sum, edges, threads."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.memory import aligned_empty
from sparselab.kernels.cpu.simd.activations import ACTIVATIONS, activation, activation_and_gradient
from sparselab.kernels.cpu.simd.vectors import lanes_of, load, store, zeros_register
from tests.kernels.two_layers import EPS, Array, Block, by_torch

KINDS = [None, (4, 4), (3, 3), (5, 5), (8, 4), (2, 2)]


@jit
def _apply(kind, x, grad, values, again, products):  # type: ignore[no-untyped-def]
    like = zeros_register(x)
    for k in range(0, len(x), lanes_of(like)):
        vector = load(x, k, like)
        store(again, k, activation(kind, vector))
        value, product = activation_and_gradient(kind, vector, load(grad, k, like))
        store(values, k, value)
        store(products, k, product)


def aligned(numbers: Array) -> Array:
    new = aligned_empty(-(-len(numbers) // 16) * 16, np.dtype(np.float32))
    new[:] = 0
    new[: len(numbers)] = numbers
    return new


def applied(name: str, x: Array, grad: Array) -> tuple[Array, Array]:
    """The function and its derivative times a gradient."""
    values, again, products = (aligned(np.zeros(len(x), np.float32)) for _ in range(3))
    _apply(ACTIVATIONS.index(name), aligned(x), aligned(grad), values, again, products)
    np.testing.assert_array_equal(values, again)
    return values[: len(x)], products[: len(x)]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_functions_are_within_a_few_roundings(name: str) -> None:
    """The value within 3 eps of x, the derivative within 2 eps of 1, as stated."""
    x = np.concatenate([np.linspace(-15, 15, 400_001), np.logspace(-30, 3, 999), -np.logspace(-30, 3, 999)])
    x = x.astype(np.float32)
    value, slope = applied(name, x, np.ones_like(x))
    exact, derivative = by_torch(name, x, np.ones_like(x), torch.float64)
    assert (np.abs(value - exact) <= 3 * EPS * np.abs(x) + np.finfo(np.float32).tiny).all()
    assert (np.abs(slope - derivative) <= 2 * EPS).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_and_infinity_pass(name: str) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 1e38, -1e38, 0.0, 2.0, -2.0, 2.0, -2.0], np.float32)
    grad = np.array([1, 1, 1, 1, 1, np.nan, np.nan, np.nan, np.inf, np.inf], np.float32)
    value, product = applied(name, x, grad)
    exact, derivative = by_torch(name, x, grad, torch.float32)
    if name == "gelu":
        exact[1] = np.inf  # torch's vectors say NaN, its numbers one by one infinity
    np.testing.assert_array_equal(np.isnan(value), np.isnan(exact))
    np.testing.assert_array_equal(np.isnan(product), np.isnan(derivative))
    np.testing.assert_array_equal(np.isinf(value), np.isinf(exact))
    np.testing.assert_array_equal(np.isinf(product), np.isinf(derivative))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_tokens", [1, 63, 64, 65, 200])
def test_every_sum(kind: Any, activation: str, n_tokens: int) -> None:
    Block(kind, (9, 37, 14), n_tokens).check(activation)


@given(
    kind=st.sampled_from(KINDS), sizes=st.tuples(*[st.integers(1, 70)] * 3), n_tokens=st.integers(1, 450),
    activation=st.sampled_from(ACTIVATIONS),
)  # fmt: skip
def test_any_sizes(kind: Any, sizes: tuple[int, int, int], n_tokens: int, activation: str) -> None:
    Block(kind, sizes, n_tokens).check(activation)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_on_any_number_of_threads(kind: Any) -> None:
    """Also where tokens go in several parts, of which the number of threads says how large they are."""
    block, threads = Block(kind, (20, 90, 30), 2500), numba.get_num_threads()
    try:
        found = []
        for n in (1, threads):
            numba.set_num_threads(n)
            found.append(block.run("gelu"))
    finally:
        numba.set_num_threads(threads)
    for name, one in found[0].items():
        np.testing.assert_array_equal(one, found[1][name], name)


@pytest.mark.parametrize("kind", [None, (4, 4)])
def test_missing_tokens_are_not_read(kind: Any) -> None:
    """Weights that are infinite make NaN of zeros; those must stay where there are no tokens."""
    block = Block(kind, (9, 37, 14), 65)
    block.biases[0][:] = np.inf
    block.matrices[1].values[:] = 1e30
    found = block.run("relu")
    assert np.isfinite(found["db1"]).all()
    block = Block(kind, (9, 37, 14), 65)
    block.matrices[1].values.reshape(-1)[0] = np.inf
    block.DY[:] = 1.0
    assert not np.isnan(block.run("relu")["db0"]).any()
