"""The convolutions that every test of this folder meets: kinds, settings, and inputs that fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparselab

NAMES = [f"Conv{transposed}{n}d" for transposed in ("", "Transpose") for n in (1, 2, 3)]
KINDS = [f"{how}{name}" for how in ("Sparse", "Masked") for name in NAMES]
every_name = pytest.mark.parametrize("name", NAMES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def dims(name: str) -> int:
    return int(name[-2])


def is_transposed(name: str) -> bool:
    return "Transpose" in name


def dense_of(kind: str) -> Any:
    """The class of torch that a kind stands for."""
    return getattr(nn, kind.removeprefix("Sparse").removeprefix("Masked"))


def make(kind: str, *sizes: Any, **changes: Any) -> Any:
    """A layer of that kind, by default with other numbers in every dimension, groups and a stride."""
    torch.manual_seed(0)
    n = dims(kind)
    options: dict[str, Any] = {
        "stride": (2, 1, 2)[-n:], "padding": (1, 0, 2)[-n:], "groups": 2, "sparsity": 0.6,
        "dtype": torch.float64, **changes,
    }  # fmt: skip
    return getattr(sparselab, kind)(*(sizes or (4, 6, (3, 2, 3)[-n:])), **options)


def input_of(kind: str, dtype: torch.dtype = torch.float64, n: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, *(5, 5, 6)[-dims(kind) :], generator=generator, dtype=dtype)
