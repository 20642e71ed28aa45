"""Memory, counted from the tensors that exist."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparselab.nn.layers.base import SparseLayer, find_sparse
from sparselab.nn.storage.narrow import find_narrow


@dataclass(frozen=True)
class MemoryReport:
    """Parameters and bytes of a model; see `memory_report`."""

    parameters_live: int
    parameters_dense: int
    weight_bytes: int
    dense_weight_bytes: int
    gradient_bytes: int
    plan_bytes: int
    optimizer_bytes: int

    @property
    def training_bytes(self) -> int:
        """Weights, gradients, plans and optimizer state."""
        return self.weight_bytes + self.gradient_bytes + self.plan_bytes + self.optimizer_bytes

    def __str__(self) -> str:
        share = self.weight_bytes / self.dense_weight_bytes if self.dense_weight_bytes else 1.0
        lines = [
            f"parameters       {self.parameters_live:>14,} of {self.parameters_dense:,} dense",
            f"weights          {self.weight_bytes:>14,} B, {share:.1%} of dense",
            f"gradients        {self.gradient_bytes:>14,} B",
            f"kernel plans     {self.plan_bytes:>14,} B",
            f"optimizer state  {self.optimizer_bytes:>14,} B",
            f"training, all    {self.training_bytes:>14,} B",
        ]
        return "\n".join(lines)


def memory_report(
    model: nn.Module, optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = ()
) -> MemoryReport:
    """Count what a model and its optimizers hold.

    Parameters
    ----------
    model : torch.nn.Module
        Dense, sparse or mixed.
    optimizer : torch.optim.Optimizer, or several, optional

    Returns
    -------
    MemoryReport
        ``parameters_live`` and ``parameters_dense``: trainable numbers that exist, or were that before
        layers were frozen, and those of the same model with dense layers. ``weight_bytes``: parameters and
        buffers (which hold the topology, and frozen weights); ``dense_weight_bytes``: the same for dense
        layers. ``gradient_bytes``, ``plan_bytes`` and ``optimizer_bytes``: what exists at the time of the
        call, so call it after a training step.

    Notes
    -----
    Tensors that share storage count once. Activations are not counted.
    """
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    parameters = list(model.parameters())
    weights = _bytes([*parameters, *model.buffers()])
    sparse = [layer for _, layer in find_sparse(model)]
    numbers = [(math.prod(layer.shape), *_numbers(layer)) for layer in sparse]
    extra_positions = sum(size - count for size, count, _ in numbers)
    dense_bytes = sum(size * itemsize for size, _, itemsize in numbers)
    own_bytes = _bytes([tensor for layer in sparse for tensor in _weight_tensors(layer)])
    narrow = [held.values for layer in sparse if (held := find_narrow(layer)) is not None]
    live = sum(each.numel() for each in (*parameters, *narrow))
    return MemoryReport(
        parameters_live=live,
        parameters_dense=live + extra_positions,
        weight_bytes=weights,
        dense_weight_bytes=weights - own_bytes + dense_bytes,
        gradient_bytes=_bytes([p.grad for p in parameters if p.grad is not None]),
        plan_bytes=sum(layer.plan_bytes() for layer in sparse),
        optimizer_bytes=_bytes([tensor for each in optimizers for tensor in _tensors(each.state)]),
    )


def _numbers(layer: SparseLayer) -> tuple[int, int]:
    """How many weights a layer holds, and the bytes that a dense layer has for each."""
    narrow = find_narrow(layer)
    if narrow is not None:  # of which a dense layer is made in float32
        return narrow.values.numel(), torch.float32.itemsize
    held = layer.in_use
    return held.numel(), held.itemsize


def _weight_tensors(layer: SparseLayer) -> Iterator[Tensor]:
    """The weights and the topology of a layer, without its bias."""
    yield from (parameter for name, parameter in layer.named_parameters() if name != "bias")
    yield from layer.buffers(recurse=False)


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _tensors(value)


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = (tensor.untyped_storage() for tensor in tensors)
    # On the meta device no storage has an address; there each object is one.
    return sum({each.data_ptr() or each._cdata: each.nbytes() for each in storages}.values())
