"""A sparse layer as plain as possible: dense arithmetic, and a storage of its own that is one sorted list."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from sparselab.nn.layers.base import SparseLayer
from sparselab.nn.ops.operands import LinearOperands, is_of_graph
from sparselab.nn.storage.base import Storage


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, layer):
        ctx.save_for_backward(x, values)
        ctx.layer = layer
        return x @ layer.dense(layer.in_use.detach()).T

    @staticmethod
    def backward(ctx, dy):
        x, _ = ctx.saved_tensors
        if ctx.layer.gradient_hook is not None:
            ctx.layer.gradient_hook(LinearOperands(x.detach(), dy.detach(), is_of_graph(x)))
        dw = (dy.T @ x).reshape(-1)[ctx.layer.positions()]
        return dy @ ctx.layer.dense(ctx.layer.in_use.detach()), dw, None


class FakeStorage(Storage):
    """Positions and values, nothing else."""

    saved = "weight_values", "live"

    def nnz(self, layer):
        return layer.weight_values.numel()

    def positions(self, layer):
        return layer.live

    def take(self, layer, entries):
        return entries

    @torch.no_grad()
    def put(self, layer, entries, slots, numbers):
        entries[slots] = numbers

    def move(self, layer, entries, source):
        moved = torch.where(source < 0, entries.new_zeros(()), entries[source])
        return entries.copy_(moved) if moved.shape == entries.shape else moved

    def rewrite(self, layer, drop, grow):
        old = layer.live.numpy()
        kept = np.delete(old, drop.numpy())
        new = np.concatenate((kept, grow.numpy()))
        assert np.unique(new).size == new.size, "a position was grown twice, or where one is kept"
        new.sort()
        slot = np.searchsorted(old, new).clip(max=max(old.size - 1, 0))
        source = torch.from_numpy(np.where(old[slot] == new, slot, -1))
        gradient, layer.weight_values.grad = layer.weight_values.grad, None
        layer.weight_values.data = self.move(layer, layer.weight_values.data, source)
        if gradient is not None:
            layer.weight_values.grad = self.move(layer, gradient, source)
        if layer.forward_mask is not None:
            layer.forward_mask = self.move(layer, layer.forward_mask, source)
        layer.live = torch.from_numpy(new)
        return source


class FakeSparse(SparseLayer):
    """``y = x W^T`` with ``nnz`` live connections at random positions."""

    def __init__(self, in_features, out_features, sparsity=0.9, seed=0, dtype=torch.float32):
        super().__init__(FakeStorage((out_features, in_features)))
        n = in_features * out_features
        rng = np.random.default_rng(seed)
        nnz = round((1 - sparsity) * n)
        live = np.sort(rng.choice(n, nnz, replace=False))
        self.register_buffer("live", torch.from_numpy(live))
        self.weight_values = nn.Parameter(torch.from_numpy(rng.standard_normal(nnz)).to(dtype))
        self.bias = None

    def dense(self, values):
        flat = torch.zeros(self.shape[0] * self.shape[1], dtype=values.dtype)
        return flat.index_put((self.live,), values).reshape(self.shape)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.weight_values.data = torch.empty_like(state_dict[prefix + "weight_values"])
        self.live = torch.empty_like(state_dict[prefix + "live"])
        mask = state_dict.get(prefix + "forward_mask")
        self.forward_mask = None if mask is None else torch.empty_like(mask)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x):
        return _Function.apply(x, self.weight_values, self)
