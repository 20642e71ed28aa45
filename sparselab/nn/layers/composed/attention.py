"""Multi-head attention whose projections can be sparse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselab.nn.layers.composed.parts import as_dense, copy_linear, copy_parameter
from sparselab.nn.layers.dense import (
    PROJECTIONS,
    DenseType,
    attention_parts,
    projections,
    register_dense,
)
from sparselab.nn.layers.extras import refuse_to_lose
from sparselab.nn.layers.linear import SparseLinear
from sparselab.nn.ops.tools.nodes import is_node, node_of
from sparselab.nn.storage.checks import check_size


class SparseMultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` with each projection a layer of its own, dense or sparse.

    Takes the same arguments and computes the same function, in training and in evaluation. All projections
    of a new one are `SparseLinear`. `sparselab.sparsify` makes it from a dense one where a rule matches one
    of its projections; `from_dense` and `of_layers` make a single one.

    Parameters
    ----------
    embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        As of `torch.nn.MultiheadAttention`.
    sparsity : float in [0, 1], optional
        Of each projection; 0.9 if density is not given either.
    density : float in [0, 1], optional
        ``1 - sparsity``, in place of it.

    Attributes
    ----------
    q_proj, k_proj, v_proj : torch.nn.Module
        From embed_dim, kdim and vdim to embed_dim features: the three parts of ``in_proj_weight``, in order.
    out_proj : torch.nn.Module
    in_proj_weight : None
        As of torch's attention with a kdim of its own: read ``q_proj_weight``, ``k_proj_weight`` and
        ``v_proj_weight``.
    bias_k, bias_v : Parameter, (1, 1, embed_dim), or None

    Raises
    ------
    TypeError, ValueError, AssertionError
        As `torch.nn.MultiheadAttention` and `SparseLinear`.

    Notes
    -----
    Torch's fused attention, which reads packed dense weights, is never used, nor are nested tensors. Without
    ``need_weights`` it is `torch.nn.functional.scaled_dot_product_attention` between the projections.

    Examples
    --------
    >>> import torch
    >>> sparse = SparseMultiheadAttention(64, 4, batch_first=True, sparsity=0.9)
    >>> x = torch.randn(2, 10, 64)
    >>> sparse(x, x, x, need_weights=False)[0].shape
    torch.Size([2, 10, 64])
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    #: What `to_dense` makes.
    dense_class = nn.MultiheadAttention

    # What torch's Transformer layers ask for before their fused path; these answers keep them off it.
    in_proj_weight = None
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True,
        add_bias_kv: bool = False, add_zero_attn: bool = False, kdim: int | None = None,
        vdim: int | None = None, batch_first: bool = False, device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None, *, sparsity: float | None = None, density: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        _require_attention_size(embed_dim, num_heads)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.kdim, self.vdim = (embed_dim if kdim is None else kdim), (embed_dim if vdim is None else vdim)
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn
        inputs = embed_dim, self.kdim, self.vdim, embed_dim
        for name, n_in in zip(PROJECTIONS, inputs, strict=True):
            layer = SparseLinear(
                n_in, embed_dim, bias, sparsity=sparsity, density=density, device=device, dtype=dtype
            )
            self.add_module(name, layer)
        self.bias_k, self.bias_v = (
            nn.Parameter(torch.empty((1, 1, embed_dim), device=device, dtype=dtype)) if add_bias_kv else None
            for _ in range(2)
        )
        self.reset_parameters()

    @classmethod
    def from_dense(
        cls, attention: nn.MultiheadAttention, sparsity: float | None = None, *, density: float | None = None
    ) -> SparseMultiheadAttention:
        """The largest weights of each projection of a dense one, by magnitude."""
        _require_attention(attention)
        own = projections(attention)
        layers = {name: SparseLinear.from_dense(own[name].linear, sparsity, density=density) for name in own}
        return cls.of_layers(attention, layers)

    @classmethod
    def of_layers(
        cls, attention: nn.MultiheadAttention, layers: Mapping[str, nn.Module] | None = None
    ) -> SparseMultiheadAttention:
        """A dense attention's settings and weights, with layers in the place of some of its projections.

        Parameters
        ----------
        attention : torch.nn.MultiheadAttention
        layers : mapping of str to torch.nn.Module, optional
            What projects instead of the attention's own weights: any of ``"q_proj"``, ``"k_proj"``,
            ``"v_proj"`` and ``"out_proj"``. The others become `torch.nn.Linear`.

        Raises
        ------
        TypeError
            If attention is no `torch.nn.MultiheadAttention`.
        ValueError
            If a name in layers is no projection.
        """
        _require_attention(attention)
        layers = layers or {}
        own = projections(attention)
        if unknown := sorted(set(layers) - set(own)):
            raise ValueError(f"layers must be named {', '.join(own)}, got {unknown[0]!r}")
        new = cls(
            attention.embed_dim, attention.num_heads, attention.dropout,
            own["q_proj"].linear.bias is not None,
            attention.bias_k is not None, attention.add_zero_attn, attention.kdim, attention.vdim,
            attention.batch_first, "meta", sparsity=1.0,
        )  # fmt: skip
        new.bias_k, new.bias_v = copy_parameter(attention.bias_k), copy_parameter(attention.bias_v)
        for name in PROJECTIONS:
            layer = layers[name] if name in layers else copy_linear(own[name].linear)
            setattr(new, name, layer)
        return new.train(attention.training)

    @torch.no_grad()
    def to_dense(self) -> nn.MultiheadAttention:
        """A `torch.nn.MultiheadAttention` with the same outputs."""
        refuse_to_lose(self, "to_dense", (*PROJECTIONS, "bias_k", "bias_v"))
        q, k, v, out = (as_dense(getattr(self, name)) for name in PROJECTIONS)
        new = nn.MultiheadAttention(
            self.embed_dim, self.num_heads, self.dropout, q.bias is not None, self.bias_k is not None,
            self.add_zero_attn, self.kdim, self.vdim, self.batch_first, "meta", q.weight.dtype,
        )  # fmt: skip
        if new._qkv_same_embed_dim:
            new.in_proj_weight = _packed(q.weight, k.weight, v.weight)
        else:
            for name, layer in zip(PROJECTIONS, (q, k, v), strict=False):
                setattr(new, f"{name}_weight", layer.weight)
        if q.bias is not None:
            new.in_proj_bias = _packed(q.bias, k.bias, v.bias)
        new.out_proj.weight, new.out_proj.bias = out.weight, out.bias
        new.bias_k, new.bias_v = copy_parameter(self.bias_k), copy_parameter(self.bias_v)
        return new.train(self.training)

    @property
    def q_proj_weight(self) -> Any:
        """``q_proj.weight``, as torch's attention has it where kdim or vdim differs and nothing is packed."""
        return self.q_proj.weight

    @property
    def k_proj_weight(self) -> Any:
        """``k_proj.weight``."""
        return self.k_proj.weight

    @property
    def v_proj_weight(self) -> Any:
        """``v_proj.weight``."""
        return self.v_proj.weight

    def reset_parameters(self) -> None:
        """Draw `bias_k` and `bias_v` anew; the projections have their own ``reset_parameters``."""
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention`.

        Parameters
        ----------
        query : (L, N, embed_dim), (N, L, embed_dim) if ``batch_first``, or (L, embed_dim)
        key, value : as query, S for L; kdim and vdim features
        key_padding_mask : bool or float (N, S), or (S,), optional
            True: the key is ignored. A float is added to the scores.
        need_weights : bool
            Whether to return the weights, too.
        attn_mask : bool or float (L, S) or (N * num_heads, L, S), optional
        average_attn_weights : bool
            Whether to average the weights over the heads.
        is_causal : bool
            Says that attn_mask, which must be given, is the causal one. Only attn_mask counts; torch goes by
            the hint, which hides the keys that ``add_bias_kv`` and ``add_zero_attn`` add.

        Returns
        -------
        output : shaped as query
        weights : (N, L, S), (N, num_heads, L, S) if not averaged, both without N if there is none, or None

        Raises
        ------
        RuntimeError
            If a mask has another shape, or is_causal is set without one.
        """
        if is_node(query):
            return node_of(  # type: ignore[no-any-return]
                self,
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("attn_mask must be given with is_causal=True, which only says what it is")
        batched = query.ndim == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        batch_first = self.batch_first or not batched
        q, k, v = (
            _split_heads(projected, self.num_heads, batch_first)
            for projected in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )
        mask = _merged_mask(attn_mask, key_padding_mask, q, k)
        k, v, mask = self._lengthened(k, v, mask)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q * math.sqrt(1 / max(q.shape[-1], 1)) @ k.transpose(-2, -1)
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        together = heads.transpose(1, 2) if batch_first else heads.permute(2, 0, 1, 3)
        output = self.out_proj(together.flatten(2))
        if not batched:
            output = output.squeeze(0)
        if not need_weights:
            return output, None
        return output, weights if batched else weights.squeeze(0)

    def _lengthened(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (N, heads, S, head size) with the learned one and the zero one, always attended."""
        more = []
        if self.bias_k is not None and self.bias_v is not None:
            learned = (_split_heads(bias, self.num_heads, True) for bias in (self.bias_k, self.bias_v))
            more.append([bias.expand(len(k), -1, -1, -1) for bias in learned])
        if self.add_zero_attn:
            more.append([k.new_zeros(*k.shape[:2], 1, k.shape[3])] * 2)
        if more:
            k, v = (torch.cat(parts, 2) for parts in zip((k, v), *more, strict=True))
            mask = None if mask is None else F.pad(mask, (0, len(more)))
        return k, v, mask


def _split_heads(x: Tensor, n_heads: int, batch_first: bool) -> Tensor:
    """(N, heads, length, head size) of what was projected."""
    x = x.reshape(*x.shape[:-1], n_heads, x.shape[-1] // n_heads)
    return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)


def _merged_mask(attention: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """What to add to the scores (N, heads, L, S), broadcastable to them."""
    n, n_heads, length, _ = q.shape
    n_keys = k.shape[2]
    merged = None
    if attention is not None:
        shapes = ((length, n_keys), (n * n_heads, length, n_keys))
        if attention.shape not in shapes:
            raise RuntimeError(
                f"attn_mask must have shape {shapes[0]} or {shapes[1]}, got {tuple(attention.shape)}"
            )
        per_head = (n, n_heads) if attention.ndim == 3 else (1, 1)
        merged = _added(attention, q.dtype).reshape(*per_head, length, n_keys)
    if padding is not None:
        if padding.shape != (n, n_keys):
            raise RuntimeError(f"key_padding_mask must have shape {(n, n_keys)}, got {tuple(padding.shape)}")
        hidden = _added(padding, q.dtype)[:, None, None, :]
        merged = hidden if merged is None else merged + hidden
    return merged


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    return mask.to(dtype)


def _require_attention_size(embed_dim: int, num_heads: int) -> None:
    if check_size("embed_dim", embed_dim) % max(check_size("num_heads", num_heads), 1) or not num_heads:
        raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")


def _require_attention(attention: object) -> None:
    if not isinstance(attention, nn.MultiheadAttention):
        raise TypeError(f"attention must be a torch.nn.MultiheadAttention, got {type(attention).__name__}")


def _packed(*parts: Any) -> nn.Parameter:
    return nn.Parameter(torch.cat(parts), any(part.requires_grad for part in parts))


register_dense(
    DenseType(
        nn.MultiheadAttention,
        attention_parts,
        known=(
            "in_proj_weight", *(f"{name}_weight" for name in PROJECTIONS[:3]), "in_proj_bias", "bias_k",
            "bias_v", "out_proj",
        ),
        join=SparseMultiheadAttention.of_layers,
    )
)  # fmt: skip
