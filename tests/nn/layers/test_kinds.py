"""Other kinds of linear layers, other patterns, what a plan says, and the way back to dense layers."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparselab import (
    MaskedLinear,
    SparseLinear,
    SparseMultiheadAttention,
    densify,
    measure_sparsity,
    memory_report,
    plan_sparsify,
    sparsify,
)
from sparselab.dst import allocate, prune


class Conv1D(nn.Module):
    """As transformers has it; recognised by its name and module."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


def mixed() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"attn": nn.MultiheadAttention(12, 2), "conv": Conv1D(20, 12), "head": nn.Linear(20, 3)}
    )


def outputs(model: nn.ModuleDict) -> list[Tensor]:
    x = torch.linspace(-1, 1, 5 * 12).view(5, 1, 12)
    y = model["conv"](model["attn"](x, x, x)[0])
    return [y, model["head"](y)]


def sparse_names(model: nn.Module) -> list[str]:
    return [name for name, each in model.named_modules() if isinstance(each, (SparseLinear, MaskedLinear))]


PARTS = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"]


@pytest.mark.parametrize("layer", ["sparse", "masked"])
def test_without_zeros_every_kind_computes_the_same(layer: str) -> None:
    model = mixed()
    expected = outputs(model)
    sparsify(model, {"*": 0.0}, init="magnitude", layer=layer)
    assert sparse_names(model) == [*PARTS, "conv", "head"]
    torch.testing.assert_close(outputs(model), expected)


def test_a_conv1d_keeps_the_largest_of_its_transposed_weight() -> None:
    model = nn.Sequential(Conv1D(2, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [-5.0, 3.0], [2.0, -2.0]]))
    model[0].bias.requires_grad_(False)
    bias = model[0].bias
    layer = sparsify(model.eval(), {"0": 0.5}, init="magnitude")[0]
    assert layer.to_dense().weight.tolist() == [[0, -5, 2], [0, 3, 0]]
    assert torch.equal(layer.bias, bias)
    assert (layer.training, layer.bias.requires_grad, layer.weight_values.requires_grad) == (
        False,
        False,
        True,
    )


def test_another_conv1d_is_left_alone() -> None:
    class Other(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleList([Other(2, 3), nn.Linear(3, 2)])
    with pytest.warns(UserWarning, match="as they are: '0' is of class Other"):
        sparsify(model, {"*": 0.5})
    assert sparse_names(model) == ["1"]


def test_expressions_match_whole_names_beside_globs() -> None:
    model = nn.ModuleList(
        [nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(12)]
    )
    rules: dict[Any, float] = {
        re.compile(r"[0-9]\.up"): 0.5,
        "1?.up": 0.75,
        re.compile(r"(0|11)\.down"): 0.25,
    }
    sparsify(model, rules)
    found = {name: each.sparsity for name, each in model.named_modules() if isinstance(each, SparseLinear)}
    assert found == {
        **{f"{i}.up": 0.5 if i < 10 else 0.75 for i in range(12)}, "0.down": 0.25, "11.down": 0.25
    }  # fmt: skip


def test_an_expression_without_a_layer_is_refused() -> None:
    model = mixed()
    with pytest.raises(ValueError, match=r"got re\.compile\('con'\) without one; .*attn\.q_proj, .*head"):
        sparsify(model, {"head": 0.5, re.compile("con"): 0.5})
    assert sparse_names(model) == []


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D, lambda i, o: nn.MultiheadAttention(i, 1)])
def test_a_layer_itself_cannot_be_swapped(kind: Any) -> None:
    with pytest.raises(ValueError, match="model must contain the layers to swap"):
        sparsify(kind(4, 4), {"*": 0.5})


def test_computed_and_tied_projections_are_refused() -> None:
    model = mixed()
    nn.utils.spectral_norm(model["attn"], "in_proj_weight")
    with pytest.raises(ValueError, match=r"got 'attn\.k_proj' computes its weight"):
        sparsify(model, {"attn.k_proj": 0.5})
    model = mixed()
    model["other"] = nn.MultiheadAttention(12, 2)
    model["other"].in_proj_weight = model["attn"].in_proj_weight
    with pytest.raises(
        ValueError, match=r"got 'attn\.v_proj' shares its weight or bias: 'attn' and 'other' hold"
    ):
        sparsify(model, {"attn.v_proj": 0.5})
    assert sparse_names(sparsify(model, {"attn.out_proj": 0.5})) == ["attn.out_proj"]


def test_a_pruned_model_may_have_every_kind() -> None:
    model = mixed()
    largest = model["conv"].weight.detach().abs().max()
    rules = prune(model, 0.75, "network")
    assert sparse_names(model) == list(rules) == [*PARTS, "conv", "head"]
    assert measure_sparsity(model) == pytest.approx(0.75, abs=1e-3)
    assert model["conv"].weight_values.detach().abs().max() == largest
    fresh = sparsify(mixed(), rules)
    assert [fresh.get_submodule(name).nnz for name in rules] == [
        model.get_submodule(name).nnz for name in rules
    ]


def test_a_budget_is_shared_out_to_every_kind() -> None:
    rules = allocate(mixed(), 0.8)
    assert list(rules) == [*PARTS, "conv", "head"]
    model = sparsify(mixed(), rules)
    assert sum(model.get_submodule(name).nnz for name in rules) == round(0.2 * (4 * 144 + 240 + 60))
    assert list(allocate(mixed(), 0.8, exempt_types=nn.MultiheadAttention)) == ["conv", "head"]
    with torch.device("meta"):
        on_meta = mixed()
    assert allocate(on_meta, 0.8) == rules


