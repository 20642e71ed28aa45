"""The layers whose weight is tested, and what their dense weight says of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparselab import BlockSparseLinear, FanInLinear, SparseConv2d, SparseLinear

DOUBLE = torch.float64
LINEAR: dict[str, Callable[[], Any]] = {
    "single": lambda: SparseLinear(20, 12, sparsity=0.6, dtype=DOUBLE),
    "below break-even": lambda: SparseLinear(20, 12, sparsity=0.2, dtype=DOUBLE),
    "fan-in": lambda: FanInLinear(20, 12, fan_in=5, dtype=DOUBLE),
    "blocks": lambda: BlockSparseLinear(20, 12, sparsity=0.5, block_shape=(4, 2), dtype=DOUBLE),
    "blocks beyond": lambda: BlockSparseLinear(20, 12, sparsity=0.3, block_shape=(5, 8), dtype=DOUBLE),
}
CONVOLUTIONS: dict[str, Callable[[], Any]] = {
    "convolution": lambda: SparseConv2d(4, 6, 3, sparsity=0.5, dtype=DOUBLE),
    "groups": lambda: SparseConv2d(4, 6, (3, 2), padding=1, groups=2, fan_in=5, dtype=DOUBLE),
}
KINDS = {**LINEAR, **CONVOLUTIONS}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_linear_kind = pytest.mark.parametrize("kind", LINEAR)
every_convolution = pytest.mark.parametrize("kind", CONVOLUTIONS)


def make(kind: str) -> Any:
    torch.manual_seed(len(kind))
    return KINDS[kind]()


def operand(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=DOUBLE).requires_grad_()


def input_of(layer: Any) -> Tensor:
    return operand(2, layer.in_channels, 6, 7) if hasattr(layer, "groups") else operand(3, layer.in_features)


def spread(layer: Any, entries: Tensor) -> Tensor:
    """Entries laid out as the Parameter, in the shape of the dense weight; position by position."""
    rows, columns = layer.shape
    dense = entries.new_zeros(layer.shape)
    height, width = layer.block_shape
    for position, block in zip(layer.positions().tolist(), entries.detach(), strict=True):
        row, column = divmod(position, layer.grid[1])
        top, left = row * height, column * width
        bottom, right = min(top + height, rows), min(left + width, columns)
        dense[top:bottom, left:right] = block[: bottom - top, : right - left]
    return dense.view(layer.weight_shape)


def assert_as_dense(layer: Any, compute: Callable[[Any, Tensor, Tensor], Tensor], x: Tensor) -> None:
    """Compare what is computed of (weight, x, bias) with the dense weight: output and every gradient."""
    W = spread(layer, layer.weight_values).requires_grad_()
    b = layer.bias.detach().clone().requires_grad_()
    twin = x.detach().clone().requires_grad_()
    y, expected = compute(layer.weight, x, layer.bias), compute(W, twin, b)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
    for each in (x, layer.weight_values, layer.bias):
        each.grad = None
    y.backward(upstream)
    expected.backward(upstream)
    live = spread(layer, torch.ones_like(layer.weight_values))
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(spread(layer, layer.weight_values.grad), W.grad * live, rtol=1e-12, atol=1e-12)
    if b.grad is None:
        assert layer.bias.grad is None
    else:
        torch.testing.assert_close(layer.bias.grad, b.grad, rtol=1e-12, atol=1e-12)
