"""Every way to compute a product gives the dense layer's numbers, and says when and why it is taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from sparselab import SparseLinear, memory_report
from sparselab.kernels.cpu.csr.skinny import MOST_TOKENS
from sparselab.kernels.cpu.csr.skinny_dw import MOST_SAMPLED_TOKENS
from sparselab.nn.ops.cpu import csr, variants
from sparselab.nn.ops.cpu.variants import DENSE_FROM, choose
from tests.nn.layers.test_linear import check_gradients


@pytest.mark.parametrize(
    ("operation", "tokens", "density", "name"),
    [
        ("forward", 1, 0.1, "skinny"),
        ("forward", MOST_TOKENS, 1.0, "skinny"),
        ("forward", MOST_TOKENS + 1, 0.1, "tiles"),
        ("forward", MOST_TOKENS + 1, 1.0, "tiles"),
        ("forward", 2048, 1.0, "dense blocks"),
        ("input_grad", MOST_TOKENS, 1.0, "skinny"),
        ("input_grad", MOST_TOKENS + 1, 1.0, "tiles"),
        ("values_grad", MOST_SAMPLED_TOKENS, 0.1, "skinny"),
        ("values_grad", MOST_SAMPLED_TOKENS + 1, 0.1, "tiles"),
        ("values_grad", 2048, 0.9, "dense blocks"),
    ],
)
def test_the_rule_and_its_reason(operation: str, tokens: int, density: float, name: str) -> None:
    variant = choose(operation, tokens, density)
    assert (variant.operation, variant.name) == (operation, name)
    told = str(tokens) if "token" in variant.reason else f"{DENSE_FROM[operation]:.2f}"
    assert told in variant.reason


def test_a_layer_tells_its_variant() -> None:
    assert SparseLinear(30, 20, sparsity=0.9).variant(2048).name == "tiles"
    assert SparseLinear(30, 20, sparsity=0.1).variant(2048, "values_grad").name == "dense blocks"
    with pytest.raises(ValueError, match=r"operation must be one of forward, .*, got 'backward'"):
        SparseLinear(30, 20).variant(2048, "backward")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dense_from", [0.0, 2.0], ids=["dense blocks", "tiles"])
@pytest.mark.parametrize("block_bytes", [1, 4096, 1 << 20])
def test_output_and_gradients_whatever_the_variant(
    dense_from: float, bias: bool, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "_DENSE_TOKENS", 1)
    monkeypatch.setattr(csr, "_BLOCK_BYTES", block_bytes)
    torch.manual_seed(0)
    layer = SparseLinear(37, 21, bias, sparsity=0.3)
    for operation in DENSE_FROM:
        monkeypatch.setitem(DENSE_FROM, operation, dense_from)
        assert layer.variant(70, operation).name == ("tiles" if dense_from else "dense blocks")
    x = torch.randn(70, 37).T.contiguous().T.requires_grad_()
    y, dy = layer(x), torch.randn(70, 21)
    y.backward(dy)
    check_gradients(layer, x, y, dy)


def test_a_layer_without_outputs_gives_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(70, 5, requires_grad=True)
    SparseLinear(5, 0)(x).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("tokens", [1, 9, 70])
@pytest.mark.parametrize("sparsity", [0.9, 0.2])
def test_bfloat16_is_float32_arithmetic_on_rounded_weights(tokens: int, sparsity: float) -> None:
    layer = SparseLinear(40, 30, sparsity=sparsity).to(torch.bfloat16)
    x = torch.randn(tokens, 40, dtype=torch.bfloat16)
    wide = SparseLinear(40, 30, sparsity=sparsity)
    wide.load_state_dict({name: tensor.float() if tensor.is_floating_point() else tensor
                          for name, tensor in layer.state_dict().items()})  # fmt: skip
    with torch.inference_mode():
        assert torch.equal(layer(x), wide(x.float()).to(torch.bfloat16))
    narrow, full = x.clone().requires_grad_(), x.float().requires_grad_()
    dy = torch.randn(tokens, 30, dtype=torch.bfloat16)
    layer(narrow).backward(dy)
    wide(full).backward(dy.float())

    def rounded(gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        return gradient.to(torch.bfloat16)

    assert torch.equal(rounded(narrow.grad), rounded(full.grad))
    assert torch.equal(rounded(layer.weight_values.grad), rounded(wide.weight_values.grad))


def test_a_weight_in_bfloat16_is_four_bytes() -> None:
    layer = SparseLinear(400, 300, bias=False, sparsity=0.9).to(torch.bfloat16)
    assert memory_report(layer).weight_bytes == 4 * layer.nnz + 8 * 301


def test_the_topology_of_a_bfloat16_layer_cannot_change() -> None:
    none = torch.empty(0, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"values must be float32 or float64 .*, got bfloat16"):
        SparseLinear(40, 30).to(torch.bfloat16).rewrite(none, none)


@pytest.mark.parametrize("tokens", [1, 3, 16, 70])
def test_the_short_way_without_gradients_gives_the_same_bits(tokens: int) -> None:
    layer = SparseLinear(40, 30, sparsity=0.8)
    x = torch.randn(2, tokens, 40)[0]
    with torch.no_grad():
        short = layer(x)
    assert not short.requires_grad
    assert torch.equal(short, layer(x).detach())
    assert torch.equal(short, layer(x.T.contiguous().T).detach())


def test_a_tracer_sees_the_operator_even_without_gradients() -> None:
    layer = SparseLinear(40, 30, sparsity=0.8)
    with torch.no_grad():
        traced = make_fx(lambda x: layer(x))(torch.randn(5, 40))
    assert "sparselab.linear" in traced.code


@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_a_sign_that_is_still_to_be_turned_is_turned(tokens: int) -> None:
    layer = SparseLinear(40, 30, sparsity=0.8)
    x = torch.randn(tokens, 40, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.resolve_neg()))