def test_expressions_choose_what_is_pruned() -> None:
    exempt = ["*.k_proj", re.compile(".*v_proj")]
    assert list(prune(mixed(), 0.5, include=re.compile("attn.*"), exempt=exempt)) == [PARTS[0], PARTS[3]]


def test_a_plan_says_what_happens_and_changes_nothing() -> None:
    model = mixed()
    rules = {"attn.q_proj": 0.5, "conv": 0.9, "head": 0.25}
    before = outputs(model)
    dense = memory_report(nn.ModuleList([model["conv"], model["head"]])).weight_bytes
    plan = plan_sparsify(model, rules)
    torch.testing.assert_close(outputs(model), before)
    assert sparse_names(model) == []
    assert [(each.name, each.kind, each.shape, each.sparsity) for each in plan.layers] == [
        ("attn.q_proj", "MultiheadAttention", (12, 12), 0.5),
        ("conv", "Conv1D", (20, 12), 0.9),
        ("head", "Linear", (3, 20), 0.25),
    ]
    assert sum(each.bytes_before for each in plan.layers[1:]) == dense
    sparsify(model, rules)
    for each in plan.layers:
        layer = model.get_submodule(each.name)
        assert (each.connections, each.bytes_after) == (layer.nnz, memory_report(layer).weight_bytes)


def test_a_plan_prints_as_a_table() -> None:
    lines = str(
        plan_sparsify(nn.Sequential(nn.Linear(1000, 1000), nn.Linear(10, 5)), {"*": 0.75})
    ).splitlines()
    table, model = lines[:4], lines[4:]
    assert [line.split() for line in table] == [
        ["layer", "kind", "becomes", "shape", "sparsity", "connections", "bytes", "before", "bytes", "after"],
        ["0", "Linear", "SparseLinear", "1000", "x", "1000", "0.75", "250,000", "4,004,000", "1,512,008"],
        ["1", "Linear", "SparseLinear", "5", "x", "10", "0.75", "12", "220", "140"],
        ["total", "250,012", "4,004,220", "1,512,148"],
    ]
    assert len({len(line) for line in table}) == 1
    assert model == [
        "parameters of the model: 1,001,055 in layers that become sparse, 0 in layers left dense, "
        "0 elsewhere",
        "bytes of the model: 4,004,220 before, 1,512,148 after",
    ]


def test_a_plan_refuses_what_sparsify_refuses() -> None:
    for rules, error in (
        ({"nothing": 0.5}, "got 'nothing' without one"),
        ({"head": 2.0}, "sparsity must be"),
    ):
        with pytest.raises(ValueError, match=error):
            plan_sparsify(mixed(), rules)
    model = nn.ModuleDict({"twin": nn.Linear(4, 7), "head": nn.Linear(4, 7)})
    model["head"].weight = model["twin"].weight
    with pytest.raises(ValueError, match="'twin' and 'head'"):
        plan_sparsify(model, {"head": 0.5})


@pytest.mark.parametrize("layer", ["sparse", "masked"])
def test_dense_again_are_the_kinds_and_the_outputs(layer: str) -> None:
    model = mixed()
    model["conv"].weight.requires_grad_(False)
    shapes = {name: (p.shape, p.requires_grad) for name, p in model.named_parameters()}
    sparsify(model, {"*": 0.6}, layer=layer)
    expected = outputs(model)
    assert densify(model) is model
    assert {name: (p.shape, p.requires_grad) for name, p in model.named_parameters()} == shapes
    assert [type(each) for each in model.children()] == [nn.MultiheadAttention, Conv1D, nn.Linear]
    torch.testing.assert_close(outputs(model), expected)


def test_a_conv1d_is_remembered_through_copies_and_twins() -> None:
    layer = sparsify(nn.Sequential(Conv1D(2, 3)), {"0": 0.5})[0]
    twin = MaskedLinear.from_sparse(copy.deepcopy(layer)).to_sparse()
    assert type(densify(nn.Sequential(twin))[0]) is Conv1D


def test_a_layer_in_two_places_becomes_one_dense_layer() -> None:
    layer = SparseLinear(4, 4)
    model = densify(nn.ModuleList([layer, nn.Sequential(layer)]))
    assert type(model[0]) is nn.Linear
    assert model[0] is model[1][0]


def test_what_cannot_be_made_dense_is_named() -> None:
    with pytest.raises(ValueError, match=r"got a SparseLinear itself; use its to_dense\(\)"):
        densify(SparseLinear(4, 4))
    with pytest.raises(ValueError, match="got '0' on the meta device; see materialize"):
        densify(nn.Sequential(SparseLinear(4, 4, device="meta")))
    attention = SparseMultiheadAttention.from_dense(nn.MultiheadAttention(4, 1), 0.5)
    attention.k_proj = nn.Identity()
    model = nn.ModuleList([SparseLinear(4, 4), attention])
    with pytest.raises(TypeError, match="projections must be linear layers"):
        densify(model)
    assert sparse_names(model) == ["0", "1.q_proj", "1.v_proj", "1.out_proj"]
    dense = nn.Sequential(nn.Linear(4, 4))
    assert densify(dense)[0] is dense[0]
