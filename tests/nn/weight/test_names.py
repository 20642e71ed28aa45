"""Tools that find a tensor by its name: right numbers, or an error that leaves the layer as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

from sparselab import SparseLinear
from tests.nn.weight.rows import KINDS, every_kind, input_of, make


class Doubled(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return 2 * values


class Rows(prune.BasePruningMethod):
    """Leave out every third entry."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
        mask = default_mask.clone()
        mask.view(-1)[::3] = 0
        return mask


#: On "weight": what torch says is not always ours to choose, but it says it at once.
ON_WEIGHT: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "weight_norm": (parametrizations.weight_norm, ValueError, "does not have a parameter"),
    "orthogonal": (parametrizations.orthogonal, ValueError, "does not have a parameter"),
    "parametrization": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
        ValueError, "does not have a parameter",
    ),
    "spectral_norm": (parametrizations.spectral_norm, TypeError, r"to_dense\(\)"),
    "hook weight_norm": (utils.weight_norm, KeyError, "weight"),
    "hook spectral_norm": (utils.spectral_norm, KeyError, "weight"),
    "l1": (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), TypeError, "layer.weight_values"),
    "random": (
        lambda layer: prune.random_unstructured(layer, "weight", 0.3),
        TypeError, "layer.weight_values",
    ),
    "structured": (
        lambda layer: prune.ln_structured(layer, "weight", 0.3, 2, 0),
        TypeError, "layer.weight_values",
    ),
    "identity": (lambda layer: prune.identity(layer, "weight"), TypeError, "layer.weight_values"),
    "custom": (
        lambda layer: prune.custom_from_mask(layer, "weight", torch.ones(layer.weight_shape)),
        TypeError, "layer.weight_values",
    ),
    "global": (
        lambda layer: prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=0.3),
        TypeError, "layer.weight_values",
    ),
}  # fmt: skip


@pytest.mark.parametrize("tool", ON_WEIGHT)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@every_kind
def test_on_weight_nothing_is_changed(kind: str, tool: str) -> None:
    apply, error, match = ON_WEIGHT[tool]
    layer = make(kind)
    before, x = copy.deepcopy(layer.state_dict()), input_of(layer)
    y = layer(x)
    with pytest.raises(error, match=match):
        apply(layer)
    assert list(layer.state_dict()) == list(before)
    assert type(layer) is type(KINDS[kind]())
    assert not layer._forward_pre_hooks
    assert torch.equal(layer(x), y)


#: On "weight_values": torch's own arithmetic on a tensor of that shape.
ON_VALUES: dict[str, Callable[[Any], Any]] = {
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_values"),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight_values"),
    "hook weight_norm": lambda m: utils.weight_norm(m, "weight_values"),
    "hook spectral_norm": lambda m: utils.spectral_norm(m, "weight_values"),
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight_values", Doubled()),
    "l1": lambda m: prune.l1_unstructured(m, "weight_values", 0.3),
    "random": lambda m: prune.random_unstructured(m, "weight_values", 0.3),
    "structured": lambda m: prune.ln_structured(m, "weight_values", 0.3, 2, 0),
    "own": lambda m: Rows.apply(m, "weight_values"),
    "global": lambda m: prune.global_unstructured([(m, "weight_values")], prune.L1Unstructured, amount=0.3),
}


@pytest.mark.parametrize("tool", ON_VALUES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@every_kind
def test_on_weight_values_as_on_any_tensor(kind: str, tool: str) -> None:
    layer = make(kind)
    plain = nn.Module()
    plain.weight_values = nn.Parameter(layer.weight_values.detach().clone())
    for module in (layer, plain):
        torch.manual_seed(1)
        ON_VALUES[tool](module)
    layer.eval()
    plain.eval()
    twin, x = make(kind), input_of(layer)
    y = layer(x)
    with torch.no_grad():
        twin.weight_values.copy_(plain.weight_values if tool != "hook spectral_norm" else layer.weight_values)
    torch.testing.assert_close(y, twin(x))
    torch.testing.assert_close(layer.weight.to_dense(), twin.weight.to_dense())
    y.sum().backward()
    assert any(p.grad is not None and p.shape == twin.weight_values.shape for p in layer.parameters())
    with pytest.raises(TypeError, match="must not lose"):
        layer.to_dense()


def decayed(name: str) -> bool:
    return "weight" in name


def decayed_unless_bias(name: str) -> bool:
    return not name.endswith("bias")


@pytest.mark.parametrize("rule", [decayed, decayed_unless_bias])
@every_kind
def test_rules_by_name_decay_live_weights(kind: str, rule: Callable[[str], bool]) -> None:
    model = nn.Sequential(make(kind), nn.Linear(4, 4))
    names = {name for name, _ in model.named_parameters() if rule(name)}
    assert names == {"0.weight_values", "1.weight"}


def test_rules_by_class_decay_live_weights() -> None:
    # As minGPT does: every Parameter of a layer of these classes, and the attribute that its name ends in.
    model = nn.Sequential(SparseLinear(8, 4), nn.LayerNorm(4))
    decay = {
        f"{name}.{each}"
        for name, module in model.named_modules()
        for each, _ in module.named_parameters(recurse=False)
        if not (each.endswith("bias") or isinstance(module, nn.LayerNorm))
    }
    assert decay == {"0.weight_values"}
