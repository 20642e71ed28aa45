"""What a user adds to a layer never goes in silence: the tools refuse, or leave the layer and name it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparselab import (
    BlockSparseLinear,
    FanInLinear,
    MaskedConv2d,
    MaskedLinear,
    SparseConv2d,
    SparseLinear,
    SparseMultiheadAttention,
    densify,
    plan_sparsify,
    sparsify,
)
from sparselab.nn.layers.extras import extras, overridden


class Scaled(SparseLinear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Faithful(Scaled):
    def to_dense(self) -> nn.Linear:
        linear = super(Scaled, self).to_dense()
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.mul_(2)
        return linear


class Tagged(SparseLinear):
    """Says more of itself, and computes the same."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tagged"


class Double:
    """Put before any layer: twice its outputs."""

    def forward(self, *inputs: Tensor) -> Tensor:
        result: Tensor = super().forward(*inputs)  # type: ignore[misc]
        return 2 * result


LAYERS: dict[str, Callable[[type], Any]] = {
    "sparse": lambda of: type("Own", (of, SparseLinear), {})(8, 8),
    "fan-in": lambda of: type("Own", (of, FanInLinear), {})(8, 8, sparsity=0.5),
    "block": lambda of: type("Own", (of, BlockSparseLinear), {})(8, 8, block_shape=(2, 2), sparsity=0.5),
    "convolution": lambda of: type("Own", (of, SparseConv2d), {})(2, 2, 3),
    "masked": lambda of: type("Own", (of, MaskedLinear), {})(8, 8),
    "masked convolution": lambda of: type("Own", (of, MaskedConv2d), {})(2, 2, 3),
}


class Nothing:
    """Put before any layer: the same outputs."""


@pytest.mark.parametrize("kind", LAYERS)
def test_a_subclass_with_another_forward_is_not_made_dense(kind: str) -> None:
    layer = LAYERS[kind](Double)
    with pytest.raises(TypeError, match=r"Own.to_dense must be defined, because Own redefines forward"):
        layer.to_dense()
    model = nn.Sequential(nn.Identity(), layer, SparseLinear(8, 8))
    before = list(model)
    with pytest.raises(TypeError, match=r"1: Own\.to_dense must be defined"):
        densify(model)
    assert list(model) == before


@pytest.mark.parametrize("kind", LAYERS)
def test_a_subclass_that_changes_nothing_is_made_dense(kind: str) -> None:
    layer = LAYERS[kind](Nothing)
    assert type(densify(nn.Sequential(layer))[0]) in (nn.Linear, nn.Conv2d)


def test_the_input_of_the_review() -> None:
    model = nn.Sequential(Scaled(16, 8, sparsity=0.5))
    x = torch.randn(4, 16)
    expected = model(x)
    with pytest.raises(TypeError, match=r"0: Scaled\.to_dense must be defined"):
        densify(model)
    torch.testing.assert_close(model(x), expected)


def test_a_subclass_that_says_how_is_made_dense() -> None:
    model = nn.Sequential(Faithful(16, 8, sparsity=0.5), Tagged(8, 4))
    x = torch.randn(4, 16)
    expected = model(x)
    assert [type(each) for each in densify(model)] == [nn.Linear, nn.Linear]
    torch.testing.assert_close(model(x), expected)


def test_what_a_subclass_of_one_that_says_how_adds_is_seen() -> None:
    class Further(Faithful):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    with pytest.raises(TypeError, match="Further redefines forward"):
        Further(4, 4).to_dense()


