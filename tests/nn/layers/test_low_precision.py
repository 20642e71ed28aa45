"""Layers in bfloat16 and float16: sums in float32 of rounded weights and inputs, then rounded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparselab
from sparselab import RigL, SparseLinear

DTYPES = [torch.bfloat16, torch.float16]
TOKENS = torch.arange(30).reshape(2, 15) % 10
CASES: dict[str, Any] = {
    "linear, one token": (lambda: SparseLinear(30, 20, sparsity=0.8), (1, 30)),
    "linear, few tokens": (lambda: SparseLinear(30, 20, sparsity=0.8), (9, 30)),
    "linear, many tokens": (lambda: SparseLinear(30, 20, sparsity=0.8), (2, 70, 30)),
    "linear, dense": (lambda: SparseLinear(30, 20, sparsity=0.1, bias=False), (70, 30)),
    "fan-in": (lambda: sparselab.FanInLinear(30, 20, fan_in=4), (70, 30)),
    "blocks": (lambda: sparselab.BlockSparseLinear(32, 24, block_shape=(4, 4), sparsity=0.5), (70, 32)),
    "conv 1d": (lambda: sparselab.SparseConv1d(3, 8, 3, sparsity=0.5), (2, 3, 9)),
    "conv 2d": (lambda: sparselab.SparseConv2d(4, 8, 3, groups=2, sparsity=0.5), (2, 4, 9, 9)),
    "conv 3d": (lambda: sparselab.SparseConv3d(3, 8, 3, sparsity=0.5), (2, 3, 5, 5, 5)),
    "transposed": (lambda: sparselab.SparseConvTranspose2d(3, 8, 3, stride=2, sparsity=0.5), (2, 3, 9, 9)),
    "embedding": (lambda: sparselab.SparseEmbedding(10, 8, sparsity=0.5), TOKENS),
}


def run(layer: Any, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of numbers that every dtype holds."""
    x = x.detach().to(dtype, copy=True).requires_grad_() if x.is_floating_point() else x
    y = layer(x)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randint(-2, 3, y.shape, generator=generator).to(y.dtype))
    gradients = [p.grad for p in layer.parameters()]
    return [y.detach(), *gradients, *([x.grad] if x.is_floating_point() else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_in_float32_rounded(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, given = CASES[name]
    layer = make().to(dtype)
    x = given if isinstance(given, Tensor) else torch.randn(given).to(dtype)
    wide = copy.deepcopy(layer).float()
    for ours, theirs in zip(run(layer, x, dtype), run(wide, x, torch.float32), strict=True):
        assert ours.dtype is dtype
        # Some convolutions are sums of rounded ones.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs.to(dtype), rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_is_cast_as_dense_ones_are(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 8))
    model = sparselab.sparsify(copy.deepcopy(dense), 0.5)
    x = torch.randn(12, 30)
    expected = model(x)
    low = copy.deepcopy(model).to(dtype)
    assert low(x.to(dtype)).dtype is dtype
    torch.testing.assert_close(low(x.to(dtype)).float(), expected, rtol=0.05, atol=0.02)
    made = sparselab.sparsify(copy.deepcopy(dense).to(dtype), 0.5)
    made.load_state_dict(low.state_dict())
    assert torch.equal(made(x.to(dtype)), low(x.to(dtype)))
    twin = sparselab.densify(copy.deepcopy(low))
    assert twin[0].weight.dtype is dtype
    assert low.float()(x).dtype is torch.float32
    before = made(x.to(dtype))
    sparselab.tune(made, [12])
    torch.testing.assert_close(made(x.to(dtype)), before, rtol=0.02, atol=0.01)
    program = torch.export.export(made, (x.to(dtype),)).module()
    assert torch.equal(program(x.to(dtype)), made(x.to(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rewiring_is_refused_and_the_way_told(dtype: torch.dtype) -> None:
    layer = SparseLinear(30, 20, sparsity=0.8, dtype=dtype)
    with pytest.raises(TypeError, match=rf"float32 or float64, got {dtype}.*autocast"):
        layer.apply(RigL())
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(TypeError, match=f"for a change of topology, got {kind}"):
        layer.rewrite(torch.tensor([0]), torch.tensor([1]))


def test_operands_of_two_dtypes_are_named() -> None:
    layer = SparseLinear(30, 20, sparsity=0.8, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"dtype of the layer's values, torch.float16, got torch.float32"):
        layer(torch.randn(3, 30))
    values, indptr, indices, sizes, layout = layer.weight_values, *layer.topology_arguments()
    with pytest.raises(RuntimeError, match=r"values must be torch.float32 of shape .*, got torch.float16"):
        torch.ops.sparselab.linear(torch.randn(3, 30), values, None, indptr, indices, sizes, layout)
