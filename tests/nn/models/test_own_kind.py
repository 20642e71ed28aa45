"""A kind of layer from outside the package: one registration takes it through every tool for whole models."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparselab import (
    SparseLinear,
    condense,
    densify,
    load_model,
    materialize,
    measure_sparsity,
    memory_report,
    plan_sparsify,
    save_model,
    sparsify,
)
from sparselab.nn import DenseType, LayerKind, LinearView, register_dense, register_kind, whole
from sparselab.nn.layers.dense import DenseLayer, forget_dense
from sparselab.nn.layers.kinds import find_kind, forget_kind, kind_of, recognise
from sparselab.nn.models.rules import layers_of_saved, rule_of_saved


class Doubled(SparseLinear):
    """Twice what its weights say, with a gain of its own; so everything that forgets it is seen."""

    tensor_names = (*SparseLinear.tensor_names, "gain")

    def __init__(self, *sizes: int, gain: float = 2.0, **others: Any) -> None:
        super().__init__(*sizes, **others)
        self.register_buffer("gain", torch.full((1,), gain))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * super().forward(x)

    def to_dense(self) -> nn.Linear:
        linear = super().to_dense()
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.mul_(self.gain)
        return linear

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, sparsity: float = 0.9, *, gain: float = 2.0, **others: Any
    ) -> Doubled:
        layer = super().from_dense(linear, sparsity, **others)
        assert isinstance(layer, Doubled)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.div_(gain)
            layer.gain.fill_(gain)
        return layer


def recognises(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    return {} if "gain" in state else None


@pytest.fixture(autouse=True)
def _doubled() -> Iterator[None]:
    kind = register_kind(LayerKind("doubled", Doubled, (nn.Linear,), ("gain",), recognises))
    yield
    forget_kind(kind)


RULES = {"0": {"layer": "doubled", "sparsity": 0.5, "gain": 3.0}}


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("init", ["random", "magnitude"])
def test_sparsify_makes_it_and_densify_takes_it_back(init: Any) -> None:
    sparse = sparsify(model(), RULES, init=init)
    assert type(sparse[0]) is Doubled
    assert (sparse[0].nnz, sparse[0].gain.item(), measure_sparsity(sparse[0])) == (48, 3.0, 0.5)
    x = torch.randn(5, 12)
    expected = sparse(x)
    dense = densify(sparse)
    assert type(dense[0]) is nn.Linear
    torch.testing.assert_close(dense(x), expected)


def test_magnitude_keeps_what_it_computes() -> None:
    dense = model()
    x = torch.randn(5, 12)
    expected = dense(x)
    sparsify(dense, {"0": {"layer": "doubled", "sparsity": 0.0}}, init="magnitude")
    torch.testing.assert_close(dense(x), expected)


def test_a_plan_lists_it_and_its_memory() -> None:
    (planned,) = plan_sparsify(model(), RULES).layers
    assert (planned.becomes, planned.connections) == ("Doubled", 48)
    sparse = sparsify(model(), RULES)
    report = memory_report(sparse[0])
    assert planned.bytes_after == report.weight_bytes
    assert (report.parameters_live, report.parameters_dense) == (48 + 8, 96 + 8)


def test_it_can_begin_on_the_meta_device() -> None:
    with torch.device("meta"):
        sparse = model()
    materialize(sparsify(sparse, {"0": {"layer": "doubled", "sparsity": 0.5}}))
    assert sparse[0].nnz == 48


def test_it_is_saved_recognised_and_loaded(tmp_path: Path) -> None:
    source, file = sparsify(model(), RULES), tmp_path / "model.safetensors"
    save_model(source, file)
    assert rule_of_saved(source[0].state_dict()) == {"layer": "doubled", "sparsity": 0.9}
    target = sparsify(model(), layers_of_saved(source.state_dict()))
    load_model(target, file)
    x = torch.randn(5, 12)
    assert torch.equal(target(x), source(x))


def test_condense_says_that_its_kind_is_not_condensed() -> None:
    first = Doubled.from_pattern(torch.arange(8)[:, None] % 2 * torch.ones(8, 12) == 1)
    sparse = nn.Sequential(first, nn.ReLU(), nn.Linear(8, 3)).eval()
    with pytest.warns(UserWarning, match="'0' is of kind 'doubled', which is not condensed"):
        assert condense(sparse) == ()


class Plain(SparseLinear):
    """A kind that differs by nothing but its name."""


def test_a_kind_that_condenses_stays_of_its_kind() -> None:
    kind = register_kind(LayerKind("plain", Plain, (nn.Linear,), condenses=True))
    try:
        first = Plain.from_pattern(torch.arange(8)[:, None] % 2 * torch.ones(8, 12) == 1)
        sparse = nn.Sequential(first, nn.Sigmoid(), nn.Linear(8, 3)).eval()
        x = torch.randn(5, 12)
        expected = sparse(x)
        (found,) = condense(sparse)
        assert (found.outputs_after, type(sparse[0])) == (4, Plain)
        torch.testing.assert_close(sparse(x), expected)
    finally:
        forget_kind(kind)


def test_the_registry_answers_and_refuses() -> None:
    layer = Doubled(4, 3)
    kind = kind_of(layer)
    assert kind is not None
    assert kind.name == "doubled"
    assert kind_of(Plain(4, 3)) is None
    assert find_kind("doubled", nn.Conv2d(1, 1, 1)) is None
    found = recognise(layer.state_dict())
    assert found is not None
    assert found[0] is kind
    assert recognise({"weight": torch.ones(2, 2)}) is None
    with pytest.raises(ValueError, match="got 'doubled' for Plain, which Doubled has"):
        register_kind(LayerKind("doubled", Plain, (nn.Linear, nn.Conv2d)))
    with pytest.raises(ValueError, match=r'layer must be one of "sparse", .*"doubled", got \'trebled\''):
        find_kind("trebled", nn.Linear(1, 1))
    with pytest.raises(ValueError, match="kind 'doubled' must replace one of Linear, got '0', a Conv2d"):
        sparsify(nn.Sequential(nn.Conv2d(1, 1, 1)), {"0": {"layer": "doubled", "sparsity": 0.5}})


class Transposed(nn.Module):
    """A dense layer of one's own, with its weight the other way round."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def see(module: Any) -> list[DenseLayer]:
    view = LinearView(module.weight.t(), module.bias, module.training, Transposed)
    return [DenseLayer(module, "", view, (module.weight, module.bias))]


