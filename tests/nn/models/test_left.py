"""What rules match and `sparsify` leaves dense: refused, listed or warned of, never in silence."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrizations

from sparselab import (
    SparseLinear,
    plan_sparsify,
    sparsify,
)
from sparselab.nn import DenseType, LayerKind, register_dense, register_kind
from sparselab.nn.layers.dense import DenseLayer, LinearView, forget_dense
from sparselab.nn.layers.kinds import forget_kind
from tests.nn.models.samples import sparsities, tied

CATCHING = {
    "a number": 0.5,
    "a glob": {"*": 0.5},
    "an expression": {re.compile(".*"): 0.5},
    "a prefixed expression": {"re:.*": 0.5},
    "a class": {nn.Linear: 0.5},
    "a function": {lambda module, name: name != "embed": 0.5},
}


@pytest.mark.parametrize("how", CATCHING)
def test_a_tied_layer_stays_tied_and_is_listed(how: str) -> None:
    rules = CATCHING[how]
    model = tied()
    left = {each.name: each for each in plan_sparsify(model, rules).left}
    assert left.keys() - {"embed"} == {"lm_head"}
    reason = (
        "shares its weight or bias: 'embed' and 'lm_head' hold the same one; a key for these alone makes "
        "them sparse"
    )
    assert (left["lm_head"].reason, left["lm_head"].parameters, left["lm_head"].bytes) == (reason, 35, 140)
    with pytest.warns(UserWarning, match=f"as they are: 'lm_head' {reason}. A rule of None") as caught:
        assert sparsify(model, rules) is model
    assert len(caught) == 1
    assert "'embed' shares" not in str(caught[0].message)
    assert caught[0].filename == __file__
    assert sparsities(model) == {"body": 0.5}
    assert model["lm_head"].weight is model["embed"].weight


@pytest.mark.parametrize("act", [sparsify, plan_sparsify])
def test_a_tied_layer_that_is_named_outright_is_an_error(act: Any) -> None:
    model = nn.ModuleDict({"twin": nn.Linear(4, 7), "body": nn.Linear(4, 4), "lm_head": nn.Linear(4, 7)})
    model["lm_head"].weight = model["twin"].weight
    for rules in ({"lm_head": 0.5}, {"body": 0.5, "lm_head": 0.5}, {"*": 0.5, "lm_head": 0.5}):
        with pytest.raises(ValueError, match=r"rules must not name .* got 'lm_head' shares its"):
            act(model, rules)
    assert sparsities(model) == {}


@pytest.mark.parametrize("key", ["lm_head", "lm*", "re:lm.*", lambda module, name: name == "lm_head"])
def test_a_rule_of_none_leaves_a_tied_layer_out_without_a_word(key: Any) -> None:
    rules = {key: None, "*": 0.5}
    plan = plan_sparsify(tied(), rules)
    assert plan.left == ()
    assert (plan.parameters_swapped, plan.parameters_left, plan.parameters_elsewhere) == (20, 35, 0)
    assert sparsities(sparsify(tied(), rules)) == {"body": 0.5}


class Experts(nn.Module):
    """As a mixture keeps them, in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 4))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 4))
        self.scale = nn.Parameter(torch.ones(4))


UNKNOWN: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "Bilinear": (lambda: nn.Bilinear(2, 3, 4), 28),
    "GRUCell": (lambda: nn.GRUCell(3, 4), 108),
    "LSTMCell": (lambda: nn.LSTMCell(3, 4), 144),
    "RNNCell": (lambda: nn.RNNCell(3, 4), 36),
}
KEYS: dict[str, Callable[[type], Any]] = {
    "a number": lambda cls: 0.5,
    "a glob": lambda cls: {"*": 0.5},
    "its class": lambda cls: {cls: 0.5, "plain": 0.5},
    "a function": lambda cls: {lambda module, name: True: 0.5},
}


