"""SparseLinear under autograd: graphs used twice, in-place edits, checkpoints, transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparselab import SparseLinear


def gradients(layer: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Gradients of a loss by x and by every parameter."""
    x = x.detach().requires_grad_()
    return list(torch.autograd.grad(call(x).square().sum(), [x, *layer.parameters()]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_autocast_gives_the_input_a_gradient_of_its_dtype(dtype: torch.dtype) -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    x = torch.randn(4, 20, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.square().sum().backward()
    wanted = gradients(layer, x.float(), lambda x: layer(x).bfloat16())
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, wanted[0].to(dtype))
    assert torch.equal(layer.weight_values.grad, wanted[1])
    with (
        pytest.raises(RuntimeError, match="input must have the dtype"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        layer(torch.zeros(4, 20, dtype=torch.int64))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    model = nn.Sequential(nn.Linear(20, 20), layer, nn.Tanh())
    x = torch.randn(4, 20, requires_grad=True)
    expected = gradients(model, x, model)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    actual = [x.grad, *(parameter.grad for parameter in model.parameters())]
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)


def test_saved_tensors_may_be_moved_away() -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    x = torch.randn(4, 20)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        moved = gradients(layer, x, layer)
    for got, wanted in zip(moved, gradients(layer, x, layer), strict=True):
        assert torch.equal(got, wanted)


def test_two_forward_passes_before_one_backward_pass() -> None:
    layer = SparseLinear(20, 10, sparsity=0.5, dtype=torch.float64)
    first, second = torch.randn(2, 4, 20, dtype=torch.float64).unbind()
    together = gradients(layer, first, lambda x: torch.cat([layer(x), layer(second)]))
    apart = gradients(layer, torch.cat([first, second]), layer)
    assert torch.equal(together[0], apart[0][:4])
    for got, wanted in zip(together[1:], apart[1:], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_graph_kept_gives_the_same_again() -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    loss = layer(torch.randn(4, 20)).square().sum()
    loss.backward(retain_graph=True)
    once = layer.weight_values.grad.clone()
    loss.backward()
    assert torch.equal(layer.weight_values.grad, 2 * once)


def test_the_layer_may_go_before_the_backward_pass() -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    weight = layer.to_dense().weight.detach()
    x = torch.randn(4, 20, requires_grad=True)
    loss = layer(x).sum()
    del layer
    loss.backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, 20))


def test_two_layers_may_share_their_parameters_and_buffers() -> None:
    layer, other = SparseLinear(20, 10, sparsity=0.5), SparseLinear(20, 10, sparsity=0.5)
    for name in ("weight_values", "bias", "indptr", "indices"):
        setattr(other, name, getattr(layer, name))
    x = torch.randn(4, 20)
    (layer(x) + other(x)).sum().backward()
    both = layer.weight_values.grad.clone()
    layer.zero_grad()
    (2 * layer(x)).sum().backward()
    torch.testing.assert_close(both, layer.weight_values.grad)


def test_trainability_can_be_switched_at_any_time() -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    x = torch.randn(4, 20)
    for values, bias in [(False, True), (True, False), (True, True), (False, False)]:
        layer.weight_values.requires_grad_(values)
        layer.bias.requires_grad_(bias)
        layer.zero_grad()
        y = layer(x)
        assert y.requires_grad == (values or bias)
        if values or bias:
            y.sum().backward()
        assert (layer.weight_values.grad is not None, layer.bias.grad is not None) == (values, bias)


EDITS: dict[str, Callable[[SparseLinear, Tensor], Any]] = {
    "input": lambda layer, x: x.mul_(2),
    "values": lambda layer, x: layer.weight_values.mul_(2),
    "columns": lambda layer, x: layer.indices.copy_(layer.indices.clone()),
    "rows": lambda layer, x: layer.indptr.copy_(layer.indptr.clone()),
    "loaded": lambda layer, x: layer.load_state_dict(SparseLinear(20, 10, sparsity=0.5).state_dict()),
    "drawn anew": lambda layer, x: layer.reset_parameters(),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_changed_between_forward_and_backward_is_refused(edit: str) -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    x = torch.randn(4, 20)
    loss = layer(x.requires_grad_() if edit != "input" else x).sum()
    with torch.no_grad():
        EDITS[edit](layer, x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_what_backward_reads_is_kept() -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    kept: list[tuple[int, ...]] = []
    x = torch.randn(4, 20, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        layer.requires_grad_(False)
        layer(x)
        assert (4, 20) not in kept
        kept.clear()
        layer.requires_grad_(True)
        layer(x.detach())
        assert kept == [(4, 20)], "neither the values nor the topology"


def test_vmap_computes_each_alone() -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    x, values = torch.randn(3, 4, 20), torch.randn(3, layer.nnz, 1, 1)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))

    def call(values: Tensor) -> Any:
        return torch.func.functional_call(layer, {"weight_values": values}, (x[0],))

    torch.testing.assert_close(torch.func.vmap(call)(values), torch.stack([call(each) for each in values]))


@pytest.mark.parametrize("flag", ["is_neg", "is_zero"])
def test_lazy_tensors_are_resolved(flag: str) -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    x = torch.randn(4, 20, requires_grad=True)
    upstream = torch.randn(4, 10, dtype=torch.complex64).conj().imag
    if flag == "is_zero":
        upstream = torch._efficientzerotensor(4, 10)
    else:
        assert upstream.is_neg()
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream.clone() @ layer.to_dense().weight)


def test_frozen_values_with_strides_are_read_right() -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    strided = torch.randn(layer.nnz, 2, 1)[:, :1]
    bias = torch.randn(1).expand(10)
    x = torch.randn(4, 20, requires_grad=True)
    y = torch.func.functional_call(layer, {"weight_values": strided, "bias": bias}, (x,))
    packed = {"weight_values": strided.clone(), "bias": bias.clone()}
    assert torch.equal(y, torch.func.functional_call(layer, packed, (x,)))
    (got,) = torch.autograd.grad(y.sum(), x)
    (wanted,) = torch.autograd.grad(torch.func.functional_call(layer, packed, (x,)).sum(), x)
    assert torch.equal(got, wanted)


def test_topologies_of_one_size_are_told_apart() -> None:
    layers = [SparseLinear(20, 10, sparsity=0.5) for _ in range(2)]
    parts = [{**dict(layer.named_parameters()), **dict(layer.named_buffers())} for layer in layers]
    assert [part["indices"]._version for part in parts] == [parts[0]["indices"]._version] * 2
    x = torch.randn(4, 20, requires_grad=True)
    for own, part in zip(layers, parts, strict=True):
        expected = gradients(own, x, own)
        own.zero_grad()
        y = torch.func.functional_call(layers[0], part, (x,))
        got = torch.autograd.grad(y.square().sum(), [x, *own.parameters()])
        for actual, wanted in zip(got, expected, strict=True):
            assert torch.equal(actual, wanted)


def test_columns_replaced_behind_the_buffer_are_noticed() -> None:
    layer = SparseLinear(20, 1, sparsity=0.75, bias=False)
    x = torch.randn(4, 20)
    layer(x)
    layer.indices.data = torch.arange(layer.nnz).to(torch.uint16)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
