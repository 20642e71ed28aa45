"""Every refusal names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparselab.kernels import BlockCSR, PaddedCSR, backends, rewrite, sddmm_dw, spmm
from sparselab.kernels.layouts.topology import SparseMatrix
from tests.kernels.contract import Operation, every_operation
from tests.kernels.toy import Pairs, PairTopology

W = PaddedCSR.random((20, 30), 0.5, 0)
BLOCKS = BlockCSR.random((20, 30), 0.5, (4, 4), 0)
TOKENS = 4
every_matrix = pytest.mark.parametrize("W", [W, BLOCKS], ids=["csr", "bsr"])


def call(W: SparseMatrix, operation: Operation, **changed: Any) -> Any:
    arguments = {name: np.ones(shape(W, TOKENS), W.dtype) for name, shape in operation.operands.items()}
    return operation.call(W, **{**arguments, **changed})


@every_matrix
@every_operation
def test_the_call_that_the_others_break_works(W: SparseMatrix, operation: Operation) -> None:
    assert call(W, operation).shape == operation.output(W, TOKENS)


@every_matrix
@every_operation
def test_operands(W: SparseMatrix, operation: Operation) -> None:
    for name, shape in operation.operands.items():
        rows, _ = shape(W, TOKENS)
        good = np.ones((rows, TOKENS), np.float32)
        cases: list[tuple[Any, type[Exception], str]] = [
            (good.tolist(), TypeError, f"{name} must be a NumPy array, got list"),
            (None, TypeError, f"{name} must be a NumPy array, got NoneType"),
            (np.ma.masked_equal(good, 0), TypeError, f"{name} must be an array without a mask"),
            (good.astype(object), TypeError, f"{name} must have W's dtype float32, got object"),
            (good > 0, TypeError, f"{name} must have W's dtype float32, got bool"),
            (good.astype(np.float64), TypeError, f"{name} must have W's dtype float32, got float64"),
            (good.astype(">f4"), TypeError, f"{name} must have W's dtype float32, got >f4"),
            (good[:-1], ValueError, rf"{name} must have shape \({rows}, .*\), got \({rows - 1}, 4\)"),
            (good.T, ValueError, rf"{name} must have shape \({rows}, .*\), got \(4, {rows}\)"),
            (good[:, 0], ValueError, rf"{name} must have shape \({rows}, .*\), got \({rows},\)"),
            (good[None], ValueError, rf"{name} must have shape \({rows}, .*\), got \(1, {rows}, 4\)"),
        ]
        for wrong, error, message in cases:
            with pytest.raises(error, match=message):
                call(W, operation, **{name: wrong})


@every_matrix
@every_operation
def test_out(W: SparseMatrix, operation: Operation) -> None:
    shape = operation.output(W, TOKENS)
    read_only = np.ones(shape, np.float32)
    read_only.flags.writeable = False
    overlapping = np.lib.stride_tricks.as_strided(np.ones(100, np.float32), shape, (4,) * len(shape))
    if len(shape) == 1:
        overlapping = np.lib.stride_tricks.as_strided(np.ones(1, np.float32), shape, (0,))
    cases: list[tuple[Any, type[Exception], str]] = [
        (np.ones(shape).tolist(), TypeError, "out must be a NumPy array, got list"),
        (np.ones(shape), TypeError, "out must have W's dtype float32, got float64"),
        (np.ones((*shape, 1), np.float32), ValueError, r"out must have shape \(\d+,.*, 1\)"),
        (
            np.ones(shape, np.float32)[:-1],
            ValueError,
            rf"out must have shape \({shape[0]},.*\), got \({shape[0] - 1},",
        ),
        (read_only, ValueError, "out must be writable, got a read-only array"),
        (overlapping, ValueError, r"out must have memory of its own for each entry, got strides \("),
        (np.zeros(shape, [("a", "f4"), ("b", "f4")]), TypeError, "out must have W's dtype float32, got"),
    ]
    for wrong, error, message in cases:
        with pytest.raises(error, match=message):
            call(W, operation, out=wrong)
    assert np.all(read_only == 1)


def test_operands_that_differ_in_tokens() -> None:
    with pytest.raises(ValueError, match=r"X must have shape \(30, 4\), got \(30, 5\)"):
        sddmm_dw(W, np.ones((20, 4), np.float32), np.ones((30, 5), np.float32))


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        ([0.0] * 20, TypeError, "bias must be a NumPy array, got list"),
        (np.ones(20), TypeError, "bias must have W's dtype float32, got float64"),
        (np.ones(30, np.float32), ValueError, r"bias must have shape \(20,\), got \(30,\)"),
        (np.ones((20, 1), np.float32), ValueError, r"bias must have shape \(20,\), got \(20, 1\)"),
    ],
)
def test_bias(bias: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        spmm(W, np.ones((30, 4), np.float32), bias=bias)


@pytest.mark.parametrize("strides", [(0, 4), (4, 0), (0, 0), (-4, 4), (8, 4), (12, 4)])
def test_an_out_whose_entries_share_memory_is_refused_and_others_are_not(strides: tuple[int, int]) -> None:
    out = np.lib.stride_tricks.as_strided(np.full(100, np.nan, np.float32)[50:], (4, 3), strides)
    eye = PaddedCSR.from_dense(np.eye(4, dtype=np.float32))
    X = np.arange(12, dtype=np.float32).reshape(4, 3)
    if strides == (12, 4):
        np.testing.assert_array_equal(spmm(eye, X, out), X)
    else:
        with pytest.raises(ValueError, match="out must have memory of its own for each entry"):
            spmm(eye, X, out)


@pytest.mark.parametrize("W", [None, np.eye(3), W.topology, "W"])
def test_what_is_no_sparse_matrix(W: Any) -> None:
    for function in (lambda: spmm(W, np.ones((3, 4))), lambda: rewrite(W, [], [])):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="W must be a sparse matrix such as PaddedCSR or BlockCSR, got"):
            function()


@every_matrix
def test_values_that_changed_in_place(W: SparseMatrix) -> None:
    X = np.ones((30, 2), np.float32)
    values = W.values.copy()
    changed = W.with_values(values)
    values.dtype = np.int32  # type: ignore[misc]
    with pytest.raises(TypeError, match=r"W\.values must have dtype float32 or float64, got int32"):
        spmm(changed, X.astype(np.int32))
    values.dtype = np.float32  # type: ignore[misc]
    spmm(changed, X)
    values.resize((values.shape[0] - 1, *values.shape[1:]), refcheck=False)
    for function in (lambda: spmm(changed, X), lambda: rewrite(changed, [], [])):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"W\.values must have shape \(\d+.*\), got"):
            function()


def test_devices_without_products() -> None:
    X = np.ones((30, 2), np.float32)
    with pytest.raises(
        NotImplementedError, match=r"device must be .*'csr' \(.*cpu.*\), got 'cuda': there are no CUDA"
    ):
        spmm(W, X, device="cuda")
    with pytest.raises(NotImplementedError, match=r"device must be .*'bsr' \(cpu, reference\), got 'gpu'$"):
        spmm(BLOCKS, X, device="gpu")
    pairs = Pairs.of(PairTopology((2, 2), np.array([1])), np.ones(1))
    with pytest.raises(NotImplementedError, match=r"layout 'pairs' \(cpu\), got 'reference'"):
        spmm(pairs, np.ones((2, 1)), device="reference")


def test_registering_products() -> None:
    with pytest.raises(ValueError, match="layout and device must be new, got 'csr' on 'cpu'"):
        backends.register("csr", "cpu", backends.find(W.topology))
    with pytest.raises(TypeError, match="products must have product, product_t and gradient, got"):
        backends.register("csr", "elsewhere", object())  # type: ignore[arg-type]
    backends.register("csr", "elsewhere", backends.find(W.topology))
    try:
        assert backends.find(W.topology, "elsewhere") is backends.find(W.topology)
    finally:
        backends.unregister("csr", "elsewhere")
    with pytest.raises(NotImplementedError):
        backends.find(W.topology, "elsewhere")


def test_a_matrix_takes_topologies_of_its_own_layout() -> None:
    with pytest.raises(TypeError, match="topology must be a RowTopology, got BlockTopology"):
        PaddedCSR.of(BLOCKS.topology, BLOCKS.values)


def test_plain_arrays_come_out_of_other_kinds_of_arrays() -> None:
    X = np.arange(120, dtype=np.float32).reshape(30, 4)
    matrix, expected = X.view(np.matrix), spmm(W, X)
    assert type(spmm(W, matrix)) is np.ndarray
    np.testing.assert_array_equal(spmm(W, matrix), expected)
    out = np.zeros((20, 4), np.float32).view(np.matrix)
    assert spmm(W, matrix, out) is out
    np.testing.assert_array_equal(np.asarray(out), expected)
    with pytest.raises(TypeError, match="values must be an array without a mask"):
        W.with_values(np.ma.masked_equal(W.values, 0))
