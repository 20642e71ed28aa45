"""Subclasses of layers that can be made sparse: swapped if only made otherwise, else left and listed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparselab import (
    SparseLinear,
    SparseMultiheadAttention,
    densify,
    plan_sparsify,
    sparsify,
)


def sparsities(model: nn.Module) -> dict[str, float]:
    return {name: round(each.sparsity, 2) for name, each in model.named_modules() if hasattr(each, "nnz")}


def planned(model: nn.Module, rules: Any, **options: Any) -> dict[str, float]:
    return {each.name: round(each.sparsity, 2) for each in plan_sparsify(model, rules, **options).layers}


class Zeroed(nn.Linear):
    """Made, reset and printed otherwise, as models of other libraries have them."""

    kind: str

    def __init__(self, size: int) -> None:
        super().__init__(size, size)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.bias)

    def extra_repr(self) -> str:
        return "zeroed"


class Twice(Zeroed):
    pass


class Mixed(Zeroed):
    def __init__(self) -> None:
        super().__init__(4)
        self.adapter = nn.Linear(4, 4)


class Loud:
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Loaded(nn.Linear):
    def _load_from_state_dict(self, *given: Any) -> None:
        raise NotImplementedError


class Marked(nn.Linear):
    scale = 2.0


class Extended(nn.Linear):
    def merge(self) -> None:
        """More than a linear layer can."""


class Attention(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(4, 2, bias=False)


@pytest.mark.parametrize("make", [lambda: Zeroed(4), lambda: Twice(4)], ids=["subclass", "of a subclass"])
def test_a_subclass_that_is_only_made_otherwise_is_swapped(make: Any) -> None:
    model = nn.Sequential(make())
    with torch.no_grad():
        model[0].weight.normal_()
    x = torch.randn(3, 4)
    expected, weight = model(x), model[0].weight
    for key in ("0", "*", nn.Linear, Zeroed):
        assert planned(model, {key: 0.5}) == {"0": 0.5}
    sparsify(model, 0.0, init="magnitude")
    assert type(model[0]) is SparseLinear
    torch.testing.assert_close(model(x), expected)
    assert type(densify(model)[0]) is nn.Linear
    assert torch.equal(model[0].weight, weight)


def test_an_attention_that_is_only_made_otherwise_is_swapped() -> None:
    model = nn.ModuleList([Attention()])
    x = torch.randn(3, 1, 4)
    expected = model[0](x, x, x)[0]
    sparsify(model, 0.0, init="magnitude")
    assert type(model[0]) is SparseMultiheadAttention
    torch.testing.assert_close(model[0](x, x, x)[0], expected)
    assert type(densify(model)[0]) is nn.MultiheadAttention


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Mixed, "has the module adapter"),
        (lambda: type("Mixin", (Loud, Zeroed), {})(4), "is of class Mixin"),
        (lambda: Loaded(4, 4), "is of class Loaded"),
        (lambda: Marked(4, 4), "is of class Marked"),
        (lambda: Extended(4, 4), "is of class Extended"),
        (lambda: type("Asked", (nn.Linear,), {"__getattr__": nn.Linear.__getattr__})(4, 4), "of class Asked"),
    ],
)
def test_a_subclass_that_may_be_more_is_left(make: Any, reason: str) -> None:
    model = nn.ModuleDict({"own": make(), "fc": nn.Linear(4, 4)})
    (left,) = plan_sparsify(
        model, {"*.adapter": None, "*": 0.5} if hasattr(model["own"], "adapter") else 0.5
    ).left
    assert left.name == "own"
    assert reason in left.reason


def test_the_output_projection_belongs_to_its_attention() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, x, x)[0]

    model = nn.ModuleDict({"attn": Own(4, 2), "fc": nn.Linear(4, 4)})
    plan = plan_sparsify(model, 0.5)
    assert [(each.name, each.parameters) for each in plan.left] == [("attn", 80)]
    assert (plan.parameters_swapped, plan.parameters_left, plan.parameters_elsewhere) == (20, 80, 0)
