"""Bad input is refused with the argument's name, what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparselab import SparseLinear


@pytest.mark.parametrize("shape", [(), (9,), (3, 11), (2, 10, 3)])
def test_wrong_input_shape_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"input must have shape \(\.\.\., in_features=10\), got"):
        SparseLinear(10, 5)(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_wrong_input_dtype_is_named(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=f"torch.float32, got {dtype}"):
        SparseLinear(10, 5)(torch.zeros(2, 10, dtype=dtype))


def test_an_unsupported_layer_dtype_is_named() -> None:
    with pytest.raises(TypeError, match=r"values must be torch.float32 or torch.float64, got torch.bfloat16"):
        SparseLinear(10, 5).to(torch.bfloat16)(torch.zeros(2, 10, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="dtype must be"):
        SparseLinear(10, 5, dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((2.0, 3), TypeError, "in_features must be an integer, got 2.0"),
        ((2, True), TypeError, "out_features must be an integer, got True"),
        ((-1, 3), ValueError, "in_features must be at least 0, got -1"),
        ((2, 3, True, float("nan")), ValueError, "sparsity must be a finite number in"),
        ((2, 3, True, float("inf")), ValueError, "sparsity must be a finite number in"),
        ((2, 3, True, -0.1), ValueError, "got -0.1"),
        ((2, 3, True, 1.5), ValueError, "got 1.5"),
        ((2, 3, True, "0.9"), TypeError, "sparsity must be a number in"),
        ((2, 3, True, True), TypeError, "sparsity must be a number in"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SparseLinear(*arguments)
