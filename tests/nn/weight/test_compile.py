"""The weight of a sparse layer where torch traces: compiled, exported and symbolically traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselab import SparseLinear
from tests.nn.weight.rows import input_of, make, operand

COMPILED: dict[str, tuple[str, Callable[[Any, Tensor], Tensor]]] = {
    "F.linear": ("single", lambda layer, x: F.linear(x, layer.weight, layer.bias)),
    "blocks": ("blocks", lambda layer, x: F.linear(x, layer.weight, layer.bias)),
    "tied": ("single", lambda layer, x: F.linear(F.linear(x, layer.weight), layer.weight.T)),
    "@": ("single", lambda layer, x: x @ layer.weight.T),
    "left": ("single", lambda layer, x: layer.weight @ x.T),
    "matmul": ("single", lambda layer, x: torch.matmul(layer.weight, x.T)),
    "addmm": ("single", lambda layer, x: torch.addmm(layer.bias, x, layer.weight.t())),
    "dtype": (
        "single",
        lambda layer, x: F.linear(x.to(layer.weight.dtype), layer.weight) * layer.weight.shape[0],
    ),
    "conv_transpose2d": (
        "groups",
        lambda layer, x: F.conv_transpose2d(x.repeat(1, 2, 1, 1)[:, :6], layer.weight, groups=2),
    ),
    "conv2d": ("groups", lambda layer, x: F.conv2d(x, layer.weight, layer.bias, padding=1, groups=2)),
}


@pytest.mark.parametrize("form", COMPILED)
def test_compiled_in_one_graph(form: str) -> None:
    kind, compute = COMPILED[form]
    layer = make(kind)
    x = input_of(layer)
    torch._dynamo.reset()
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(compute(layer, x).square().sum(), (layer.weight_values, x))
    y = compiled(layer, x)
    torch.testing.assert_close(y, compute(layer, x))
    got = torch.autograd.grad(y.square().sum(), (layer.weight_values, x))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_compiled_operator_that_may_mean_two_things() -> None:
    layer = SparseLinear(6, 6, sparsity=0.5)
    x = torch.randn(6, 6)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="matmul must be written in place of @"):
        torch.compile(lambda x: layer.weight @ x, fullgraph=True, backend="eager")(x)
    for compute in (lambda x: layer.weight @ x, lambda x: x @ layer.weight):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(compute, backend="eager")(x), compute(x))
    exact = torch.compile(lambda x: torch.matmul(layer.weight, x), fullgraph=True, backend="eager")
    torch.testing.assert_close(exact(x), layer.weight @ x)


@pytest.mark.parametrize(
    "compute", [lambda w, x: x + w.norm(), lambda w, x: (x @ w.T) * w.sum(), lambda w, x: torch.abs(w)]
)
def test_compiled_refusals_are_clear(compute: Any) -> None:
    layer, x = make("single"), operand(3, 20)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"to_dense\(\)"):
        torch.compile(lambda x: compute(layer.weight, x), fullgraph=True, backend="eager")(x)


class Tied(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.layer.weight, self.layer.bias), self.layer.weight.T)


@pytest.mark.parametrize("strict", [True, False])
def test_exported(strict: bool) -> None:
    model, x = Tied(make("single")), operand(3, 20).detach()
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model(x))


def test_symbolically_traced() -> None:
    model, x = Tied(make("single")), operand(3, 20).detach()
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))
    with torch.no_grad():
        model.layer.weight.mul_(2)
    torch.testing.assert_close(traced(x), model(x))