@pytest.mark.parametrize("how", KEYS)
@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_layer_without_a_sparse_kind_is_listed_and_named(kind: str, how: str) -> None:
    make, size = UNKNOWN[kind]
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "other": make()})
    rules = KEYS[how](type(model["other"]))
    plan = plan_sparsify(model, rules)
    (left,) = plan.left
    assert (left.name, left.kind, left.parameters, left.bytes) == ("other", kind, size, 4 * size)
    assert left.reason == f"is of class {kind}, which has no sparse kind"
    assert (plan.parameters_swapped, plan.parameters_left, plan.parameters_elsewhere) == (20, size, 0)
    with pytest.warns(UserWarning, match=f"as they are: 'other' is of class {kind}, which has no sparse"):
        sparsify(model, rules)
    assert sparsities(model) == {"plain": 0.5}


@pytest.mark.parametrize("kind", UNKNOWN)
@pytest.mark.parametrize("act", [sparsify, plan_sparsify])
def test_a_model_without_anything_to_swap_is_refused_with_what_is_there(act: Any, kind: str) -> None:
    model = nn.ModuleDict({"a": UNKNOWN[kind][0](), "b": UNKNOWN[kind][0](), "norm": nn.LayerNorm(4)})
    reason = f"each is of class {kind}, which has no sparse kind"
    with pytest.raises(
        ValueError, match=f"rules must make at least one layer sparse, got none: 'a', 'b' {reason}"
    ):
        act(model, 0.9)
    with pytest.raises(ValueError, match=f"got none: the model is of class {kind}"):
        act(model["a"], 0.9)
    with pytest.raises(ValueError, match=f"rules must not name .* got 'a' is of class {kind}"):
        act(model, {"a": 0.9})


@pytest.mark.parametrize("act", [sparsify, plan_sparsify])
def test_a_model_without_weights_is_refused(act: Any) -> None:
    with pytest.raises(ValueError, match=r"got '\*' without one; the dense layers are: none"):
        act(nn.Sequential(nn.ReLU(), nn.LayerNorm(4), nn.BatchNorm1d(4), SparseLinear(4, 4)), 0.9)


def test_fused_experts_are_listed_by_parameter() -> None:
    model = nn.ModuleDict({"router": nn.Linear(4, 3), "experts": Experts()})
    plan = plan_sparsify(model, 0.5)
    assert [(each.name, each.kind, each.parameters) for each in plan.left] == [
        ("experts.gate_up_proj", "Experts", 96), ("experts.down_proj", "Experts", 48)
    ]  # fmt: skip
    assert plan.left[0].reason == "is a Parameter of class Experts, which has no sparse kind"
    assert (plan.parameters_swapped, plan.parameters_left, plan.parameters_elsewhere) == (15, 144, 4)
    with pytest.warns(UserWarning, match=r"'experts.gate_up_proj', 'experts.down_proj' each is a Parameter"):
        sparsify(model, 0.5)
    with pytest.warns(UserWarning, match=r"as they are: 'experts.down_proj' is a Parameter"):
        sparsify(
            nn.ModuleDict({"router": nn.Linear(4, 3), "experts": Experts()}), {"*.gate*": None, "*": 0.5}
        )


def test_what_is_looked_up_or_added_is_listed_and_only_named_if_it_was_meant() -> None:
    def model() -> nn.Module:
        model = nn.ModuleDict(
            {"embed": nn.Embedding(7, 4), "bag": nn.EmbeddingBag(7, 4), "fc": nn.Linear(4, 4)}
        )
        model.register_parameter("position", nn.Parameter(torch.zeros(1, 5, 4)))
        return model

    assert [each.name for each in plan_sparsify(model(), 0.5).left] == ["position", "embed", "bag"]
    sparsify(model(), 0.5)
    with pytest.warns(UserWarning, match=r"as they are: 'bag' is of class EmbeddingBag"):
        sparsify(model(), {nn.EmbeddingBag: 0.5, "fc": 0.5})
    with pytest.raises(
        ValueError, match=r"got none: 'position' is a Parameter .*; 'embed' is looked up, not"
    ):
        sparsify(model(), {"fc": None, "*": 0.5})


