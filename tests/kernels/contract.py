"""The three products as rows of one table; a new row puts a new product through every test of products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparselab import kernels
from sparselab.kernels import PaddedCSR, reference
from tests.oracle import Exact, product

Array = NDArray[Any]
Shape = tuple[int, ...]


def dense(W: PaddedCSR) -> tuple[Array, Array]:
    """W as a float64 matrix, and where it is live, slot by slot (not by the package's own conversion)."""
    matrix, live = np.zeros(W.shape), np.zeros(W.shape, np.bool_)
    for i, (begin, n) in enumerate(zip(W.indptr, W.row_nnz, strict=False)):
        columns = W.indices[begin : begin + n].astype(np.int64)
        matrix[i, columns] = W.values[begin : begin + n]
        live[i, columns] = True
    return matrix, live


def _spmm(W: PaddedCSR, X: Array) -> Exact:
    matrix, live = dense(W)
    return product(matrix, X, live=live)


def _spmm_t(W: PaddedCSR, DY: Array) -> Exact:
    matrix, live = dense(W)
    return product(matrix.T, DY, live=live.T)


def _sddmm_dw(W: PaddedCSR, DY: Array, X: Array) -> Exact:
    full = product(DY, X.T)
    value, magnitude = np.zeros((2, len(W.values)))
    for i, (begin, n) in enumerate(zip(W.indptr, W.row_nnz, strict=False)):
        columns = W.indices[begin : begin + n].astype(np.int64)
        value[begin : begin + n] = full.value[i, columns]
        magnitude[begin : begin + n] = full.magnitude[i, columns]
    return Exact(value, magnitude, np.array(DY.shape[1]))


@dataclass(frozen=True)
class Operation:
    """``call(W, *operands, out, plan=plan)`` with what it means, what goes in and what comes out."""

    call: Callable[..., Array]
    reference: Callable[..., Array]
    exact: Callable[..., Exact]
    plan: Callable[[PaddedCSR], Any]
    #: Shape of each operand by name, and of the output, from (W, tokens).
    operands: dict[str, Callable[[PaddedCSR, int], tuple[int, int]]]
    output: Callable[[PaddedCSR, int], Shape]

    def __repr__(self) -> str:
        return self.call.__name__

    def draw(self, rng: np.random.Generator, W: PaddedCSR, tokens: int) -> list[Array]:
        """Random operands, token-major as PyTorch's batches are."""
        shapes = [shape(W, tokens) for shape in self.operands.values()]
        return [rng.standard_normal(shape[::-1]).astype(W.dtype).T for shape in shapes]


OPERATIONS = [
    Operation(
        kernels.spmm, reference.spmm, _spmm, kernels.plan_spmm,
        {"X": lambda W, tokens: (W.shape[1], tokens)}, lambda W, tokens: (W.shape[0], tokens),
    ),
    Operation(
        kernels.spmm_t, reference.spmm_t, _spmm_t, kernels.plan_spmm_t,
        {"DY": lambda W, tokens: (W.shape[0], tokens)}, lambda W, tokens: (W.shape[1], tokens),
    ),
    Operation(
        kernels.sddmm_dw, reference.sddmm_dw, _sddmm_dw, kernels.plan_sddmm_dw,
        {"DY": lambda W, tokens: (W.shape[0], tokens), "X": lambda W, tokens: (W.shape[1], tokens)},
        lambda W, tokens: (W.capacity,),
    ),
]  # fmt: skip


def assert_same_bits(actual: Array, expected: Array) -> None:
    """Fail unless both arrays hold the same bits (a NaN equals itself, 0 differs from -0)."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes(), f"{np.sum(actual != expected)} entries differ"


def note_shares(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> list[int]:
    """The numbers of shares that these modules launch from now on, filled as they do."""
    shares = []
    launch = modules[0].launch

    def record(kernel: Any, n_workers: int, *args: Any) -> None:
        shares.append(n_workers)
        launch(kernel, n_workers, *args)

    for module in modules:
        monkeypatch.setattr(module, "launch", record)
    return shares
