"""Two layers with a nonlinearity between them, tile by tile: the functions, every sum, edges, threads."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from sparselab.kernels import BlockCSR, PaddedCSR
from sparselab.kernels.cpu.mlp.backward import Passed, backward
from sparselab.kernels.cpu.mlp.forward import forward
from sparselab.kernels.cpu.mlp.gradients import gradient_of
from sparselab.kernels.cpu.mlp.matrices import matrix_of, ordered_items, tile_width
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.memory import aligned_empty
from sparselab.kernels.cpu.simd.activations import ACTIVATIONS, activation, activation_and_gradient
from sparselab.kernels.cpu.simd.vectors import lanes_of, load, store, zeros_register

Array = np.ndarray[Any, Any]
EPS = float(np.finfo(np.float32).eps)
TORCH = {
    "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu,
}  # fmt: skip
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


def by_torch(name: str, x: Array, grad: Array, dtype: torch.dtype) -> tuple[Array, Array]:
    numbers = torch.from_numpy(x).to(dtype).requires_grad_()
    y = TORCH[name](numbers)
    (dx,) = torch.autograd.grad(y, numbers, torch.from_numpy(grad).to(dtype))
    return y.detach().numpy(), dx.numpy()


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


class Block:
    """Two random matrices with biases, tokens and a gradient."""

    def __init__(self, kind: tuple[int, int] | None, sizes: tuple[int, int, int], n_tokens: int) -> None:
        rng = np.random.default_rng(0)
        n_in, n_hidden, n_out = sizes
        shapes = (n_hidden, n_in), (n_out, n_hidden)
        self.matrices: list[Any] = [
            PaddedCSR.random(shape, 0.7, k) if kind is None else BlockCSR.random(shape, 0.6, kind, k)
            for k, shape in enumerate(shapes)
        ]
        self.biases = [rng.standard_normal(shape[0]).astype(np.float32) for shape in shapes]
        self.X, self.DY = (rng.standard_normal((n_tokens, n)).astype(np.float32).T for n in (n_in, n_out))

    def matrix(self, k: int, transposed: bool) -> Any:
        own, values = self.matrices[k].topology, self.matrices[k].values.reshape(-1)
        memory = aligned_empty(ordered_items(own, transposed), np.dtype(np.float32))
        return matrix_of(own, transposed, values, memory, None if transposed else self.biases[k])

    def run(self, activation: str) -> dict[str, Array]:
        """The output and every gradient; all begin as NaN."""
        first, second = self.matrix(0, False), self.matrix(1, False)
        width = tile_width(first)
        saved = aligned_empty(-(-self.X.shape[1] // width) * width * second.columns, np.dtype(np.float32))
        found = {"Y": np.full_like(self.DY, np.nan), "DX": np.full_like(self.X, np.nan)}
        forward(first, second, activation, self.X, found["Y"], saved)
        gradients = []
        for k, W in enumerate(self.matrices):
            values = found[f"dW{k}"] = np.full(W.values.size, np.nan, np.float32)
            sums = found[f"db{k}"] = np.full(W.shape[0], np.nan, np.float32)
            memory = aligned_empty(ordered_items(W.topology, False), np.dtype(np.float32))
            gradients.append(gradient_of(W.topology, values, sums, memory))
        passed = Passed(self.matrix(0, True), self.matrix(1, True), activation, saved, self.X, self.DY)
        backward(passed, found["DX"], *gradients)
        return found

    def exact(self, activation: str) -> dict[str, tuple[Array, Array]]:
        """Values in float64, and the magnitudes of what was added up."""
        W, V = (each.to_dense().astype(np.float64) for each in self.matrices)
        live = [np.where(each.to_dense() != 0, 1.0, 0.0) for each in self.matrices]
        X, DY, (b, c) = self.X.astype(np.float64), self.DY.astype(np.float64), self.biases
        H = W @ X + b[:, None]
        A, slope = by_torch(activation, H, np.ones_like(H), torch.float64)
        DA = V.T @ DY
        DH = DA * slope
        # The rounding of what is between two products is carried on by the second.
        size = np.abs(W) @ np.abs(X) + np.abs(b)[:, None]
        dh = (np.abs(V).T @ np.abs(DY)) * (1.2 + size)
        return {
            "Y": (V @ A + c[:, None], np.abs(V) @ size + np.abs(c)[:, None]),
            "DX": (W.T @ DH, np.abs(W).T @ dh),
            "dW0": ((DH @ X.T) * live[0], dh @ np.abs(X).T),
            "dW1": ((DY @ A.T) * live[1], np.abs(DY) @ size.T),
            "db0": (DH.sum(1), dh.sum(1)),
            "db1": (DY.sum(1), np.abs(DY).sum(1)),
        }

    def check(self, activation: str) -> None:
        found, terms = self.run(activation), sum(self.X.shape) + sum(self.DY.shape) + len(self.biases[0])
        for name, (value, magnitude) in self.exact(activation).items():
            got = found[name]
            if name.startswith("dW"):
                W = self.matrices[int(name[2])]
                blocks = got.reshape(W.values.shape).copy()
                if isinstance(W, BlockCSR):
                    slots, outside = W.topology.outside()
                    blocks[slots] = np.where(outside, 0, blocks[slots])
                dense = W.with_values(blocks).to_dense()
                got = np.where(W.to_dense() != 0, dense, 0)
            error = np.abs(got - value)
            assert (error <= (terms + 4) * EPS * magnitude + 1e-30).all(), (name, error.max())


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
