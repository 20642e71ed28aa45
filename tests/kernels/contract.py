"""Products as rows of tables: a new product, layout or device goes through every test of products.

What a product must be is computed from `places`, where each value of a matrix is, which this file finds out
from the public arrays of each layout and not by the package's own conversions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparselab import kernels
from sparselab.kernels.layouts.topology import SparseMatrix
from tests import strategies
from tests.kernels import blocks
from tests.kernels.toy import Pairs, PairTopology
from tests.oracle import Exact, product

Array = NDArray[Any]
Shape = tuple[int, ...]
#: Indices into the values (flat), and the row and the column of each of them.
Places = tuple[Array, Array, Array]


def _places_of_rows(W: Any) -> Places:
    slots = [np.arange(begin, begin + n) for begin, n in zip(W.indptr, W.row_nnz, strict=False)]
    each = np.concatenate([*slots, np.empty(0, np.int64)])
    return each, np.repeat(np.arange(W.shape[0]), W.row_nnz), W.indices[each].astype(np.int64)


def _places_of_blocks(W: Any) -> Places:
    found = []
    for r in range(len(W.indptr) - 1):
        for slot in range(W.indptr[r], W.indptr[r + 1]):
            for i, j in np.ndindex(W.block_shape):
                row, column = r * W.block_shape[0] + i, int(W.indices[slot]) * W.block_shape[1] + j
                if row < W.shape[0] and column < W.shape[1]:
                    found.append((np.ravel_multi_index((slot, i, j), W.values.shape), row, column))
    slots, rows, columns = np.array(found, np.int64).reshape(-1, 3).T
    return slots, rows, columns


PLACES: dict[str, Callable[[Any], Places]] = {
    "csr": _places_of_rows,
    "bsr": _places_of_blocks,
    "pairs": lambda W: (np.arange(W.nnz), W.topology.row, W.topology.column),
}


def places(W: SparseMatrix) -> Places:
    """Where the values of a matrix are."""
    return PLACES[W.topology.layout](W)


def dense(W: SparseMatrix) -> tuple[Array, Array]:
    """W as a float64 matrix, and where it is live."""
    matrix, live = np.zeros(W.shape), np.zeros(W.shape, np.bool_)
    slots, rows, columns = places(W)
    matrix[rows, columns], live[rows, columns] = W.values.reshape(-1)[slots], True
    return matrix, live


def _spmm(W: SparseMatrix, X: Array) -> Exact:
    matrix, live = dense(W)
    return product(matrix, X, live=live)


def _spmm_t(W: SparseMatrix, DY: Array) -> Exact:
    matrix, live = dense(W)
    return product(matrix.T, DY, live=live.T)


def _sddmm_dw(W: SparseMatrix, DY: Array, X: Array) -> Exact:
    full = product(DY, X.T)
    slots, rows, columns = places(W)
    value, magnitude = np.zeros((2, W.values.size))
    value[slots], magnitude[slots] = full.value[rows, columns], full.magnitude[rows, columns]
    return Exact(value.reshape(W.values.shape), magnitude.reshape(W.values.shape), np.array(DY.shape[1]))


@dataclass(frozen=True)
class Operation:
    """``call(W, *operands, out, device=device)``: what it means, what goes in and what comes out."""

    call: Callable[..., Array]
    exact: Callable[..., Exact]
    #: Shape of each operand by name, and of the output, from (W, tokens).
    operands: dict[str, Callable[[SparseMatrix, int], tuple[int, int]]]
    output: Callable[[SparseMatrix, int], Shape]

    def __repr__(self) -> str:
        return self.call.__name__

    def draw(self, rng: np.random.Generator, W: SparseMatrix, tokens: int) -> list[Array]:
        """Random operands, token-major as PyTorch's batches are."""
        shapes = [shape(W, tokens) for shape in self.operands.values()]
        return [rng.standard_normal(shape[::-1]).astype(W.dtype).T for shape in shapes]


OPERATIONS = [
    Operation(
        kernels.spmm, _spmm,
        {"X": lambda W, tokens: (W.shape[1], tokens)}, lambda W, tokens: (W.shape[0], tokens),
    ),
    Operation(
        kernels.spmm_t, _spmm_t,
        {"DY": lambda W, tokens: (W.shape[0], tokens)}, lambda W, tokens: (W.shape[1], tokens),
    ),
    Operation(
        kernels.sddmm_dw, _sddmm_dw,
        {"DY": lambda W, tokens: (W.shape[0], tokens), "X": lambda W, tokens: (W.shape[1], tokens)},
        lambda W, tokens: W.values.shape,
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """The products of a layout on a device, with matrices to try them on."""

    layout: str
    device: str
    matrices: Callable[[], st.SearchStrategy[SparseMatrix]]
    #: A matrix (rows, columns) of about this density.
    example: Callable[..., Any]
    tokens: tuple[int, ...]

    def __repr__(self) -> str:
        return f"{self.layout} on {self.device}"


@st.composite
def _pairs(draw: st.DrawFn) -> Pairs:
    W = draw(strategies.matrices(sizes=(1, 7, 9, 33)))
    return Pairs.of(PairTopology(W.shape, W.positions()), W.values[W.live_slots()])


def _example_rows(shape: tuple[int, int], density: float = 0.3, dtype: type = np.float32) -> Any:
    return kernels.PaddedCSR.random(shape, 1 - density, 0, padding=0.2, dtype=dtype)


def _example_blocks(shape: tuple[int, int], density: float = 0.3, dtype: type = np.float32) -> Any:
    return kernels.BlockCSR.random(shape, 1 - density, (4, 3), 0, dtype=dtype)


def _example_pairs(shape: tuple[int, int], density: float = 0.3, dtype: type = np.float32) -> Any:
    W = kernels.PaddedCSR.random(shape, 1 - density, 0, dtype=dtype)
    return Pairs.of(PairTopology(shape, W.positions()), W.values)


_FEW = (0, 1, 7, 9)
BACKENDS = [
    Backend("csr", "cpu", strategies.matrices, _example_rows, strategies.TOKENS),
    Backend("bsr", "cpu", blocks.matrices, _example_blocks, (0, 1, 2, 4, 9, 16, 17, 64, 65, 97, 200)),
    Backend("csr", "reference", lambda: strategies.matrices(sizes=(1, 7, 9, 33)), _example_rows, _FEW),
    Backend(
        "bsr", "reference", lambda: blocks.matrices(shapes=((1, 1), (7, 9), (37, 50))), _example_blocks, _FEW
    ),
    Backend("pairs", "cpu", _pairs, _example_pairs, _FEW),
    Backend("csr", "one by one", lambda: strategies.matrices(sizes=(1, 7, 9, 33)), _example_rows, _FEW),
]

every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=repr)
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=repr)
every_product = pytest.mark.parametrize(
    ("backend", "operation"), list(itertools.product(BACKENDS, OPERATIONS)), ids=repr
)


def assert_same_bits(actual: Array, expected: Array) -> None:
    """Fail unless both arrays hold the same bits (a NaN equals itself, 0 differs from -0)."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes(), f"{np.sum(actual != expected)} entries differ"


def note_workers(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> list[int]:
    """The numbers of workers that these modules launch from now on, filled as they do."""
    workers = []
    launch = modules[0].launch

    def record(kernel: Any, n_workers: int, *args: Any) -> None:
        workers.append(n_workers)
        launch(kernel, n_workers, *args)

    for module in modules:
        monkeypatch.setattr(module, "launch", record)
    return workers
