"""Linear layers under autocast in bfloat16: the bits of products in float32 whose operands are cast."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparselab import BlockSparseLinear, FanInLinear, RigL, SparseConv2d, SparseLinear
from sparselab.nn.layers import linear as _linear
from sparselab.nn.ops import casting
from sparselab.nn.ops.casting import casting_topology as casts
from tests.shared import usual

BF16 = torch.bfloat16
KINDS: dict[str, Callable[..., Any]] = {
    "single": partial(SparseLinear, sparsity=0.8),
    "fan-in": partial(FanInLinear, sparsity=0.8),
    "4x4": partial(BlockSparseLinear, sparsity=0.5, block_shape=(4, 4)),
    "1x8": partial(BlockSparseLinear, sparsity=0.5, block_shape=(1, 8)),
    "8x1": partial(BlockSparseLinear, sparsity=0.5, block_shape=(8, 1)),
    "dense": partial(SparseLinear, sparsity=0.1),
    "dense 4x4": partial(BlockSparseLinear, sparsity=0.1, block_shape=(4, 4)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def without_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear, "casting_topology", lambda *operands: None)


def results(layer: Any, x: Tensor, dy: Tensor) -> list[Tensor | None]:
    """The output and every gradient."""
    x = x.clone().requires_grad_() if x.is_contiguous() else x.detach().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", BF16):
        y = layer(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(each.grad for each in layer.parameters())]


def assert_same(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a is not None
        assert b is not None
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@every_kind
@pytest.mark.parametrize("bias", [True, usual(False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("shape", [(1, 61), (17, 61), (70, 61), (200, 61), (3, 30, 61), (0, 61), (61,)])
def test_the_bits_are_those_of_casts(
    kind: str, bias: bool, dtype: torch.dtype, shape: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind](61, 43, bias=bias)
    x, dy = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], 43).to(BF16)
    with torch.autocast("cpu", BF16):
        assert casts(x, layer.weight_values, layer.bias, layer)
    ours = results(layer, x, dy)
    without_fusion(monkeypatch)
    assert_same(ours, results(layer, x, dy))


@every_kind
def test_any_strides_and_numbers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind](61, 43)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1e-39, -3e-41, 3e38, 1.00390625])
    x, dy = torch.randn(140, 61), torch.randn(140, 43).to(BF16)
    x[7, :8], x[100, 20:28] = odd, odd
    dy[7, :8], dy[100, 20:28] = odd.to(BF16), odd.to(BF16)
    given = [
        (x.to(BF16), dy), (x.to(BF16).T.contiguous().T, dy.T.contiguous().T),
        (torch.stack([x.to(BF16)] * 2, -1)[..., 0], dy), (x, torch.stack([dy] * 2, -1)[..., 0]),
    ]  # fmt: skip
    ours = [results(layer, *each) for each in given]
    without_fusion(monkeypatch)
    for found, each in zip(ours, given, strict=True):
        assert_same(found, results(layer, *each))


def test_numbers_are_rounded_to_nearest_even() -> None:
    layer = SparseLinear(1, 1, sparsity=0.0, bias=False)
    layer.weight_values.data.fill_(1)
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0x00008000, -0x7FFF8000])
    x = bits.to(torch.int32).view(torch.float32).repeat(20)[:, None]  # more than repay a tile
    with torch.autocast("cpu", BF16), torch.no_grad():
        assert torch.equal(layer(x), x.to(BF16))


def test_what_is_not_cast_goes_the_old_way() -> None:
    layer, x = SparseLinear(20, 10), torch.randn(3, 20)
    values, bias = layer.weight_values, layer.bias
    assert casts(x, values, bias, layer)
    for other in (x.double(), x.half(), torch.randn(3, 21), torch.tensor(1.0), x.to_sparse(), [1.0]):
        assert not casts(other, values, bias, layer)
    assert not casts(x, values.double(), bias, layer)
    assert not casts(x, values[:-1], bias, layer)
    assert bias is not None
    assert not casts(x, values, bias.double(), layer)
    with torch.autocast("cpu", BF16):
        assert layer(x.double()).dtype is BF16
        assert layer.double()(x).dtype is torch.float64
        with pytest.raises(RuntimeError, match="21"):
            SparseLinear(20, 10)(torch.randn(3, 21))
    with torch.autocast("cpu", torch.float16):
        assert SparseLinear(20, 10)(x).dtype is torch.float16


@every_kind
def test_second_derivatives(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind](31, 13)

    def penalty() -> list[Tensor]:
        x = torch.linspace(-1, 1, 70 * 31).view(70, 31).to(BF16).requires_grad_()
        with torch.autocast("cpu", BF16):
            y = layer(x)
        (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(dx.float().square().sum(), [x, layer.weight_values]))

    ours = penalty()
    without_fusion(monkeypatch)
    for a, b in zip(ours, penalty(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_topology_that_changed_before_the_backward_pass_is_refused() -> None:
    layer, x = SparseLinear(20, 10), torch.randn(80, 20)
    with torch.autocast("cpu", BF16):
        y = layer(x)
    layer.rewrite(torch.arange(2), torch.empty(0, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="topology needed for gradient computation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", ["single", "4x4"])
def test_growth_by_gradient_sees_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    first = nn.Sequential(KINDS[kind](40, 64), nn.ReLU(), KINDS[kind](64, 24))
    second = copy.deepcopy(first)
    x = torch.randn(70, 40)

    def train(model: Any) -> list[Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        RigL(update_freq=2, stop=9).attach(model, optimizer)
        for _ in range(8):
            optimizer.zero_grad()
            with torch.autocast("cpu", BF16):
                y = model(x)
            y.float().square().mean().backward()
            optimizer.step()
        return list(model.state_dict().values())

    ours = train(first)
    without_fusion(monkeypatch)
    theirs = train(second)
    assert all(map(torch.equal, ours, theirs))
    assert not torch.equal(ours[2], KINDS[kind](40, 64).state_dict()["indices"])


def test_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(_linear, "cast_linear", lambda *each: taken.append(1) or casting.cast_linear(*each))
    with torch.autocast("cpu", BF16):
        SparseLinear(20, 10)(torch.randn(80, 20))
        SparseLinear(20, 10)(torch.randn(2, 40, 20))
    SparseLinear(20, 10)(torch.randn(80, 20))
    assert taken == [1, 1]


@pytest.mark.parametrize("kind", ["single", "4x4"])
@pytest.mark.parametrize("which", ["x", "values"])
@pytest.mark.parametrize("how", ["fewer", "narrow", "flat", "double"])
def test_what_hooks_give_back_must_be_what_was_saved(kind: str, which: str, how: str) -> None:
    layer = KINDS[kind](61, 43)
    x = torch.randn(90, 61, requires_grad=True)
    spoil: dict[str, Callable[[Tensor], Tensor]] = {
        "fewer": lambda t: t[: len(t) // 2].clone(),
        "narrow": lambda t: t[:, :1].clone() if t.ndim == 2 else t[:2].clone(),
        "flat": lambda t: t.reshape(-1), "double": lambda t: t.double(),
    }  # fmt: skip

    def unpack(saved: Tensor) -> Tensor:
        return spoil[how](saved) if (saved.ndim == 2) == (which == "x") else saved

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack), torch.autocast("cpu", BF16):
        y = layer(x)
    with pytest.raises(RuntimeError, match=rf"{which} must be torch.float32 of shape"):
        y.sum().backward()


@every_kind
def test_a_backward_pass_under_autocast_computes_in_float32(kind: str) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind](61, 43)
    found = []
    for inside in (False, True):
        layer.zero_grad()
        x = torch.linspace(-1, 1, 150 * 61).view(150, 61).requires_grad_()
        y = layer(x)
        with torch.autocast("cpu", BF16, enabled=inside):
            y.square().sum().backward()
        found.append([x.grad, *(each.grad for each in layer.parameters())])
    assert_same(*found)


def test_so_does_a_second_derivative_of_a_convolution() -> None:
    layer, found = SparseConv2d(8, 6, 3, sparsity=0.2), []
    for inside in (False, True):
        x = torch.linspace(-1, 1, 4 * 8 * 14 * 14).view(4, 8, 14, 14).requires_grad_()
        dy = torch.linspace(1, -1, 4 * 6 * 12 * 12).view(4, 6, 12, 12).requires_grad_()
        (dx,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
        with torch.autocast("cpu", BF16, enabled=inside):
            found.append(list(torch.autograd.grad(dx.square().sum(), [dy, layer.weight_values])))
    assert_same(*found)
