"""SparseLinear against a dense float64 layer: outputs, every gradient, and life inside torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparselab import SparseLinear
from tests.oracle import assert_close, product

SIZES = (1, 7, 8, 9, 33, 64, 129)
LEADING = ((), (1,), (7,), (65,), (0,), (3, 5), (2, 1, 4), (2, 0, 3))


def dense_weight(layer: SparseLinear) -> Tensor:
    return layer.to_dense().weight.detach()


def live_mask(layer: SparseLinear) -> np.ndarray[Any, Any]:
    mask = np.zeros(layer.shape, np.bool_)
    mask.reshape(-1)[layer.positions().numpy()] = True
    return mask


def check_gradients(layer: SparseLinear, x: Tensor, y: Tensor, dy: Tensor) -> None:
    """Compare output and gradients, already computed, with the oracle."""
    W, live, dtype = dense_weight(layer).numpy(), live_mask(layer), layer.weight_values.detach().numpy().dtype
    tokens, upstream = x.detach().reshape(-1, layer.in_features), dy.reshape(-1, layer.out_features)
    bias = None if layer.bias is None else layer.bias.detach().numpy()
    assert y.shape == (*x.shape[:-1], layer.out_features)
    rows = y.detach().reshape(-1, layer.out_features)
    assert_close(rows.numpy().T, product(W, tokens.numpy().T, live=live, bias=bias), dtype)
    assert x.grad is not None
    assert x.grad.shape == x.shape
    dx = x.grad.reshape(-1, layer.in_features).numpy().T
    assert_close(dx, product(W.T, upstream.numpy().T, live=live.T), dtype)
    dw = product(upstream.numpy().T, tokens.numpy())
    at = layer.positions().numpy()
    shape = layer.shape
    exact = [np.broadcast_to(part, shape).reshape(-1)[at] for part in dw]
    assert layer.weight_values.grad is not None
    assert_close(layer.weight_values.grad.reshape(-1).numpy(), type(dw)(*exact), dtype)
    if layer.bias is not None:
        assert layer.bias.grad is not None
        ones = np.ones((1, len(tokens)))
        sums = product(ones, upstream.numpy())
        assert_close(layer.bias.grad.numpy()[None], sums, dtype)


@given(
    inputs=st.sampled_from(SIZES),
    outputs=st.sampled_from(SIZES),
    leading=st.sampled_from(LEADING),
    sparsity=st.sampled_from((0.0, 0.5, 0.9, 0.99, 1.0)),
    bias=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    seed=st.integers(0, 2**31),
)
def test_output_and_every_gradient_equal_the_dense_layer(
    inputs: int,
    outputs: int,
    leading: tuple[int, ...],
    sparsity: float,
    bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    layer = SparseLinear(inputs, outputs, bias, sparsity=sparsity, dtype=dtype)
    x = torch.randn(*leading, inputs, dtype=dtype, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    check_gradients(layer, x, y, dy)


def test_the_gradient_check_refuses_wrong_answers() -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    x = torch.randn(6, 20, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    check_gradients(layer, x, y, dy)
    for parameter in (x, layer.weight_values, layer.bias):
        right = parameter.grad.clone()
        parameter.grad.view(-1)[3] += 1e-3
        with pytest.raises(AssertionError):
            check_gradients(layer, x, y, dy)
        parameter.grad = right
    with pytest.raises(AssertionError):
        check_gradients(layer, x, y + 1e-3, dy)


LAYOUTS = {
    "transposed": lambda: torch.randn(40, 6).T,
    "expanded": lambda: torch.randn(1, 40).expand(6, 40),
    "every second": lambda: torch.randn(12, 80)[::2, ::2],
    "offset": lambda: torch.randn(500)[3:243].view(6, 40),
    "inner dimensions swapped": lambda: torch.randn(2, 40, 3).transpose(1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_layouts(layout: str) -> None:
    layer = SparseLinear(40, 12, sparsity=0.6)
    x = LAYOUTS[layout]().requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    check_gradients(layer, x, y, dy)


@pytest.mark.parametrize(
    "reduce",
    [torch.sum, lambda y: y.T.reshape(-1)[::3].sum(), lambda y: (y.T @ torch.randn(6, 2)).sum()],
    ids=["expanded", "strided", "transposed"],
)
def test_upstream_gradient_layouts(reduce: Any) -> None:
    layer = SparseLinear(40, 12, sparsity=0.6)
    x = torch.randn(6, 40, requires_grad=True)
    y = layer(x)
    y.retain_grad()
    reduce(y).backward()
    check_gradients(layer, x, y, y.grad)


def test_gradcheck() -> None:
    layer = SparseLinear(9, 7, sparsity=0.4, dtype=torch.float64)
    x = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(layer, {"weight_values": values, "bias": bias}, (x,))
        return result

    assert torch.autograd.gradcheck(call, (x, layer.weight_values, layer.bias))


class CountOperators(TorchDispatchMode):
    """Names of this package's operators, in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sparselab":
            self.called.append(func._schema.name.removeprefix("sparselab::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("x_needs", "values_need", "expected"),
    [
        (True, True, ["linear", "linear_input_grad", "linear_values_grad"]),
        (False, True, ["linear", "linear_values_grad"]),
        (True, False, ["linear", "linear_input_grad"]),
        (False, False, ["linear"]),
    ],
)
def test_only_the_gradients_asked_for_are_computed(
    x_needs: bool, values_need: bool, expected: list[str]
) -> None:
    layer = SparseLinear(20, 10)
    layer.weight_values.requires_grad_(values_need)
    with CountOperators() as operators:
        layer(torch.randn(4, 20, requires_grad=x_needs)).sum().backward()
    assert operators.called == expected
    assert (layer.weight_values.grad is not None) == values_need


def test_no_grad_makes_no_gradient_plans() -> None:
    layer = SparseLinear(20, 10)
    with torch.no_grad():
        assert layer(torch.randn(40, 20, requires_grad=True)).requires_grad is False
    inference_only = layer.plan_bytes()
    layer(torch.randn(40, 20, requires_grad=True)).sum().backward()
    assert 0 < inference_only < layer.plan_bytes()


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 3), (3, 0), (0, 0)])
def test_empty_sizes(inputs: int, outputs: int) -> None:
    layer = SparseLinear(inputs, outputs)
    x = torch.randn(2, inputs, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (2, outputs)
    assert x.grad.shape == x.shape


def test_the_same_seed_draws_the_same_layer() -> None:
    layers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        layers.append(SparseLinear(50, 40))
    assert torch.equal(layers[0].positions(), layers[1].positions())
    assert torch.equal(layers[0].weight_values, layers[1].weight_values)
    assert not torch.equal(layers[0].positions(), layers[2].positions())


def test_weights_fill_the_range_of_their_row_s_fan_in() -> None:
    layer = SparseLinear(400, 300, sparsity=0.9)
    fan_in = torch.diff(layer.indptr).clamp(min=1)
    scaled = (
        layer.weight_values.detach().flatten()
        * torch.repeat_interleave(fan_in, torch.diff(layer.indptr)).sqrt()
    )
    assert scaled.abs().max() <= 1
    assert scaled.abs().max() > 0.99
    # The mean of n uniform draws has standard deviation 1 / sqrt(3 n); six of them are never exceeded here.
    assert abs(scaled.mean()) < 6 / (3 * layer.nnz) ** 0.5
    assert (layer.bias.detach() * fan_in.sqrt()).abs().max() <= 1
