"""A sparse layer as plain as possible: dense arithmetic, but the topology interface of the real one."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from sparselab.nn.ops.operands import LinearFactors


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, layer):
        ctx.save_for_backward(x, values)
        ctx.layer = layer
        ctx.watcher = layer.gradient_watcher
        if ctx.watcher is not None and any(ctx.needs_input_grad):
            ctx.watcher.forward_seen()
        return x @ layer.dense(layer.in_use(values)).T

    @staticmethod
    def backward(ctx, dy):
        x, values = ctx.saved_tensors
        if ctx.watcher is not None:
            ctx.watcher.backward_seen(LinearFactors(x.detach(), dy.detach()))
        dw = (dy.T @ x).reshape(-1)[ctx.layer.positions()]
        return dy @ ctx.layer.dense(ctx.layer.in_use(values)), dw, None


class FakeSparse(nn.Module):
    """``y = x W^T`` with ``nnz`` live connections at random positions."""

    def __init__(self, in_features, out_features, sparsity=0.9, seed=0, dtype=torch.float32):
        super().__init__()
        self.shape = self.grid = (out_features, in_features)
        self.block_shape = (1, 1)
        n = in_features * out_features
        rng = np.random.default_rng(seed)
        nnz = round((1 - sparsity) * n)
        live = np.sort(rng.choice(n, nnz, replace=False))
        self.register_buffer("live", torch.from_numpy(live))
        self.values = nn.Parameter(torch.from_numpy(rng.standard_normal(nnz)).to(dtype))
        self.gradient_watcher = None
        self.register_buffer("forward_mask", None)

    @property
    def stored(self):
        return self.values

    @property
    def nnz(self):
        return self.values.numel()

    @property
    def sparsity(self):
        return 1 - self.nnz / (self.shape[0] * self.shape[1])

    def dense(self, values):
        flat = torch.zeros(self.shape[0] * self.shape[1], dtype=values.dtype)
        return flat.index_put((self.live,), values).reshape(self.shape)

    def in_use(self, values):
        return values if self.forward_mask is None else torch.where(self.forward_mask, values, 0)

    def positions(self):
        return self.live

    def per_connection(self, entries):
        return entries

    @torch.no_grad()
    def put(self, entries, slots, numbers):
        entries[slots] = numbers

    def moved(self, entries, source):
        moved = torch.where(source < 0, entries.new_zeros(()), entries[source])
        return entries.copy_(moved) if moved.shape == entries.shape else moved

    def rewrite(self, drop, grow):
        old = self.live.numpy()
        kept = np.delete(old, drop.numpy())
        new = np.concatenate((kept, grow.numpy()))
        assert np.unique(new).size == new.size, "a position was grown twice, or where one is kept"
        new.sort()
        slot = np.searchsorted(old, new).clip(max=max(old.size - 1, 0))
        source = torch.from_numpy(np.where(old[slot] == new, slot, -1))
        gradient, self.values.grad = self.values.grad, None
        self.values.data = self.moved(self.values.data, source)
        if gradient is not None:
            self.values.grad = self.moved(gradient, source)
        if self.forward_mask is not None:
            self.forward_mask = self.moved(self.forward_mask, source)
        self.live = torch.from_numpy(new)
        return source

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.values.data = torch.empty_like(state_dict[prefix + "values"])
        self.live = torch.empty_like(state_dict[prefix + "live"])
        mask = state_dict.get(prefix + "forward_mask")
        self.forward_mask = None if mask is None else torch.empty_like(mask)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x):
        return _Function.apply(x, self.values, self)
