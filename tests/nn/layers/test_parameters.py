"""The Parameter of every kind of layer has a shape and a name that other people's rules understand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from sparselab import BlockSparseLinear, FanInLinear, MaskedLinear, RigL, SparseConv2d, SparseLinear

KINDS: dict[str, Callable[[], Any]] = {
    "linear": lambda: SparseLinear(20, 10, sparsity=0.5),
    "fan-in": lambda: FanInLinear(20, 10, fan_in=4),
    "blocks": lambda: BlockSparseLinear(20, 10, sparsity=0.5, block_shape=(4, 2)),
    "convolution": lambda: SparseConv2d(4, 6, 3, sparsity=0.5),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def images_or_tokens(layer: Any) -> torch.Tensor:
    return torch.randn(2, 4, 5, 5) if isinstance(layer, SparseConv2d) else torch.randn(3, 20)


@every_kind
def test_one_shape_in_every_kind(kind: str) -> None:
    layer = KINDS[kind]()
    assert layer.weight_values.shape == (layer.nnz, *layer.block_shape)
    assert layer.indices.shape == (layer.nnz,)
    assert layer.stored is layer.weight_values
    assert layer.n_weights <= layer.weight_values.numel()


def decayed_by_nanogpt(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad and p.dim() >= 2}


def decayed_by_timm(model: nn.Module) -> set[str]:
    return {
        name for name, p in model.named_parameters()
        if p.requires_grad and not (p.ndim <= 1 or name.endswith(".bias"))
    }  # fmt: skip


@every_kind
@pytest.mark.parametrize("rule", [decayed_by_nanogpt, decayed_by_timm])
def test_rules_for_weight_decay_decay_the_weights_alone(
    kind: str, rule: Callable[[nn.Module], set[str]]
) -> None:
    model = nn.Sequential(KINDS[kind](), nn.Linear(4, 4), nn.LayerNorm(4))
    assert rule(model) == {"0.weight_values", "1.weight"}


@every_kind
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_an_optimizer_for_matrices_refuses_packed_weights(kind: str) -> None:
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon([KINDS[kind]().weight_values], lr=0.1)


class Doubled(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return 2 * values


@every_kind
def test_a_parametrization_computes_the_weights(kind: str) -> None:
    layer = KINDS[kind]()
    twin, x = copy.deepcopy(layer), images_or_tokens(layer)
    parametrize.register_parametrization(layer, "weight_values", Doubled())
    with torch.no_grad():
        twin.weight_values.mul_(2)
    y = layer(x)
    torch.testing.assert_close(y, twin(x))
    y.sum().backward()
    twin(x).sum().backward()
    original = layer.parametrizations.weight_values.original
    torch.testing.assert_close(original.grad, 2 * twin.weight_values.grad)
    with pytest.raises(TypeError, match=r"to_dense must not lose .*, got a parametrization of weight_values"):
        layer.to_dense()
    with pytest.raises(TypeError, match=r"weight_values must be a Parameter .*; remove its parametrization"):
        layer.rewrite(torch.arange(1), torch.empty(0, dtype=torch.int64))
    parametrize.remove_parametrizations(layer, "weight_values")
    torch.testing.assert_close(layer(x), y)


@every_kind
def test_weight_norm(kind: str) -> None:
    layer = KINDS[kind]()
    x = images_or_tokens(layer)
    expected = layer(x)
    parametrizations.weight_norm(layer, name="weight_values")
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()


@pytest.mark.parametrize("kind", [*KINDS, "masked"])
@pytest.mark.parametrize("number", [torch.inf, torch.nan, 1e30])
def test_what_a_forward_mask_leaves_out_is_zero_whatever_it_is(kind: str, number: float) -> None:
    layer = MaskedLinear(20, 10, sparsity=0.5) if kind == "masked" else KINDS[kind]()
    x = images_or_tokens(layer).requires_grad_()
    mask = torch.ones_like(layer.stored, dtype=torch.bool)
    mask.view(-1)[::3] = False
    twin = copy.deepcopy(layer)
    layer.forward_mask = mask
    with torch.no_grad():
        layer.stored[~mask] = number
        twin.stored[~mask] = 0
    if kind == "masked":
        with torch.no_grad():
            layer.weight[~layer.mask] = 0
    y = layer(x)
    torch.testing.assert_close(y, twin(x))
    assert y.isfinite().all()
    (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(dx, torch.autograd.grad(twin(x).sum(), x)[0])
    y.sum().backward()
    twin(x).sum().backward()
    torch.testing.assert_close(layer.stored.grad, twin.stored.grad)
    torch.testing.assert_close(torch.func.vmap(layer)(x[None])[0], y)


COPIES = {
    "deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "copy": copy.copy
}  # fmt: skip


@pytest.mark.parametrize("how", COPIES)
@every_kind
def test_a_copy_of_an_attached_layer_shares_nothing_with_its_algorithm(kind: str, how: str) -> None:
    layer = KINDS[kind]()
    x = images_or_tokens(layer)
    layer(x).sum().backward()
    algorithm = RigL(update_freq=1, scope="row") if kind == "fan-in" else RigL(update_freq=1)
    layer.apply(algorithm)
    layer.zero_grad()
    twin = COPIES[how](layer)
    assert twin.gradient_hook is None
    assert twin.storage is not layer.storage
    if how == "copy":
        return  # torch's shallow copies share their Parameters
    layer(x).sum().backward()
    born = twin.positions().clone()
    twin(x).sum().backward()
    algorithm.step()
    assert torch.equal(twin.positions(), born)
    assert algorithm.last_update[0].grown > 0


README: dict[str, Callable[[], Any]] = {
    "linear": lambda: SparseLinear(1536, 384, sparsity=0.9),
    "blocks": lambda: BlockSparseLinear(1024, 256, density=0.1),
    "fan-in": lambda: FanInLinear(1536, 384, fan_in=154),
    "masked": lambda: MaskedLinear(64, 32, density=0.1),
    "convolution": lambda: SparseConv2d(64, 128, 3, padding=1, density=0.1),
}


@pytest.mark.parametrize("kind", README)
def test_the_same_words_in_every_class(kind: str) -> None:
    layer = README[kind]()
    assert layer.density == pytest.approx(0.1, abs=0.01)
    cls, dense = type(layer), layer.to_dense()
    assert cls.from_dense(dense).density == pytest.approx(0.1, abs=0.01)
    assert cls.from_dense(dense, 0.5).density == pytest.approx(0.5, abs=0.03)
    assert cls.from_dense(dense, density=0.5).density == pytest.approx(0.5, abs=0.03)
    for wrong in ({"sparsity": 0.5, "density": 0.5}, {"density": 2.0}, {"sparsity": -1.0}):
        with pytest.raises(ValueError, match=r"sparsity|density"):
            cls.from_dense(dense, **wrong)
    arguments = (4, 4, 3) if kind == "convolution" else (8, 8)
    with pytest.raises(
        TypeError, match=r"bias must be True or False, got 0.9; for a sparsity write .*sparsity=0.9\)"
    ):
        cls(*arguments, bias=0.9)
    with pytest.raises(TypeError, match="positional"):
        cls(*arguments, *([1] * 10))