def test_tensors_without_entries_and_without_shapes_are_no_layers() -> None:
    lazy = nn.Module()
    lazy.weight = UninitializedParameter()
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "lazy": lazy})
    model.register_parameter("none", nn.Parameter(torch.zeros(0, 4)))
    plan = plan_sparsify(model, 0.5)
    assert (plan.left, plan.parameters_swapped, plan.parameters_elsewhere) == ((), 20, 0)
    assert plan.bytes_before == 80
    for known in (nn.LazyLinear(4), nn.LazyConv1d(4, 3), nn.LazyConvTranspose2d(4, 3)):
        model = nn.ModuleDict({"fc": nn.Linear(4, 4), "lazy": known})
        assert [(each.name, each.parameters) for each in plan_sparsify(model, 0.5).left] == [("lazy", 0)]


@pytest.mark.parametrize(
    "normed", [parametrizations.weight_norm, pytest.param(torch.nn.utils.spectral_norm, id="hook")]
)
def test_a_layer_without_a_kind_that_computes_its_weight_is_one_layer(normed: Any) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "both": normed(nn.Bilinear(4, 4, 3))})
    (left,) = plan_sparsify(model, 0.5).left
    assert (left.name, left.parameters) == ("both", sum(each.numel() for each in model["both"].parameters()))


def test_what_a_kind_does_not_replace_stays_dense_unless_it_is_named() -> None:
    block = {"layer": "block", "sparsity": 0.5, "block_shape": (2, 2)}
    model = nn.ModuleDict({"conv": nn.Conv2d(2, 2, 2), "fc": nn.Linear(4, 4)})
    (left,) = plan_sparsify(model, {"*": block}).left
    assert str(left) == "'conv' is of class Conv2d, which has no layer of kind 'block'"
    with pytest.raises(ValueError, match="kind 'block' must replace one of Linear, got 'conv', a Conv2d"):
        plan_sparsify(model, {"conv": block})
    assert len(plan_sparsify(model, {"*": block, "conv": None}).left) == 1
    with pytest.warns(UserWarning, match="'conv' is of class Conv2d, which has no layer of kind 'block'"):
        sparsify(model, {"*": block})
    assert list(sparsities(model)) == ["fc"]


def test_a_plan_counts_all_of_a_model() -> None:
    model = nn.ModuleDict(
        {"attn": nn.MultiheadAttention(4, 2), "norm": nn.BatchNorm1d(3), "two": nn.Bilinear(3, 3, 11)}
    )
    plan = plan_sparsify(model, {"attn.[qk]_proj": 0.5, "attn.v_proj": None, nn.Bilinear: 0.5})
    assert (plan.parameters_swapped, plan.parameters_left, plan.parameters_elsewhere) == (
        40,
        20 + 110,
        20 + 6,
    )
    assert plan.bytes_before == sum(each.nbytes for each in model.state_dict().values())
    saved = sum(each.bytes_before - each.bytes_after for each in plan.layers)
    assert plan.bytes_after == plan.bytes_before - saved
    assert str(plan).splitlines()[-3:] == [
        "parameters of the model: 40 in layers that become sparse, 130 in layers left dense, 26 elsewhere",
        f"bytes of the model: {plan.bytes_before:,} before, {plan.bytes_after:,} after",
        "left dense: 'two' is of class Bilinear, which has no sparse kind, 440 bytes",
    ]


class Pointwise(nn.Module):
    """A linear layer of channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels))
        self.bias = nn.Parameter(torch.randn(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.mT, self.weight, self.bias).mT


class SparsePointwise(SparseLinear):
    """The same, as a kind of one's own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


def see(module: Any) -> list[DenseLayer]:
    view = LinearView(module.weight, module.bias, module.training, Pointwise)
    return [DenseLayer(module, "", view, (module.weight, module.bias))]


@pytest.fixture
def _pointwise() -> Iterator[None]:
    dense = register_dense(DenseType(Pointwise, see))
    kind = register_kind(LayerKind("pointwise", SparsePointwise, (LinearView,)))
    yield
    forget_kind(kind)
    forget_dense(dense)


@pytest.mark.usefixtures("_pointwise")
def test_a_class_that_is_registered_is_no_longer_left() -> None:
    model = nn.Sequential(Pointwise(4, 6), nn.ReLU())
    x = torch.randn(2, 4, 5)
    expected = model(x)
    assert plan_sparsify(model, 0.0, layer="pointwise").left == ()
    sparsify(model, 0.0, init="magnitude", layer="pointwise")
    torch.testing.assert_close(model(x), expected)
