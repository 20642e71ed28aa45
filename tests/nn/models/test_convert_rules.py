"""What rules of `sparsify` may say: the kind of layer, how sparse it is, and its settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from sparselab import MaskedLinear, SparseLinear, densify, memory_report, plan_sparsify, sparsify
from sparselab.dst import allocate
from sparselab.nn.layers.kinds import LayerKind, forget_kind, kind_names, register_kind
from sparselab.nn.models.rules import rule_of_saved


class Striped(SparseLinear):
    """A kind with a setting, which it checks when it is made."""

    def __init__(self, *sizes: int, width: int = 1, **others: Any) -> None:
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        super().__init__(*sizes, **others)
        self.width = width

    @classmethod
    def from_dense(cls, linear: nn.Linear, sparsity: float, width: int = 1) -> Striped:
        layer = super().from_dense(linear, sparsity)
        assert isinstance(layer, Striped)
        layer.width = width
        return layer


KINDS = kind_names()


@pytest.fixture(autouse=True)
def _striped() -> Iterator[None]:
    kind = register_kind(LayerKind("striped", Striped, (nn.Linear,), ("width",)))
    yield
    forget_kind(kind)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 2)
        self.fc1, self.fc2 = nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 5)


def kinds(model: nn.Module) -> dict[str, tuple[str, int]]:
    return {
        name: (type(each).__name__, each.nnz) for name, each in model.named_modules() if hasattr(each, "nnz")
    }


MIXED = {
    "attn.q_proj": {"layer": "striped", "density": 0.25, "width": 4},
    "attn.*": 0.5,
    re.compile(r"fc\d"): {"layer": "fan_in", "fan_in": 3},
    "head": {"layer": "masked", "sparsity": 0.75},
}
BECAME = {
    "attn.q_proj": ("Striped", 36),
    **{f"attn.{name}": ("SparseLinear", 72) for name in ("k_proj", "v_proj", "out_proj")},
    "fc1": ("FanInLinear", 60),
    "fc2": ("FanInLinear", 36),
    "head": ("MaskedLinear", 15),
}


@pytest.mark.parametrize("init", ["random", "magnitude"])
def test_each_rule_has_its_kind_amount_and_settings(init: Any) -> None:
    model = sparsify(Net(), MIXED, init=init)
    assert kinds(model) == BECAME
    assert (model.attn.q_proj.width, model.fc1.fan_in) == (4, 3)
    x = torch.randn(7, 12)
    y = model.head(model.fc2(model.fc1(model.attn(x, x, x)[0])))
    assert kinds(densify(model)) == {}
    torch.testing.assert_close(model.head(model.fc2(model.fc1(model.attn(x, x, x)[0]))), y)


def test_a_plan_tells_what_every_layer_becomes() -> None:
    model = Net()
    state = torch.get_rng_state()
    plan = plan_sparsify(model, MIXED)
    assert torch.equal(torch.get_rng_state(), state)
    assert kinds(model) == {}
    assert {each.name: (each.becomes, each.connections) for each in plan.layers} == BECAME
    assert [each.sparsity for each in plan.layers][-3:] == [0.75, 0.85, 0.75]
    sparsify(model, MIXED)
    for each in plan.layers:
        assert each.bytes_after == memory_report(model.get_submodule(each.name)).weight_bytes
    assert str(plan).splitlines()[1].split()[:3] == ["attn.q_proj", "MultiheadAttention", "Striped"]


def test_numbers_and_rules_without_a_kind_take_the_default() -> None:
    rules = {"fc1": 0.5, "fc2": {"density": 0.5}, "head": {"layer": "sparse", "sparsity": 0.5}}
    model = sparsify(Net(), rules, layer="masked")
    assert [type(each) for each in (model.fc1, model.fc2, model.head)] == [
        MaskedLinear, MaskedLinear, SparseLinear
    ]  # fmt: skip
    planned = plan_sparsify(Net(), rules, layer="masked").layers
    assert [each.becomes for each in planned] == ["MaskedLinear", "MaskedLinear", "SparseLinear"]


def test_a_budget_can_go_to_any_kind() -> None:
    rules = allocate(Net(), 0.8, exempt="head")
    assert sum(count for _, count in kinds(sparsify(Net(), rules, layer="striped")).values()) == round(
        0.2 * (4 * 144 + 480)
    )


def test_rules_are_not_written_to() -> None:
    rule = {"layer": "fan_in", "fan_in": 3}
    sparsify(Net(), {"fc?": rule})
    assert rule == {"layer": "fan_in", "fan_in": 3}


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ({}, ValueError, r'exactly one of "sparsity", "density" of .*\'sparse\', got none for \'head\''),
        ({"sparsity": 0.5, "density": 0.5}, ValueError, 'exactly one .* got "sparsity", "density" for'),
        ({"layer": "fan_in", "fan_in": 2, "sparsity": 0.5}, ValueError, 'got "sparsity", "fan_in" for'),
        ({"fan_in": 2}, ValueError, r"no more of .* \"density\", got 'fan_in' for 'head'"),
        ({"sparsity": 0.5, "width": 2}, ValueError, "got 'width' for 'head'"),
        ({"layer": "striped", "sparsity": 0.5, "widht": 2}, ValueError, "\"width\", got 'widht' for"),
        ({"layer": "solid", "sparsity": 0.5}, ValueError, "layer must be one of \"sparse\", .*, got 'solid'"),
        ({"layer": ["sparse"], "sparsity": 0.5}, ValueError, "layer must be one of"),
        ({"density": 1.5}, ValueError, r"density must be a finite number in \[0, 1\], got 1.5"),
        ({"sparsity": None}, TypeError, "sparsity must be a number"),
        ({"layer": "fan_in", "fan_in": 0.5}, TypeError, "fan_in must be an integer, got 0.5"),
        (
            {"layer": "fan_in", "fan_in": 13},
            ValueError,
            "fan_in must be at most the 12 inputs of 'head', got 13",
        ),
        ({"layer": "striped", "density": 0.5, "width": 0}, ValueError, "width must be at least 1"),
    ],
)
@pytest.mark.parametrize("act", [sparsify, plan_sparsify])
def test_what_a_rule_cannot_say_changes_nothing(
    act: Any, rule: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Net()
    with pytest.raises(error, match=message):
        act(model, {"fc1": 0.5, "head": rule})
    assert kinds(model) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_layer_tells_its_kind(kind: str) -> None:
    settings = {"block_shape": (2, 3)} if kind == "block" else {}
    model = sparsify(nn.Sequential(nn.Linear(12, 8)), {"0": {"layer": kind, "sparsity": 0.5, **settings}})
    saved = model[0].state_dict()
    rule = rule_of_saved(saved)
    assert rule is not None
    again = sparsify(nn.Sequential(nn.Linear(12, 8)), {"0": rule})
    assert type(again[0]) is type(model[0])
    again[0].load_state_dict(saved)
    x = torch.randn(4, 12)
    assert torch.equal(again(x), model(x))


def test_a_dense_layer_needs_no_rule() -> None:
    assert rule_of_saved(nn.Linear(3, 2).state_dict()) is None
