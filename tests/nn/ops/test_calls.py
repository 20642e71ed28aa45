"""How many Python calls a pass makes inside the package: a bound, which no slow machine can fail."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import sparselab
from benchmarks.driver import calls_within
from sparselab import BlockSparseLinear, FanInLinear, SparseConv2d, SparseLinear

_PACKAGE = Path(sparselab.__path__[0])


class StepCalls(NamedTuple):
    """Functions of this package that one forward and one backward pass call, in order."""

    forward: list[str]
    backward: list[str]


def calls_of_step(layer: nn.Module, x: torch.Tensor) -> StepCalls:
    """The calls of a step that is not the first one."""
    for _ in range(2):
        layer(x).sum().backward()
    loss: list[torch.Tensor] = []
    forward = calls_within(lambda: loss.append(layer(x)), _PACKAGE)
    total = loss[0].sum()
    return StepCalls(forward, calls_within(total.backward, _PACKAGE))


@pytest.mark.parametrize("kind", [SparseLinear, FanInLinear])
@pytest.mark.parametrize("bias", [True, False])
def test_a_step_of_a_linear_layer_makes_few_calls(kind: type[SparseLinear], bias: bool) -> None:
    calls = calls_of_step(kind(128, 96, bias), torch.randn(64, 128, requires_grad=True))
    assert len(calls.forward) <= 22, calls.forward
    assert len(calls.backward) <= 19, calls.backward


def test_one_token_without_gradients_makes_fewer() -> None:
    layer, x = SparseLinear(128, 96), torch.randn(1, 128)
    with torch.no_grad():
        layer(x)
        assert len(calls_within(lambda: layer(x), _PACKAGE)) <= 21


@pytest.mark.parametrize(
    ("layer", "shape", "most"),
    [
        (lambda: BlockSparseLinear(128, 96, block_shape=(4, 4)), (64, 128), 40),
        (lambda: SparseConv2d(8, 16, 3, padding=1), (4, 8, 6, 6), 272),
    ],
)
def test_the_other_layers_do_not_grow(layer: object, shape: tuple[int, ...], most: int) -> None:
    calls = calls_of_step(layer(), torch.randn(shape, requires_grad=True))  # type: ignore[operator]
    assert len(calls.forward) + len(calls.backward) <= most


def test_calls_are_seen() -> None:
    layer = SparseLinear(8, 8)
    found = calls_within(lambda: [layer.nnz, layer.nnz], _PACKAGE)
    assert found.count("nn/layers/base.py:nnz") == 2
