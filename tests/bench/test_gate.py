"""The gate: right contenders pass, wrong outputs and wrong gradients do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparselab import FanInLinear, SparseLinear
from sparselab.bench.contenders import linear
from sparselab.bench.contenders.gate import Gate, WrongResultError
from sparselab.bench.contenders.linear import CONTENDERS, Case, run_case


def batch(layer: SparseLinear, tokens: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, layer.in_features), torch.randn(tokens, layer.out_features)


@pytest.mark.parametrize("shape", [(16, 24), (2, 2), (1, 40)])
@pytest.mark.parametrize("name", CONTENDERS)
def test_right_contenders_pass(name: str, shape: tuple[int, int]) -> None:
    if name == "dense bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bfloat16 instructions")
    layer = FanInLinear(*shape, sparsity=0.9).to_sparse()
    gate = Gate(layer, *batch(layer))
    module = CONTENDERS[name].make(layer)
    gate.check(module, CONTENDERS[name].tolerance, gradients=False)
    gate.check(module, CONTENDERS[name].tolerance, gradients=True)
    assert all(parameter.grad is None for parameter in module.parameters())


class Altered(nn.Module):
    """A dense layer whose input or output goes through a function."""

    def __init__(
        self,
        layer: SparseLinear,
        x: Callable[[Tensor], Tensor] = lambda x: x,
        y: Callable[[Tensor], Tensor] = lambda y: y,
    ) -> None:
        super().__init__()
        self.linear = layer.to_dense()
        self.x, self.y = x, y

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.y(self.linear(self.x(x)))
        return y


def double_gradient(x: Tensor) -> Tensor:
    """The same value with twice the gradient."""
    return 2 * x - x.detach()


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda y: 1.001 * y, r"output of Altered is off by \d\.\de-0[34] of the largest, 1e-05 allowed"),
        (lambda y: y * torch.tensor(float("nan")), "output of Altered is off by nan"),
        (lambda y: y[:-1], r"output of Altered must have shape \(8, 24\), got shape \(7, 24\)"),
    ],
)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_wrong_output_is_refused(alter: Callable[[Tensor], Tensor], message: str, gradients: bool) -> None:
    layer = SparseLinear(16, 24)
    with pytest.raises(WrongResultError, match=message):
        Gate(layer, *batch(layer)).check(Altered(layer, y=alter), 1e-5, gradients)


def test_wrong_gradients_are_refused() -> None:
    layer = SparseLinear(16, 24)
    gate = Gate(layer, *batch(layer))
    right, of_input = Altered(layer), Altered(layer, x=double_gradient)
    of_weight, of_bias, frozen = Altered(layer), Altered(layer), Altered(layer)
    of_weight.linear.weight.register_hook(lambda gradient: 1.001 * gradient)
    of_bias.linear.bias.register_hook(lambda gradient: 1.001 * gradient)
    frozen.linear.weight.requires_grad_(False)
    gate.check(right, 1e-5, gradients=True)
    for module, name in ((of_input, "input"), (of_weight, "live weights"), (of_bias, "bias")):
        gate.check(module, 1e-5, gradients=False)
        with pytest.raises(WrongResultError, match=f"gradient of the {name} of Altered is off"):
            gate.check(module, 1e-5, gradients=True)
    with pytest.raises(WrongResultError, match=r"gradient of the live weights .* got nothing"):
        gate.check(frozen, 1e-5, gradients=True)


def test_only_the_gradients_of_live_weights_count() -> None:
    layer = SparseLinear(16, 24)
    module = Altered(layer)
    live = torch.zeros(24 * 16, dtype=torch.bool)
    live[layer.positions()] = True
    module.linear.weight.register_hook(lambda gradient: gradient * live.view(24, 16))
    Gate(layer, *batch(layer)).check(module, 1e-5, gradients=True)


def test_a_wrong_contender_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        CONTENDERS, "wrong", linear.Contender(lambda layer: Altered(layer, x=double_gradient), 1e-5)
    )
    forward, both = run_case(
        Case(16, 24, 8, 0.9), ["forward", "forward + backward"], ["sparselab", "wrong"], 1, [1]
    )
    assert forward.median("wrong") is not None
    assert both.median("sparselab") is not None
    assert str(both.timings["wrong"]).startswith("refused: gradient of the input of Altered")
    assert both.median("wrong") is None
    assert both.ratio("wrong") is None


def test_a_contender_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(layer: SparseLinear) -> nn.Module:
        raise RuntimeError("not on this CPU\nand more")

    monkeypatch.setitem(CONTENDERS, "absent", linear.Contender(absent, 1e-5))
    (result,) = run_case(Case(16, 24, 8, 0.9), ["forward"], ["absent"], 1, [1])
    assert result.timings == {"absent": "cannot run: not on this CPU"}
    assert result.gflops is None


def test_a_constant_fan_in_takes_part_where_there_is_one() -> None:
    for case, timed in ((Case(20, 10, 4, 0.5), True), (Case(20, 10, 4, 0.955), False)):
        (result,) = run_case(case, ["forward + backward"], ["sparselab", "fan-in"], 1, [1])
        assert (result.median("fan-in") is not None) == timed
        assert timed or "equally many connections" in str(result.timings["fan-in"])
