"""Which layers `sparsify` takes: by number, name, class and function."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparselab import (
    SparseConv2d,
    SparseMultiheadAttention,
    plan_sparsify,
    sparsify,
)
from tests.nn.models.samples import ALL, PARTS, Net, sparsities

README = Path(__file__).parents[3] / "README.md"


def planned(model: nn.Module, rules: Any, **options: Any) -> dict[str, float]:
    return {each.name: round(each.sparsity, 2) for each in plan_sparsify(model, rules, **options).layers}


@pytest.mark.parametrize("amount", [0, 0.5, 1.0, torch.tensor(0.5).numpy()[()]])
@pytest.mark.parametrize("layer", ["sparse", "masked", "fan_in"])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_number_is_for_everything(amount: Any, layer: str) -> None:
    number, glob = (sparsify(Net(), rules, layer=layer) for rules in (amount, {"*": amount}))
    assert sparsities(number) == sparsities(glob)
    assert list(sparsities(number)) == list(planned(Net(), amount, layer=layer)) == ALL


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        (1.5, ValueError, r"rules, if they are no mapping, must be a finite number in \[0, 1\], got 1.5"),
        (True, TypeError, "rules, if they are no mapping, must be a number"),
        (None, TypeError, "must be a number"),
        ("*", TypeError, r"must be a number .* got '\*'"),
        (["*"], TypeError, "must be a number"),
        (nn.Linear, TypeError, "must be a number"),
        (
            {"layer": "block", "density": 0.1},
            ValueError,
            r"got a rule alone; for all layers, write \{\"\*\": \{'layer': 'block', 'density': 0\.1\}\}",
        ),
        ({"sparsity": 0.9}, ValueError, "got a rule alone"),
        ({"density": 0.9, "block_shape": (2, 2)}, ValueError, "got a rule alone"),
        ({"fan_in": 3}, ValueError, "got a rule alone"),
        ({3: 0.5}, TypeError, "rules must choose layers by a str, .* got 3"),
        ({lambda module, name: "yes": 0.5}, TypeError, "return a bool, got 'yes' for 'stem'"),
        ({nn.GRU: 0.5}, ValueError, "rules must match at least one layer each, got GRU without one"),
        ({"attn": 0.5}, ValueError, r"got 'attn' without one; what lies below it is 'attn\.\*'"),
        (
            {r"fc\d|head": 0.5},
            ValueError,
            r"only as a regular expression would match fc1, fc2, head: write re\.compile\('fc.*or 're:fc",
        ),
        ({"*": None, "head": 0.5}, ValueError, "at least one layer sparse, got none: a rule of None comes"),
    ],
)
@pytest.mark.parametrize("act", [sparsify, plan_sparsify])
def test_rules_without_a_meaning_are_refused_and_nothing_changes(
    act: Any, rules: Any, error: type[Exception], message: str
) -> None:
    model = Net()
    with pytest.raises(error, match=message):
        act(model, rules)
    assert sparsities(model) == {}


def test_layers_may_be_named_as_the_words_of_rules_are() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(4, 4), "density": nn.Linear(4, 4)})
    assert sparsities(sparsify(model, {"layer": 0.5, "density": 0.75})) == {"layer": 0.5, "density": 0.75}


def test_classes_functions_and_expressions_choose_beside_names() -> None:
    rules = {
        "head": None,
        lambda module, name: name.endswith("2"): 0.75,
        nn.Conv2d: 0.5,
        nn.MultiheadAttention: {"density": 0.75},
        "re:fc.": 0.0,
    }
    expected = {"stem": 0.5, **dict.fromkeys(PARTS, 0.25), "fc1": 0.0, "fc2": 0.75}
    assert planned(Net(), rules) == expected
    model = sparsify(Net(), rules)
    assert sparsities(model) == expected
    assert (type(model.stem), type(model.attn)) == (SparseConv2d, SparseMultiheadAttention)


def test_the_rules_of_the_readme() -> None:
    (code,) = re.findall(r"^(rules = \{\n.*?^\})", README.read_text(), re.MULTILINE | re.DOTALL)
    given: dict[str, Any] = {"torch": torch}
    exec(code, given)
    model = nn.Module()
    model.lm_head, model.conv = nn.Linear(8, 8), nn.Conv2d(4, 4, 2)
    model.block = nn.ModuleDict({"attn": nn.ModuleDict({"q": nn.Linear(8, 8)}), "fc1": nn.Linear(20, 8)})
    model.block.update({"up_proj": nn.Linear(10, 10), "down_proj": nn.Linear(10, 10)})
    plan = plan_sparsify(model, given["rules"]).layers
    assert {each.name: (each.becomes, round(each.sparsity, 2)) for each in plan} == {
        "block.attn.q": ("SparseLinear", 0.7),
        "block.up_proj": ("SparseLinear", 0.9),
        "block.down_proj": ("SparseLinear", 0.9),
        "conv": ("SparseConv2d", 0.75),
        "block.fc1": ("BlockSparseLinear", 0.9),
    }


def test_a_class_is_that_of_the_owner() -> None:
    assert list(planned(Net(), {nn.Linear: 0.5})) == ["fc1", "fc2", "head"]
    assert list(planned(Net(), {nn.MultiheadAttention: 0.5})) == PARTS
    owners = []

    def seen(module: nn.Module, name: str) -> bool:
        owners.append((type(module).__name__, name))
        return True

    plan_sparsify(Net(), {seen: 0.5})
    kinds = ["Conv2d", *["MultiheadAttention"] * 4, *["Linear"] * 3]
    assert owners == list(zip(kinds, ALL, strict=True))


def test_a_class_takes_its_subclasses_along() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict({"own": Scaled(4, 4), "plain": nn.Linear(4, 4)})
    assert [each.name for each in plan_sparsify(model, {nn.Linear: 0.5}).left] == ["own"]
    with pytest.warns(UserWarning, match="'own' is of class Scaled"):
        sparsify(model, {nn.Linear: 0.5})
    assert sparsities(model) == {"plain": 0.5}
