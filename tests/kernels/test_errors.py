"""Every refusal names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparselab.kernels import PaddedCSR, plan_sddmm_dw, plan_spmm, plan_spmm_t, sddmm_dw, spmm
from tests.kernels.contract import OPERATIONS, Operation

every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=repr)
W = PaddedCSR.random((20, 30), 0.5, 0)
TOKENS = 4


def call(operation: Operation, **changed: Any) -> Any:
    arguments = {name: np.ones(shape(W, TOKENS), W.dtype) for name, shape in operation.operands.items()}
    return operation.call(W, **{**arguments, **changed})


@every_operation
def test_the_call_that_the_others_break_works(operation: Operation) -> None:
    assert call(operation).shape == operation.output(W, TOKENS)


@every_operation
def test_operands(operation: Operation) -> None:
    for name, shape in operation.operands.items():
        rows, _ = shape(W, TOKENS)
        good = np.ones((rows, TOKENS), np.float32)
        cases: list[tuple[Any, type[Exception], str]] = [
            (good.tolist(), TypeError, f"{name} must be a NumPy array, got list"),
            (None, TypeError, f"{name} must be a NumPy array, got NoneType"),
            (good.astype(np.float64), TypeError, f"{name} must have W's dtype float32, got float64"),
            (good.astype(">f4"), TypeError, f"{name} must have W's dtype float32, got >f4"),
            (good[:-1], ValueError, rf"{name} must have shape \({rows}, .*\), got \({rows - 1}, 4\)"),
            (good.T, ValueError, rf"{name} must have shape \({rows}, .*\), got \(4, {rows}\)"),
            (good[:, 0], ValueError, rf"{name} must have shape \({rows}, .*\), got \({rows},\)"),
            (good[None], ValueError, rf"{name} must have shape \({rows}, .*\), got \(1, {rows}, 4\)"),
        ]
        for wrong, error, message in cases:
            with pytest.raises(error, match=message):
                call(operation, **{name: wrong})


@every_operation
def test_out(operation: Operation) -> None:
    shape = operation.output(W, TOKENS)
    read_only = np.ones(shape, np.float32)
    read_only.flags.writeable = False
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
    ]
    for wrong, error, message in cases:
        with pytest.raises(error, match=message):
            call(operation, out=wrong)
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


@every_operation
@pytest.mark.parametrize("shape", [(20, 31), (21, 30), (20, 3000)])
def test_a_plan_of_another_shape(operation: Operation, shape: tuple[int, int]) -> None:
    positions = np.linspace(0, shape[0] * shape[1] - 1, W.nnz).astype(np.int64)
    dense = np.zeros(shape, np.float32)
    dense.flat[positions] = 1
    other = PaddedCSR.from_dense(dense)
    assert other.nnz == W.nnz
    with pytest.raises(ValueError, match="plan must be made for this topology"):
        call(operation, plan=operation.plan(other))


@every_operation
def test_a_plan_of_another_count(operation: Operation) -> None:
    other = PaddedCSR.random((20, 30), 0.4, 0)
    with pytest.raises(
        ValueError, match=r"20 rows.*300 connections.*got one for .*360 connections|30 rows.*got one for"
    ):
        call(operation, plan=operation.plan(other))


@pytest.mark.parametrize(
    ("operation", "plan", "message"),
    [
        (OPERATIONS[0], plan_spmm_t(W), "plan must be a Segments, got TransposePlan"),
        (OPERATIONS[1], plan_spmm(W), "plan must be a TransposePlan, got Segments"),
        (OPERATIONS[2], plan_spmm_t(W), "plan must be a Segments, got TransposePlan"),
        (OPERATIONS[2], tuple(plan_sddmm_dw(W)), "plan must be a Segments, got tuple"),
    ],
    ids=["spmm", "spmm_t", "sddmm_dw", "a tuple"],
)
def test_a_plan_of_another_kind(operation: Operation, plan: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(operation, plan=plan)