class Doubling(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def with_hook(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, inputs, output: 2 * output)
    return module


def with_pre_hook(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    return module


def with_backward_hook(module: nn.Module) -> nn.Module:
    module.register_full_backward_hook(lambda *_: None)
    return module


def with_parameter(module: nn.Module) -> nn.Module:
    module.register_parameter("scale", nn.Parameter(torch.ones(1)))
    return module


def with_buffer(module: nn.Module) -> nn.Module:
    module.register_buffer("seen", torch.zeros(1))
    return module


def with_module(module: nn.Module) -> nn.Module:
    module.add_module("adapter", nn.Linear(8, 8))
    return module


def with_forward(module: nn.Module) -> nn.Module:
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    return module


def with_parametrization(module: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(module, "bias", Doubling())


EXTRAS: dict[Callable[[nn.Module], nn.Module], str] = {
    with_hook: "forward hooks",
    with_pre_hook: "forward pre-hooks",
    with_backward_hook: "backward hooks",
    with_parameter: "the parameter scale",
    with_buffer: "the buffer seen",
    with_module: "the module adapter",
    with_forward: "a forward of its own",
    with_parametrization: "a parametrization of bias",
}
every_extra = pytest.mark.parametrize("add", EXTRAS, ids=lambda add: add.__name__)


@every_extra
def test_a_sparse_layer_with_more_than_its_class_is_not_made_dense(
    add: Callable[[nn.Module], nn.Module],
) -> None:
    model = nn.Sequential(SparseLinear(8, 8), add(SparseLinear(8, 8)))
    before = list(model)
    with pytest.raises(TypeError, match=f"1: .*must not lose .*{EXTRAS[add]}"):
        densify(model)
    assert list(model) == before


@every_extra
def test_a_dense_layer_with_more_than_its_class_stays_and_is_named(
    add: Callable[[nn.Module], nn.Module],
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), add(nn.Linear(8, 8)))
    x = torch.randn(3, 8)
    expected = model[1](x)
    (left,) = plan_sparsify(model, {"*": 0.5, "1.adapter": None} if add is with_module else {"*": 0.5}).left
    assert left.name == "1"
    assert EXTRAS[add] in left.reason
    with pytest.raises(ValueError, match=f"cannot be swapped, got '1' has {EXTRAS[add]}"):
        sparsify(model, {"1": 0.5})
    with pytest.warns(UserWarning, match=f"sparsify leaves layers .* as they are: '1' has {EXTRAS[add]}"):
        sparsify(model, {"*": 0.5})
    assert [type(each) is SparseLinear for each in model] == [True, False]
    torch.testing.assert_close(model[1](x), expected)


def test_a_rule_of_none_leaves_layers_without_a_word() -> None:
    model = nn.Sequential(nn.Linear(8, 8), with_hook(nn.Linear(8, 8)), nn.Linear(8, 8))
    sparsify(model, {"1": None, "2": None, "*": 0.5})
    assert [type(each) is SparseLinear for each in model] == [True, False, False]
    with pytest.raises(ValueError, match="rules must match at least one layer each, got '7'"):
        sparsify(model, {"7": None, "2": 0.5})


class MyLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_subclass_of_a_dense_layer_is_in_the_plan() -> None:
    model = nn.ModuleDict({"own": MyLinear(4, 4), "plain": nn.Linear(4, 4)})
    plan = plan_sparsify(model, {"*": 0.5})
    assert [(each.name, each.kind) for each in plan.left] == [("own", "MyLinear")]
    assert str(plan).splitlines()[-1].startswith("left dense: 'own' is of class MyLinear, which may compute")
    with pytest.raises(ValueError, match="got 'own' is of class MyLinear"):
        sparsify(model, {"own": 0.5})


def tied_embedding() -> nn.ModuleDict:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 7)})
    model["head"].weight = model["embed"].weight
    return model


def test_tied_layers_that_a_glob_matches_stay_tied() -> None:
    model = tied_embedding()
    with pytest.warns(UserWarning, match="'head' shares its weight or bias: 'embed' and 'head' hold"):
        sparsify(model, {"*": 0.5})
    assert type(model["body"]) is SparseLinear
    assert model["head"].weight is model["embed"].weight
    sparsify(tied_embedding(), {"head": None, "*": 0.5})


def test_tied_sparse_layers_are_not_made_dense_apart() -> None:
    model = nn.Sequential(SparseLinear(6, 6), SparseLinear(6, 6))
    model[1].bias = model[0].bias
    with pytest.raises(ValueError, match="got '0', of which '0' and '1' hold the same one; untie"):
        densify(model)
    assert all(type(each) is SparseLinear for each in model)


def attention(**changes: nn.Module) -> SparseMultiheadAttention:
    sparse = SparseMultiheadAttention.from_dense(nn.MultiheadAttention(8, 2), 0.5)
    for name, module in changes.items():
        setattr(sparse, name, module)
    return sparse


PROJECTIONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a sparse subclass": (lambda: Scaled(8, 8), "Scaled.to_dense must be defined"),
    "a dense subclass": (lambda: MyLinear(8, 8), "projections must be linear layers .*got MyLinear"),
    "a sparse one with a hook": (lambda: with_hook(SparseLinear(8, 8)), "must not lose .*forward hooks"),
    "a dense one with a hook": (lambda: with_hook(nn.Linear(8, 8)), "must not lose .*forward hooks"),
}


@pytest.mark.parametrize("what", PROJECTIONS)
def test_projections_of_an_attention_lose_nothing(what: str) -> None:
    make, message = PROJECTIONS[what]
    model = nn.ModuleList([attention(q_proj=make())])
    before = model[0]
    with pytest.raises(TypeError, match=message):
        densify(model)
    assert model[0] is before


def test_an_attention_with_hooks_stays() -> None:
    model = nn.ModuleList([with_hook(nn.MultiheadAttention(8, 2)), nn.Linear(8, 8)])
    with pytest.warns(UserWarning, match="'0.q_proj', .*'0.out_proj' each has forward hooks"):
        sparsify(model, {"*": 0.5})
    assert type(model[0]) is nn.MultiheadAttention
    with pytest.raises(TypeError, match=r"must not lose .*forward hooks"):
        densify(nn.ModuleList([with_hook(attention())]))


def test_plain_modules_have_no_extras() -> None:
    assert extras(nn.Linear(2, 2), ("weight", "bias")) == []
    assert extras(copy.deepcopy(nn.Linear(2, 2, bias=False)), ("weight", "bias")) == []
    assert extras(nn.Linear(2, 2), ("weight",)) == ["the parameter bias"]
    assert overridden(nn.Linear, "forward") == []
    assert overridden(MyLinear, "forward") == []
    assert overridden(MyLinear, "extra_repr") == ["forward"]
