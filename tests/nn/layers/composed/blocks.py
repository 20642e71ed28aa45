"""Feed-forward blocks to test: small ones, which way they take, and their layers one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparselab import SparseMLP
from sparselab.nn.ops.mlp.function import apply_activation

KINDS: dict[str, dict[str, Any]] = {
    "single": {}, "fan-in": {"layer": "fan-in"}, "4x4": {"layer": "block", "block_shape": (4, 4)},
    "3x5": {"layer": "block", "block_shape": (3, 3)},
}  # fmt: skip
SMALL = ["single", "4x4"]
of_every_kind = pytest.mark.parametrize("kind", KINDS)
of_two_kinds = pytest.mark.parametrize("kind", SMALL)


def make(kind: str, *sizes: int, **settings: Any) -> SparseMLP:
    return SparseMLP(*(sizes or (12, 37, 10)), **{"sparsity": 0.5, **KINDS[kind], **settings})


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def is_fused(y: Tensor) -> bool:
    """Whether the one operation is in the graph, right behind views."""
    node: Any = y.grad_fn
    while node is not None and not node.name().startswith("TwoLayers"):
        node = node.next_functions[0][0] if node.name() in ("ViewBackward0", "UnsafeViewBackward0") else None
    return node is not None


def apart(block: SparseMLP, x: Tensor) -> Tensor:
    """The layers one after the other."""
    y: Tensor = block.down(apply_activation(block.activation, block.up(x)))
    return y


def gradients(y: Tensor, dy: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, dy))
