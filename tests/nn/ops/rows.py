"""The layers whose derivatives are tested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparselab import (
    BlockSparseLinear,
    FanInLinear,
    MaskedConv2d,
    MaskedConvTranspose1d,
    MaskedLinear,
    SparseConv2d,
    SparseConv3d,
    SparseConvTranspose2d,
    SparseConvTranspose3d,
    SparseLinear,
    SparseMultiheadAttention,
)

F64 = torch.float64


class SelfAttention(nn.Module):
    """Returning the weights, because torch differentiates its fused attention once only."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = SparseMultiheadAttention(4, 2, sparsity=0.5, dtype=F64, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x)[0]
        return y


def partly_used(layer: Any) -> nn.Module:
    layer.forward_mask = torch.arange(layer.stored.numel()).reshape(layer.stored.shape) % 3 > 0
    return layer  # type: ignore[no-any-return]


def watched(layer: Any) -> nn.Module:
    layer.gradient_hook = lambda operands: None
    return layer  # type: ignore[no-any-return]


#: A layer, and the shape of its input.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: SparseLinear(5, 4, sparsity=0.5, dtype=F64), (3, 5)),
    "linear without bias": (lambda: SparseLinear(5, 4, False, sparsity=0.5, dtype=F64), (2, 2, 5)),
    "fan-in": (lambda: FanInLinear(5, 4, fan_in=2, dtype=F64), (3, 5)),
    "blocks": (lambda: BlockSparseLinear(7, 5, sparsity=0.5, block_shape=(2, 3), dtype=F64), (3, 7)),
    "partly used": (lambda: partly_used(SparseLinear(5, 4, sparsity=0.4, dtype=F64)), (3, 5)),
    "partly used blocks": (
        lambda: partly_used(BlockSparseLinear(6, 4, sparsity=0.5, block_shape=(2, 2), dtype=F64)), (3, 6),
    ),
    "conv": (
        lambda: SparseConv2d(2, 4, 2, stride=(1, 2), padding=1, groups=2, sparsity=0.3, dtype=F64),
        (2, 2, 1, 2),
    ),
    "conv of one image": (
        lambda: SparseConv2d(
            1, 2, (2, 3), dilation=(2, 1), padding="same", padding_mode="reflect", bias=False, fan_in=3,
            dtype=F64,
        ),
        (1, 4, 3),
    ),
    "conv 3d": (
        lambda: SparseConv3d(2, 2, (2, 1, 2), stride=(1, 1, 2), padding=(1, 0, 0), sparsity=0.3, dtype=F64),
        (2, 2, 2, 1, 2),
    ),
    # Without output_padding, with which torch differentiates its own no more than twice.
    "transposed": (
        lambda: SparseConvTranspose2d(
            2, 4, 2, stride=(1, 2), padding=(1, 0), groups=2, sparsity=0.3, dtype=F64
        ),
        (2, 2, 3, 2),
    ),
    "transposed 3d": (
        lambda: SparseConvTranspose3d(2, 2, (2, 1, 2), dilation=(2, 1, 1), sparsity=0.4, dtype=F64),
        (1, 2, 2, 1, 1),
    ),
    "watched masked transposed": (
        lambda: watched(MaskedConvTranspose1d(2, 4, 2, padding=1, groups=2, sparsity=0.3, dtype=F64)),
        (2, 2, 3),
    ),
    "watched masked": (lambda: watched(MaskedLinear(5, 4, sparsity=0.5, dtype=F64)), (3, 5)),
    "watched masked conv": (
        lambda: watched(MaskedConv2d(2, 4, 2, padding=1, groups=2, sparsity=0.3, dtype=F64)), (2, 2, 2, 2),
    ),
    "attention": (SelfAttention, (1, 2, 4)),
}  # fmt: skip
