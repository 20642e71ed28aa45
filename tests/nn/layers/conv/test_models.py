"""Convolutions in whole models: made sparse and dense again, pruned, and watched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparselab import (
    AveragedModel,
    MaskedConv2d,
    SparseConv2d,
    SparseLinear,
    densify,
    load_model,
    materialize,
    measure_sparsity,
    plan_sparsify,
    save_model,
    sparsify,
)
from sparselab.dst import allocate, prune
from sparselab.nn.ops.conv.operands import ConvolutionOperands
from tests.nn.layers.conv.rows import NAMES, dense_of, dims, is_transposed
from tests.nn.layers.conv.test_sparse import KINDS, gradients, images, make


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, bias=False), nn.Flatten(),
        nn.Linear(8 * 3 * 3, 4),
    )  # fmt: skip


@pytest.mark.parametrize("layer", ["sparse", "masked"])
def test_models_are_made_sparse_and_dense_again(layer: Any) -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    plan = plan_sparsify(model, {"2": 0.5, "*": 0.25})
    assert [(each.shape, each.connections) for each in plan.layers] == [
        ((8, 3, 3, 3), 162), ((8, 8, 3, 3), 288), ((4, 72), 216)
    ]  # fmt: skip
    sparsify(model, {"2": 0.5, "*": 0.25}, layer=layer, init="magnitude")
    kind = SparseConv2d if layer == "sparse" else MaskedConv2d
    assert [type(each) is kind for each in model] == [True, False, True, False, False]
    assert measure_sparsity(model) == pytest.approx(1 - 666 / (216 + 576 + 288)) or layer == "masked"
    y = model(x)
    densify(model)
    assert [type(model[i]) for i in (0, 2, 4)] == [nn.Conv2d, nn.Conv2d, nn.Linear]
    torch.testing.assert_close(model(x), y)


def test_the_same_seed_gives_both_kinds_the_same_model() -> None:
    models = []
    for layer in ("sparse", "masked"):
        model = network()
        torch.manual_seed(5)
        models.append(sparsify(model, {"*": 0.6}, layer=layer))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(models[0](x), models[1](x))


def test_budgets_and_pruning_count_kernels() -> None:
    rules = allocate(network(), 0.8, "erk")
    sizes = {"0": 216, "2": 576, "4": 288}
    assert list(rules) == list(sizes)
    counts = {name: round((1 - rules[name]) * size) for name, size in sizes.items()}
    assert sum(counts.values()) == round(0.2 * sum(sizes.values()))
    # Density in proportion to (out + in + height + width) / (out * in * height * width).
    density = {"0": 17 / 216, "2": 22 / 576, "4": 76 / 288}
    ratio = {name: counts[name] / sizes[name] / density[name] for name in sizes}
    assert ratio["0"] == pytest.approx(ratio["2"], rel=0.05)
    model = network()
    rules = prune(model, 0.75, "network")
    assert isinstance(model[0], SparseConv2d)
    assert isinstance(model[4], SparseLinear)
    assert sum(model[int(name)].nnz for name in rules) == 270


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_see_the_dense_gradient(kind: Any, groups: int) -> None:
    layer = make(kind, 4, 6, (3, 2), stride=(2, 1), groups=groups, padding=(1, 0))
    x = images(3, 4, 6, 5)
    seen: list[ConvolutionOperands] = []
    layer.gradient_hook = seen.append
    gradients(layer, x)
    (operands,) = seen
    expected = gradients(layer.to_dense(), x)[2].flatten(1)
    whole = torch.full((4, expected.shape[1]), torch.nan, dtype=torch.float64)
    operands.add_rows(1, whole, beta=0)
    torch.testing.assert_close(whole, expected[1:5])
    operands.add_rows(1, whole, beta=0.5)
    torch.testing.assert_close(whole, 1.5 * expected[1:5])
    positions = np.arange(2, expected.numel(), 5)
    np.testing.assert_allclose(operands.sampled(positions), expected.reshape(-1)[positions], atol=1e-12)
    assert operands.is_finite()
    assert operands.to(torch.float32).x.dtype == torch.float32
    assert operands.n_tokens == 3 * 3 * 4
    unfolded = nn.functional.unfold(x.detach(), (3, 2), padding=(1, 0), stride=(2, 1)).transpose(1, 2)
    tokens, dy = unfolded.reshape(36, -1), operands.dy.permute(0, 2, 3, 1).reshape(36, -1)
    signs = np.where(np.arange(36) % 3, 1.0, -1.0)
    for (rows, columns), combine in (
        (operands.totals(None), torch.abs),
        (operands.totals(signs), torch.from_numpy(signs)[:, None].mul),
    ):
        np.testing.assert_allclose(rows, combine(dy).sum(0))
        np.testing.assert_allclose(columns, combine(tokens).sum(0).reshape(groups, -1).sum(0))
    bad = operands.with_input(operands.x.clone())
    bad.x[0, 0, 0, 0] = torch.inf
    assert not bad.is_finite()


def every_convolution() -> nn.ModuleDict:
    """One of each, that compute of two channels."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            name: dense_of(name)(2, 4, 3, padding=1, **({"output_padding": 0} if is_transposed(name) else {}))
            for name in NAMES
        }
    )


