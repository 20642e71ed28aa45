"""One-shot pruning against a plain sort of all weights, and the baseline it is part of."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from sparselab import SparseLinear, sparsify
from sparselab.dst import prune, train_prune_finetune


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 20, dtype=dtype), nn.ReLU(), nn.Linear(20, 15, bias=False, dtype=dtype), nn.ReLU(),
        nn.Linear(15, 3, dtype=dtype),
    )  # fmt: skip


def kept_weights(model):
    """``{(layer, position): weight}`` of the sparse layers."""
    return {
        (name, position): weight
        for name, layer in model.named_modules()
        if isinstance(layer, SparseLinear)
        for position, weight in zip(
            layer.positions().tolist(), layer.weight_values.flatten().tolist(), strict=True
        )
    }


def largest(model, names, total):
    """The same by sorting; the layers' own best come first."""
    order = []
    for index, name in enumerate(names):
        weights = model.get_submodule(name).weight.reshape(-1).tolist()
        best = max(range(len(weights)), key=lambda at: abs(weights[at]))
        order += [(at != best, -abs(weight), index, at, name, weight) for at, weight in enumerate(weights)]
    return {(name, at): weight for _, _, _, at, name, weight in sorted(order)[:total]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("ties", [False, True])
def test_the_largest_of_the_network_stay(sparsity, ties, dtype):
    model = mlp(dtype)
    with torch.no_grad():
        model[0].weight.mul_(0.01)  # so small that a threshold alone would leave it nothing
        if ties:
            for parameter in model.parameters():
                parameter.copy_((parameter * 4).round())
    names = ["0", "2", "4"]
    expected = largest(model, names, round((1 - sparsity) * 585))
    biases = [copy.deepcopy(model[i].bias) for i in (0, 2, 4)]
    rules = prune(model, sparsity, "network")
    assert kept_weights(model) == expected
    assert {name for name, _ in expected} == set(names)
    assert rules == {name: model.get_submodule(name).sparsity for name in names}
    for i, bias in zip((0, 2, 4), biases, strict=True):
        assert model[i].bias is None if bias is None else torch.equal(model[i].bias, bias)


def test_the_largest_of_each_layer_stay():
    model = mlp()
    expected = {}
    for name in ("0", "2", "4"):
        expected |= largest(model, [name], round(0.2 * model.get_submodule(name).weight.numel()))
    assert prune(model, 0.8) == pytest.approx({"0": 0.8, "2": 0.8, "4": 0.8})
    assert kept_weights(model) == expected


def test_what_is_not_a_number_goes_first():
    model = mlp()
    with torch.no_grad():
        model[0].weight[:10] = torch.nan
        model[2].weight.fill_(torch.nan)
        model[4].weight[0, 0] = torch.inf
    prune(model, 1 - 166 / 585, "network")
    weights = kept_weights(model)
    assert len(weights) == 166
    assert sum(weight != weight for weight in weights.values()) == 1  # 120 + 45 numbers, and one per layer
    assert weights["4", 0] == torch.inf


def test_the_rules_build_a_new_model_of_the_same_counts():
    pruned, fresh = mlp(), mlp()
    rules = prune(pruned, 0.9, "network", exempt="4")
    assert set(rules) == {"0", "2"}
    sparsify(fresh, rules)
    assert [fresh[i].nnz for i in (0, 2)] == [pruned[i].nnz for i in (0, 2)]
    assert type(pruned[4]) is nn.Linear


def test_patterns_include_and_exempt():
    model = mlp()
    assert prune(model, 0.5, include=["0", "4"], exempt=["4"]) == {"0": 0.5}
    assert type(model[2]) is type(model[4]) is nn.Linear


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"scope": "model"}, ValueError, 'scope must be "layer" or "network", got \'model\''),
        ({"sparsity": 1.5}, ValueError, "sparsity must be a finite number"),
        ({"sparsity": "high"}, TypeError, "sparsity must be a number"),
        ({"include": "head"}, ValueError, "got 'head' without one"),
        ({"exempt": "head"}, ValueError, "got 'head' without one"),
        ({"exempt": "*"}, ValueError, "include must match a layer that exempt does not"),
        (
            {"scope": "network", "sparsity": 0.997},
            ValueError,
            "each of the 3 layers, got 0.997, which leaves 2",
        ),
    ],
)
@pytest.mark.parametrize(
    "call", [prune, partial(train_prune_finetune, train=lambda model: pytest.fail("trained"))]
)
def test_misuse_is_named_before_anything_happens(settings, error, message, call):
    model = mlp()
    with pytest.raises(error, match=message):
        call(model, **{"sparsity": 0.5, **settings})
    assert all(type(model[i]) is nn.Linear for i in (0, 2, 4))


def test_a_model_that_is_sparse_already_is_said_to_be_so():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    prune(model, 0.5)
    expected = r"model must have dense layers, got sparse ones only: 0\. sparselab.GMP prunes them further"
    with pytest.raises(ValueError, match=expected):
        prune(model, 0.75)


def test_a_layer_that_cannot_be_sparse_is_named_before_the_training():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"torch.float16, got torch.complex64"):
        train_prune_finetune(model, lambda model: pytest.fail("trained"), 0.5)


def test_train_prune_finetune_does_so_in_this_order():
    model, called = mlp(), []

    def train(model):
        called.append((type(model[0]).__name__, "train"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 12)).square().sum().backward()
            optimizer.step()

    expected = mlp()
    train(expected)
    prune(expected, 0.9, "network", exempt="4")
    train(expected)
    called.clear()
    assert train_prune_finetune(model, train, 0.9, "network", exempt="4") is model
    assert called == [("Linear", "train"), ("SparseLinear", "train")]
    assert kept_weights(model) == kept_weights(expected)
    assert torch.equal(model[4].weight, expected[4].weight)


def test_fine_tuning_may_be_another_function():
    called = []
    train_prune_finetune(
        mlp(),
        lambda model: called.append("train"),
        0.5,
        finetune=lambda model: called.append(f"tune {type(model[0]).__name__}"),
    )
    assert called == ["train", "tune SparseLinear"]
