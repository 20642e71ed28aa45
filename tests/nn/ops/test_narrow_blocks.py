"""Layers of dense blocks in bfloat16, by the CPU's matrix unit, against the same layers in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from sparselab import BlockSparseLinear, RigL
from sparselab.nn.layers import block as block_layer
from sparselab.nn.ops.cpu.narrow_blocks import is_native

pytestmark = pytest.mark.skipif(
    not is_native((16, 16)), reason="this CPU has no AMX for bfloat16, or may not use it"
)
BLOCKS = [(32, 32), (16, 16), (16, 48)]


def pair(block: Any, how: str) -> tuple[Any, Any]:
    """A layer as it is computed with here, and one in float32 with the same, rounded weights."""
    torch.manual_seed(0)
    wide = BlockSparseLinear(100, 70, sparsity=0.5, block_shape=block)
    with torch.no_grad():
        for each in wide.parameters():
            each.copy_(each.bfloat16())
    layer = copy.deepcopy(wide)
    return (layer.bfloat16() if how == "parameters" else layer), wide


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("how", ["parameters", "autocast"])
@pytest.mark.parametrize("shape", [(100,), (3, 50, 100), (0, 100), (40, 100)])
def test_outputs_and_gradients(block: Any, how: str, shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_layer, "pays", lambda n_weights, n_tokens: True)
    layer, wide = pair(block, how)
    x = torch.randn(shape).bfloat16()
    ours = x.detach().to(layer.weight_values.dtype).requires_grad_()
    theirs = x.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = layer(ours)
    expected = wide(theirs)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=2**-7, atol=1e-3)
    dy = torch.randn(y.shape).bfloat16()
    y.backward(dy)
    expected.backward(dy.float())
    torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=2**-7, atol=4e-2)
    for mine, other in zip(layer.parameters(), wide.parameters(), strict=True):
        assert mine.grad.dtype is mine.dtype
        torch.testing.assert_close(mine.grad.float(), other.grad, rtol=2**-6, atol=4e-2)


@pytest.mark.parametrize(("n_tokens", "native"), [(16, False), (32_768, True)])
def test_little_work_is_done_in_float32(n_tokens: int, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _, layer = pair((16, 16), "autocast")
    assert (layer.weight_values.numel() * n_tokens >= 12_000_000) is native
    dtypes = []
    multiply = layer._multiply
    monkeypatch.setattr(
        layer,
        "_multiply",
        lambda x, values, bias: (dtypes.append(values.dtype), multiply(x, values, bias))[1],
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(n_tokens, 100))
    assert y.dtype is torch.bfloat16
    assert dtypes == ([torch.bfloat16] if native else [])


def test_strides_of_any_kind() -> None:
    layer, _ = pair((16, 16), "parameters")
    x = torch.randn(40, 100).bfloat16()
    for view in (x.T.contiguous().T, torch.stack([x, x], -1)[..., 0], x[:1].expand(40, 100), x[::2]):
        assert torch.equal(layer(view), layer(view.contiguous()))


def test_growth_under_autocast_sees_the_gradient() -> None:
    torch.manual_seed(0)
    layer, seen = BlockSparseLinear(96, 64, sparsity=0.5, block_shape=(16, 16)), []
    layer.gradient_hook = seen.append
    x, dy = torch.randn(50, 96).bfloat16(), torch.randn(50, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x.float()).backward(dy)
    (operands,), G = seen, torch.empty(64, 96)
    operands.to(torch.float32).add_rows(0, G, 0.0)
    torch.testing.assert_close(G, dy.float().T @ x.float())
    layer.gradient_hook = None
    layer.zero_grad()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    algorithm = RigL(update_freq=1, drop_fraction=0.5)
    algorithm.attach(layer, optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x.float()).backward(dy)
    optimizer.step()
    assert not algorithm.last_update[0].skipped
    assert layer.weight_values.dtype is torch.float32


def test_a_compiled_model_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_layer, "pays", lambda n_weights, n_tokens: True)
    layer, _ = pair((16, 16), "autocast")
    x = torch.randn(40, 100)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(compiled, expected)