def restore(linear: nn.Linear, cls: type[Any]) -> nn.Module:
    new: nn.Module = cls(linear.in_features, linear.out_features)
    new.load_state_dict({"weight": linear.weight.t(), "bias": linear.bias})
    return new


def test_a_dense_layer_of_one_s_own_goes_there_and_back() -> None:
    dense = register_dense(DenseType(Transposed, see, restore=restore))
    try:
        sparse = sparsify(nn.Sequential(Transposed(12, 8), nn.ReLU()), {"0": 0.5}, init="magnitude")
        assert type(sparse[0]) is SparseLinear
        x = torch.randn(5, 12)
        expected = copy.deepcopy(sparse)(x)
        assert type(densify(sparse)[0]) is Transposed
        torch.testing.assert_close(sparse(x), expected)
    finally:
        forget_dense(dense)


class Renamed(nn.Linear):
    """A subclass of which its owner knows that it computes the same."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_subclass_that_is_registered_is_swapped() -> None:
    dense = register_dense(DenseType(Renamed, whole))
    try:
        assert type(sparsify(nn.Sequential(Renamed(4, 4)), {"*": 0.5})[0]) is SparseLinear
    finally:
        forget_dense(dense)
    with pytest.raises(ValueError, match="'0' is of class Renamed"):
        sparsify(nn.Sequential(Renamed(4, 4)), {"*": 0.5})
