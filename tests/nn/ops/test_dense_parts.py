"""Layers in bfloat16 by dense parts, which the CPU's matrix unit multiplies, against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sparselab import BlockSparseLinear, FanInLinear, SparseLinear
from sparselab.nn.ops.cpu import csr, dense_parts
from sparselab.nn.ops.cpu.dense_parts import takes_gradient, takes_product

BF16, F64 = torch.bfloat16, torch.float64
KINDS: dict[str, Callable[..., Any]] = {
    "single": partial(SparseLinear, sparsity=0.8),
    "fan-in": partial(FanInLinear, sparsity=0.8),
    "4x4": partial(BlockSparseLinear, sparsity=0.8, block_shape=(4, 4)),
    "8x1": partial(BlockSparseLinear, sparsity=0.8, block_shape=(8, 1)),
}
SINGLE = "single", "fan-in"
every_kind = pytest.mark.parametrize("kind", KINDS)
needs_unit = pytest.mark.skipif(
    not dense_parts._TORCH_HAS_UNIT, reason="this CPU has no AMX for bfloat16, or may not use it"
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the unit computed, which takes work of any size here."""
    seen: list[str] = []
    monkeypatch.setattr(dense_parts, "_LEAST_WORK", 0)
    for module, name in ((dense_parts, "sample_connections"), (csr, "expand_rows")):
        function = getattr(module, name)

        def call(*args: Any, function: Any = function, name: str = name) -> Any:
            seen.append(name)
            return function(*args)

        monkeypatch.setattr(module, name, call)
    return seen


def tokens(dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(400, 96).to(dtype), torch.randn(400, 64).to(BF16)


def results(layer: Any, x: Tensor, dy: Tensor) -> list[Any]:
    """The output and every gradient."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", BF16, enabled=layer.weight_values.dtype is not BF16):
        y = layer(x)
    y.backward(dy)
    return [y.detach(), x.grad, layer.weight_values.grad, layer.bias.grad]


def assert_near(found: Tensor, exact: Tensor, terms: Tensor) -> None:
    """Within the rounding of the result, and of sums in float32 of terms of these magnitudes."""
    rounding = 2.0**-8 if found.dtype is BF16 else 0.0
    assert bool(((found.to(F64) - exact).abs() <= rounding * exact.abs() + 2.0**-18 * terms).all())


def spread_out(layer: Any, values: Tensor) -> Tensor:
    """The dense matrix with these at the connections."""
    twin = copy.deepcopy(layer)
    twin.weight_values.data.copy_(values)
    weight: Tensor = twin.to_dense().weight.detach().to(values.dtype)
    return weight


@needs_unit
@every_kind
@pytest.mark.parametrize(
    ("how", "dtype"), [("autocast", BF16), ("autocast", torch.float32), ("parameters", BF16)]
)
def test_outputs_and_gradients(kind: str, how: str, dtype: torch.dtype, calls: list[str]) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind](96, 64)
    layer = layer.to(BF16) if how == "parameters" else layer
    x, dy = tokens(dtype)
    y, dx, dvalues, dbias = results(layer, x, dy)
    assert calls == (["expand_rows"] * 2 if kind in SINGLE else []) + ["sample_connections"]
    assert [each.dtype for each in (y, dx, dvalues)] == [BF16, dtype, layer.weight_values.dtype]
    dense = layer.to_dense()
    W, b = (each.detach().to(BF16).to(F64) for each in (dense.weight, dense.bias))
    X, DY = x.to(BF16).to(F64), dy.to(F64)
    if kind in SINGLE:
        assert_near(y, X @ W.T + b, X.abs() @ W.abs().T + b.abs())
        assert_near(dx.to(BF16), DY @ W, DY.abs() @ W.abs())
    mask = spread_out(layer, torch.ones_like(dvalues)).to(F64)
    assert_near(spread_out(layer, dvalues), mask * (DY.T @ X), DY.abs().T @ X.abs())
    assert_near(dbias, DY.sum(0), DY.abs().sum(0))


@needs_unit
def test_a_matrix_of_several_parts(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = KINDS["single"](96, 64)
    whole = results(layer, *tokens())
    calls.clear()
    monkeypatch.setattr(csr, "_BLOCK_BYTES", 2000)
    parts = results(layer, *tokens())
    assert len(calls) > 3
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)


@needs_unit
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_pass_as_in_dense(bad: float, calls: list[str]) -> None:
    layer = KINDS["single"](96, 64)
    x, dy = tokens()
    x[3, 5] = dy[8, 7] = bad
    y, dx, dvalues, dbias = results(layer, x, dy)
    token = torch.arange(400)
    assert torch.equal(y.isfinite().all(1), token != 3)
    assert torch.equal(dx.isfinite().all(1), token != 8)
    rows, columns = layer.positions() // 96, layer.positions() % 96
    assert torch.equal(dvalues.flatten().isfinite(), (rows != 7) & (columns != 5))
    assert torch.equal(dbias.isfinite(), torch.arange(64) != 7)
    assert calls == ["expand_rows"] * 2 + ["sample_connections"]


@needs_unit
@every_kind
@pytest.mark.parametrize("turned", [False, True])
def test_tokens_of_any_strides(kind: str, turned: bool, calls: list[str]) -> None:
    layer = KINDS[kind](96, 64)
    given = tokens()
    if turned:
        other = [each.T.contiguous().T for each in given]
    else:
        other = [torch.stack([each] * 2, -1)[..., 0] for each in given]
    for a, b in zip(results(layer, *other), results(layer, *given), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)
    assert calls.count("sample_connections") == 2


@needs_unit
def test_what_does_not_repay_it_is_computed_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, single = (3072, 768), (1, 1)
    assert takes_product(shape, 0.1, 2048)
    assert not takes_product(shape, 0.1, 100)
    assert not takes_product(shape, 0.03, 2048)
    assert not takes_product((64, 64), 0.1, 2048)
    assert not takes_product((3072, 784), 0.1, 2048)
    assert takes_gradient(single, (3072, 784), 0.1, 2048)
    assert takes_gradient((4, 4), shape, 0.1, 2048)
    assert not takes_gradient((3, 5), shape, 0.1, 2048)
    assert not takes_gradient((4, 4), shape, 0.05, 2048)
    assert not takes_gradient(single, shape, 0.1, 10)
    torch._C._set_mkldnn_enabled(False)  # type: ignore[attr-defined]
    try:
        assert not takes_product(shape, 0.1, 2048)
    finally:
        torch._C._set_mkldnn_enabled(True)  # type: ignore[attr-defined]


@every_kind
def test_without_a_unit_nothing_is_asked_of_it(
    kind: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_HAS_UNIT", "_TORCH_HAS_UNIT"):
        monkeypatch.setattr(dense_parts, name, False)
    results(KINDS[kind](96, 64), *tokens())
    assert not calls
