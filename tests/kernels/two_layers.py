"""Two random matrices with a nonlinearity between them: what the kernels make of them, and what they must."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from sparselab.kernels import BlockCSR, PaddedCSR
from sparselab.kernels.cpu.mlp.backward import Passed, backward
from sparselab.kernels.cpu.mlp.forward import forward
from sparselab.kernels.cpu.mlp.gradients import gradient_of
from sparselab.kernels.cpu.mlp.matrices import matrix_of, ordered_items, tile_width
from sparselab.kernels.cpu.runtime.memory import aligned_empty

Array = np.ndarray[Any, Any]
EPS = float(np.finfo(np.float32).eps)
TORCH = {
    "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu,
}  # fmt: skip
#: Puts an array into other memory.
Put = Callable[[Array], Array]


def _as_it_is(array: Array) -> Array:
    return array


def by_torch(name: str, x: Array, grad: Array, dtype: torch.dtype) -> tuple[Array, Array]:
    numbers = torch.from_numpy(x).to(dtype).requires_grad_()
    y = TORCH[name](numbers)
    (dx,) = torch.autograd.grad(y, numbers, torch.from_numpy(grad).to(dtype))
    return y.detach().numpy(), dx.numpy()


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

    def matrix(self, k: int, transposed: bool, put: Put) -> Any:
        own, values = self.matrices[k].topology, put(self.matrices[k].values.reshape(-1))
        memory = put(aligned_empty(ordered_items(own, transposed), np.dtype(np.float32)))
        return matrix_of(own, transposed, values, memory, None if transposed else put(self.biases[k]))

    def run(self, activation: str, put: Put = _as_it_is) -> dict[str, Array]:
        """The output and every gradient; all begin as NaN, where `put` puts them."""
        first, second = self.matrix(0, False, put), self.matrix(1, False, put)
        width, X, DY = tile_width(first), put(self.X), put(self.DY)
        saved = put(aligned_empty(-(-X.shape[1] // width) * width * second.columns, np.dtype(np.float32)))
        found = {"Y": put(np.full_like(DY, np.nan)), "DX": put(np.full_like(X, np.nan))}
        forward(first, second, activation, X, found["Y"], saved)
        gradients = []
        for k, W in enumerate(self.matrices):
            values = found[f"dW{k}"] = put(np.full(W.values.size, np.nan, np.float32))
            sums = found[f"db{k}"] = put(np.full(W.shape[0], np.nan, np.float32))
            memory = put(aligned_empty(ordered_items(W.topology, False), np.dtype(np.float32)))
            gradients.append(gradient_of(W.topology, values, sums, memory))
        passed = Passed(self.matrix(0, True, put), self.matrix(1, True, put), activation, saved, X, DY)
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
