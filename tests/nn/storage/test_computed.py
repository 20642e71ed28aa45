"""Layers whose weights are computed, as under weight_norm, load their own state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from sparselab import BlockSparseLinear, FanInLinear, SparseConv2d, SparseLinear


class Doubled(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return 2 * values

    def right_inverse(self, values: Tensor) -> Tensor:
        return values / 2


class Packed(nn.Module):
    """Computed from a tensor of another shape."""

    def forward(self, flat: Tensor) -> Tensor:
        return flat.reshape(self.shape)

    def right_inverse(self, values: Tensor) -> Tensor:
        self.shape = values.shape
        return values.flatten()


KINDS: dict[str, Any] = {
    "single": lambda: SparseLinear(20, 12, sparsity=0.7),
    "fan-in": lambda: FanInLinear(20, 12, sparsity=0.7),
    "blocks": lambda: BlockSparseLinear(20, 12, sparsity=0.5, block_shape=(4, 4)),
    "conv": lambda: SparseConv2d(5, 12, 2, sparsity=0.7),
}
HOW: dict[str, Any] = {
    "doubled": lambda layer: parametrize.register_parametrization(layer, "weight_values", Doubled()),
    "packed": lambda layer: parametrize.register_parametrization(
        layer, "weight_values", Packed(), unsafe=True
    ),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer, "weight_values"),
    "prune": lambda layer: prune.random_unstructured(layer, "weight_values", 0.5),
}


def batch(layer: Any) -> Tensor:
    return torch.randn(3, 5, 4, 4) if isinstance(layer, SparseConv2d) else torch.randn(3, 20)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_its_own_state_is_loaded(kind: str, how: str) -> None:
    models = []
    for _ in range(2):
        layer = KINDS[kind]()
        HOW[how](layer)
        models.append(nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(2)))
        models[-1](batch(layer))
    state = copy.deepcopy(models[0].state_dict())
    models[1].load_state_dict(state)
    x = batch(models[0][0])
    assert torch.equal(models[0](x), models[1](x))
    assert torch.equal(models[1][0].positions(), models[0][0].positions())


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_connections_is_refused_before_anything_changes(kind: str) -> None:
    layer = KINDS[kind]()
    HOW["doubled"](layer)
    before = copy.deepcopy(layer.state_dict())
    torch.manual_seed(1)
    other = {"fan-in": FanInLinear(20, 12, sparsity=0.5), "conv": SparseConv2d(5, 12, 2, sparsity=0.5)}.get(
        kind, SparseLinear(20, 12, sparsity=0.5)
    )
    if kind == "blocks":
        other = BlockSparseLinear(20, 12, sparsity=0.7, block_shape=(4, 4))
    HOW["doubled"](other)
    with pytest.raises(RuntimeError, match=r"the state must have \d+ connections, as many as the layer"):
        layer.load_state_dict(other.state_dict())
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in before.items())
