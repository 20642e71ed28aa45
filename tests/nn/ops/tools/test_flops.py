"""`FlopCounterMode` counts sparse products as their share of the dense ones; profilers name them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import sparselab

IMAGES = (2, 4, 9, 9)
CASES = [
    (sparselab.SparseLinear(32, 64, sparsity=0.75), (3, 5, 32)),
    (sparselab.FanInLinear(32, 64, fan_in=4), (5, 32)),
    (sparselab.BlockSparseLinear(32, 64, block_shape=(4, 4), sparsity=0.75), (5, 32)),
    (sparselab.SparseConv1d(4, 8, 3, sparsity=0.5), (2, 4, 9)),
    (sparselab.SparseConv2d(4, 8, 3, stride=2, padding=1, sparsity=0.5), IMAGES),
    (sparselab.SparseConv3d(4, 8, 3, sparsity=0.5), (2, 4, 5, 5, 5)),
    (sparselab.SparseConvTranspose2d(4, 8, 3, sparsity=0.5), IMAGES),
]


def count(model: nn.Module, *inputs: Tensor, by: str = "Global") -> dict[Any, int]:
    given = [x.clone().requires_grad_() for x in inputs]
    with FlopCounterMode(display=False) as counter:
        y = model(*given)
        (y[0] if isinstance(y, tuple) else y).sum().backward()
    return counter.get_flop_counts()[by]


@pytest.mark.parametrize(("layer", "shape"), CASES, ids=[type(layer).__name__ for layer, _ in CASES])
def test_a_layer_counts_as_its_share_of_the_dense_one(layer: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    dense = sum(count(layer.to_dense(), x).values())
    sparse = count(layer, x)
    assert len(sparse) == 3  # the output and both gradients
    assert sum(sparse.values()) == round(dense * (1 - layer.sparsity))


def test_groups_are_counted_as_they_are() -> None:
    layer = sparselab.SparseConv2d(4, 8, 3, groups=2, sparsity=0.5)
    assert layer.nnz == 72
    assert sum(count(layer, torch.randn(IMAGES)).values()) == 3 * 2 * 72 * 2 * 7 * 7


def test_layers_of_parts_count_as_the_dense_ones() -> None:
    attention, gru = nn.MultiheadAttention(8, 2), nn.GRU(8, 4)
    x = torch.randn(3, 2, 8)
    for dense, given in ((attention, (x, x, x)), (gru, (x,))):
        expected = sum(count(dense, *given).values())
        sparse = sparselab.sparsify(nn.Sequential(dense), 0.0, init="magnitude")[0]
        assert sum(count(sparse, *given).values()) == expected


def test_counts_are_told_by_module() -> None:
    model = sparselab.sparsify(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8)), 0.5)
    assert sum(count(model, torch.randn(5, 32), by="Sequential.1").values()) == 3 * 2 * 5 * model[1].nnz


def test_a_profile_names_the_products() -> None:
    model = nn.Sequential(*(layer for layer, _ in CASES[:1]))
    conv = sparselab.SparseConv2d(4, 8, 3, sparsity=0.5)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        model(torch.randn(5, 32)).sum().backward()
        conv(torch.randn(IMAGES)).sum().backward()
    names = {event.key for event in found.key_averages()}
    for name in ("SparseLinearFunction", "SparseConv2dFunction"):
        assert {name, f"{name}Backward"} <= names
