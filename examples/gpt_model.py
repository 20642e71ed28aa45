"""A GPT in plain PyTorch, dense, and the sizes it is trained in.

`sparselab.sparsify` makes any of its linear layers sparse by name.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Shape(NamedTuple):
    """Layers, width, and heads of attention; feed-forward blocks are four times as wide."""

    n_layer: int
    d_model: int
    n_head: int

    @property
    def d_ff(self) -> int:
        """Width of the feed-forward blocks."""
        return 4 * self.d_model


#: By the parameters that they have dense: the first two and the last with bytes for tokens, the others with
#: the 50,257 tokens of GPT-2 (124M is GPT-2 small, 350M is GPT-2 medium; with bytes they have 86M and 303M).
PRESETS = {
    "10M": Shape(6, 384, 6),
    "40M": Shape(8, 640, 10),
    "124M": Shape(12, 768, 12),
    "350M": Shape(24, 1024, 16),
    "1B": Shape(20, 2048, 16),
}

#: Keys and values of the places before, of one block; empty at the first.
Past = list[Tensor]


def initial_std(name: str, n_layer: int) -> float:
    """Of the weights so named; the 2 * n_layer that add to the residual stream start smaller."""
    return 0.02 / math.sqrt(2 * n_layer) if ".attn.out" in name or ".mlp.down" in name else 0.02


class Attention(nn.Module):
    """Causal self-attention; queries, keys and values come from one projection."""

    def __init__(self, d_model: int, n_head: int, bias: bool) -> None:
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(d_model, 3 * d_model, bias)
        self.out = nn.Linear(d_model, d_model, bias)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.n_head, width // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        is_first = not past
        if past is not None:
            past[:] = (k, v) if is_first else map(torch.cat, zip(past, (k, v), strict=True), (2, 2))
            k, v = past
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_first)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class FeedForward(nn.Module):
    def __init__(self, d_model: int, d_ff: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_ff, bias)
        self.down = nn.Linear(d_ff, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, d_model: int, d_ff: int, n_head: int, bias: bool) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(d_model)
        self.attn = Attention(d_model, n_head, bias)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = FeedForward(d_model, d_ff, bias)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), past)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Pre-norm transformer; `forward` maps tokens ``[batch, length]`` to logits for each place.

    `bias` is that of the projections in attention and feed-forward blocks. With `recompute` set, a backward
    pass has one block's activations at a time, which it computes again from what the block was given.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        n_layer: int,
        d_model: int,
        d_ff: int,
        n_head: int,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.recompute = False
        self.tokens = nn.Embedding(vocabulary, d_model)
        self.places = nn.Embedding(context, d_model)
        self.blocks = nn.ModuleList(Block(d_model, d_ff, n_head, bias) for _ in range(n_layer))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=initial_std(name, n_layer))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, past: list[Past] | None = None) -> Tensor:
        """Logits; with `past`, one for each block, those of further places than the ones it has seen."""
        first = past[0][0].shape[2] if past and past[0] else 0
        h = self.tokens(x) + self.places(torch.arange(first, first + x.shape[1]))
        for index, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(block, h, use_reentrant=False)
            else:
                h = block(h, None if past is None else past[index])
        return self.head(self.norm(h))
