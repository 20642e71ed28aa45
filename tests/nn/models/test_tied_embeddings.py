"""Embeddings, alone and with a head that has their weight, made sparse by rules, dense again, and pruned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparselab import (
    SparseEmbedding,
    SparseLinear,
    TiedLinear,
    densify,
    materialize,
    measure_sparsity,
    plan_sparsify,
    sparsify,
)
from sparselab.dst import allocate, prune
from sparselab.nn.models.rules import layers_of_saved

N, DIM = 11, 6


class Model(nn.Module):
    def __init__(self, bias: bool = True, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(N, DIM, padding_idx=1)
        self.body = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, N, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, numbers: Tensor) -> Tensor:
        return self.head(self.body(self.embed(numbers)).relu())


NUMBERS = torch.arange(N)
KEYS: list[Any] = ["embed", "head", "[eh]*e[ma]*", nn.Embedding, lambda module, name: name == "head"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("key", KEYS)
def test_a_key_for_either_makes_both_sparse(key: Any, bias: bool) -> None:
    model = Model(bias)
    head_bias, expected = model.head.bias, model(NUMBERS)
    assert sparsify(model, {key: 0.0, "*": None}, init="magnitude") is model
    assert type(model.embed) is SparseEmbedding
    assert type(model.head) is TiedLinear
    assert type(model.body) is nn.Linear
    assert model.head.layer is model.embed
    assert model.head.bias is head_bias
    torch.testing.assert_close(model(NUMBERS), expected)


def test_sparse_and_dense_again() -> None:
    model = Model()
    sparsify(model, {"embed": 0.7, "head": 0.7, "*": 0.5})
    assert isinstance(model.body, SparseLinear)
    assert model.embed.sparsity == pytest.approx(0.7, abs=0.01)
    assert measure_sparsity(model) == pytest.approx((0.7 * 66 + 0.5 * 36) / 102, abs=0.01)
    assert model.embed(torch.tensor(1)).eq(0).all()
    y = model(NUMBERS)
    saved = model.state_dict()
    fresh = sparsify(Model(), layers_of_saved(saved))
    fresh.load_state_dict(saved)
    assert torch.equal(fresh(NUMBERS), y)
    densify(model)
    assert model.head.weight is model.embed.weight
    assert type(model.embed) is nn.Embedding
    assert model.embed.padding_idx == 1
    torch.testing.assert_close(model(NUMBERS), y)


@pytest.mark.parametrize(
    "rules", [{"embed": 0.5, "head": 0.6}, {"embed": 0.5, "head": None}, {"head": None, nn.Embedding: 0.5}]
)
def test_different_rules_for_one_weight_are_refused(rules: Any) -> None:
    model = Model()
    with pytest.raises(ValueError, match=r"rules must say the same of tied layers, got different rules"):
        sparsify(model, rules)
    assert type(model.embed) is nn.Embedding


def test_a_rule_for_everything_leaves_both_dense_and_says_so() -> None:
    reason = "shares its weight or bias: 'embed' and 'head' hold the same one; a key for these alone"
    plan = plan_sparsify(Model(), 0.5)
    assert [each.name for each in plan.layers] == ["body"]
    assert all(each.reason.startswith(reason) for each in plan.left)
    assert [each.name for each in plan.left] == ["embed", "head"]
    model = Model()
    with pytest.warns(UserWarning, match="as they are: 'head' shares its weight") as caught:
        sparsify(model, 0.5)
    assert "'embed' shares" not in str(caught[0].message)
    assert model.head.weight is model.embed.weight
    both = sparsify(Model(), {"*": 0.5, "head": 0.5})
    assert [type(each) for each in both.children()] == [SparseEmbedding, SparseLinear, TiedLinear]


def test_an_embedding_alone_needs_a_key_of_its_own() -> None:
    model = sparsify(Model(tied=False), 0.5)
    assert [type(each) for each in model.children()] == [nn.Embedding, SparseLinear, SparseLinear]
    (left,) = plan_sparsify(Model(tied=False), 0.5).left
    assert str(left).startswith("'embed' is looked up, not multiplied; a key for such layers alone")
    for rules in ({"embed": 0.5, "*": 0.9}, {"*": 0.9, "emb*": 0.5}, {"*": 0.9, nn.Embedding: 0.5}):
        model = sparsify(Model(tied=False), rules)
        assert type(model.embed) is SparseEmbedding, rules
        assert model.embed.sparsity == 0.5
    assert type(sparsify(Model(tied=False), {"e*": None, "body": 0.5, "embed": 0.5}).embed) is nn.Embedding


def test_a_plan_counts_the_weight_once() -> None:
    model = Model()
    plan = plan_sparsify(model, {"head": 0.5})
    (layer,) = plan.layers
    assert (layer.name, layer.kind, layer.becomes) == ("embed", "Embedding", "SparseEmbedding")
    assert (layer.shape, layer.connections) == ((N, DIM), 33)
    assert plan.left == ()
    assert plan.parameters_swapped + plan.parameters_left + plan.parameters_elsewhere == 66 + 42 + 11
    assert plan.parameters_swapped == 66
    sparsify(model, {"head": 0.5})
    held = {id(each): each.nbytes for each in (*model.parameters(), *model.buffers())}
    assert plan.bytes_after == sum(held.values())


@pytest.mark.parametrize("act", [prune, allocate])
def test_budgets_mind_what_is_named(act: Any) -> None:
    rules = act(Model(tied=False), 0.5, include=["embed", "body"])
    assert list(rules) == ["embed", "body"]
    model = sparsify(Model(), act(Model(), 0.5, include=["head", "body"]))
    assert type(model.head) is TiedLinear
    with pytest.warns(UserWarning, match="'head' shares its weight"):
        assert list(act(Model(), 0.5)) == ["body"]


def test_pruning_a_tied_model_keeps_the_largest() -> None:
    model = Model()
    dense = model.embed.weight.detach().clone()
    prune(model, 0.5, include=["embed"])
    expected = torch.where(dense.abs() >= dense.abs().flatten().topk(33).values[-1], dense, 0)
    assert torch.equal(model.head.weight.detach().to_dense(), expected)


def test_pairs_that_are_not_understood_stay_dense() -> None:
    models = [Model(), Model(), Model()]
    models[0].second = nn.Embedding(N, DIM)  # two embeddings
    models[0].second.weight = models[0].embed.weight
    models[1].head.register_forward_hook(lambda *args: None)
    models[2].embed.sparse = True
    for model in models:
        (left, *_) = [each for each in plan_sparsify(model, 0.5).left if each.name == "head"]
        assert left.reason.startswith("shares its weight or bias") or left.reason.startswith("has")
        with pytest.raises(ValueError, match="must not name a layer that cannot be swapped, got 'head'"):
            sparsify(model, {"head": 0.5})


def test_a_kind_without_embeddings_is_refused() -> None:
    block = {"layer": "block", "sparsity": 0.5}
    for name in ("embed", "head"):
        with pytest.raises(ValueError, match=r"must replace one of Linear, got 'embed', a Embedding"):
            sparsify(Model(), {name: block})


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Model()
    materialize(sparsify(model, {"head": 0.5, "body": 0.5}))
    assert model.head.layer is model.embed
    assert torch.isfinite(model(NUMBERS)).all()