def computed(model: nn.ModuleDict) -> list[torch.Tensor]:
    return [
        layer(torch.linspace(-1, 1, 2 * 4 ** dims(name)).view(1, 2, *[4] * dims(name)))
        for name, layer in model.items()
    ]


@pytest.mark.parametrize("layer", ["sparse", "masked", "fan_in"])
def test_every_convolution_is_made_sparse_and_dense_again(layer: str) -> None:
    model = every_convolution()
    names = [name for name in NAMES if layer != "fan_in" or not is_transposed(name)]
    dense = nn.ModuleDict({name: model[name] for name in names})
    expected, shapes = computed(dense), {n: p.shape for n, p in dense.named_parameters()}
    plan = plan_sparsify(dense, 0.5, layer=layer)
    kind = "Masked" if layer == "masked" else "Sparse"
    assert [(each.kind, each.becomes) for each in plan.layers] == [(n, f"{kind}{n}") for n in names]
    assert plan.left == ()
    sparsify(dense, 0.0, layer=layer, init="magnitude")
    torch.testing.assert_close(computed(dense), expected)
    densify(dense)
    assert [type(dense[name]) for name in names] == [dense_of(name) for name in names]
    assert {n: p.shape for n, p in dense.named_parameters()} == shapes
    sparsify(dense, 0.5, layer=layer)
    for each, planned in zip(dense.values(), plan.layers, strict=True):
        assert (each.nnz, each.sparsity) == (planned.connections, 0.5)
    y = computed(dense)
    torch.testing.assert_close(computed(densify(dense)), y)


def test_a_constant_fan_in_is_not_for_transposed_ones() -> None:
    model = every_convolution()
    with pytest.raises(ValueError, match=r"'fan_in' must replace one of .*Conv1d.*, got 'ConvTranspose1d'"):
        sparsify(model, {"ConvTranspose1d": 0.5}, layer="fan_in")
    with pytest.warns(UserWarning, match="which has no layer of kind 'fan_in'"):
        sparsify(model, 0.5, layer="fan_in")
    assert [name for name in NAMES if type(model[name]) is dense_of(name)] == [
        name for name in NAMES if is_transposed(name)
    ]


def test_both_kinds_of_every_convolution_draw_the_same() -> None:
    models = []
    for layer in ("sparse", "masked"):
        model = every_convolution()
        torch.manual_seed(5)
        models.append(computed(sparsify(model, 0.6, layer=layer)))
    torch.testing.assert_close(*models)


def test_every_convolution_is_pruned_budgeted_saved_and_built_without_memory(tmp_path: Any) -> None:
    sizes = {name: each.weight.numel() for name, each in every_convolution().items()}
    rules = allocate(every_convolution(), 0.8)
    assert list(rules) == NAMES
    counts = [round((1 - rules[name]) * sizes[name]) for name in NAMES]
    assert sum(counts) == round(0.2 * sum(sizes.values()))
    model = every_convolution()
    prune(model, 0.75, "network")
    assert sum(each.nnz for each in model.values()) == round(0.25 * sum(sizes.values()))
    save_model(model, tmp_path / "model")
    with torch.device("meta"):
        other = sparsify(every_convolution(), 0.9)
    assert all(each.weight_values.is_meta for each in other.values())
    load_model(materialize(other, "cpu"), tmp_path / "model")
    torch.testing.assert_close(computed(other), computed(model))
    mean = AveragedModel(model)
    mean.update_parameters(model)
    torch.testing.assert_close(computed(mean.module), computed(model))
