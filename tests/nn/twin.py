"""A dense twin of any model, whose parameters have the names and shapes of the sparse one's.

Its weights are made from the values of the connections by torch alone, so every derivative of torch's, by the
input or by a parameter, is what the sparse model's must be.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparselab.nn.layers.base import SparseLayer, find_sparse


def twin_of(model: nn.Module) -> nn.Module:
    """A copy with every sparse layer replaced."""
    if isinstance(model, SparseLayer):
        return DenseTwin(model)
    twin = copy.deepcopy(model)
    for name, layer in list(find_sparse(twin)):
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, DenseTwin(layer))
    return twin


class DenseTwin(nn.Module):
    """What a sparse layer computes, by dense operations on a W put together from its values."""

    def __init__(self, layer: SparseLayer) -> None:
        super().__init__()
        self.name = layer.storage.parameter
        self.register_parameter(self.name, nn.Parameter(layer.stored.detach().clone()))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.positions, self.grid, self.block_shape = layer.positions(), layer.grid, layer.block_shape
        self.used, self.shape = layer.forward_mask, layer.shape
        #: In a tuple, so that its parameters are not counted.
        self.conv: tuple[Any, ...] = (layer.to_dense(),) if hasattr(layer, "kernel_size") else ()

    def weight_of(self, values: Tensor) -> Tensor:
        """W, of values or of a masked weight."""
        if self.used is not None:
            values = values + (torch.where(self.used, values, 0) - values).detach()
        (rows, columns), (height, width) = self.grid, self.block_shape
        if values.ndim == 2:
            values = values.reshape(-1, 1, 1).index_select(0, self.positions)
        blocks = values.new_zeros(rows * columns, height, width).index_copy(0, self.positions, values)
        whole = blocks.reshape(rows, columns, height, width).permute(0, 2, 1, 3)
        return whole.reshape(rows * height, columns * width)[: self.shape[0], : self.shape[1]]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_of(getattr(self, self.name))
        if not self.conv:
            return nn.functional.linear(x, weight, self.bias)
        (conv,) = self.conv
        tensors = {"weight": weight.reshape(conv.weight.shape)}
        tensors |= {} if self.bias is None else {"bias": self.bias}
        y: Tensor = functional_call(conv, tensors, (x,))
        return y
