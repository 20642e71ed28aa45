"""What may be written to the weight of a sparse layer, and what not: live weights alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import init

from sparselab import BlockSparseLinear, SparseLinear
from tests.nn.weight.rows import DOUBLE, every_kind, input_of, make, spread

REFUSED: dict[str, Callable[[Any], Any]] = {
    "a Parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(layer.weight_shape))),
    "a tensor": lambda layer: setattr(layer, "weight", torch.zeros(layer.weight_shape)),
    "None": lambda layer: setattr(layer, "weight", None),
    "another's": lambda layer: setattr(layer, "weight", copy.deepcopy(layer).weight),
    "its transpose": lambda layer: setattr(layer, "weight", layer.weight.T if layer.weight.ndim == 2 else 0),
    "its copy": lambda layer: setattr(layer, "weight", layer.weight.float()),
    "what is detached": lambda layer: setattr(layer, "weight", layer.weight.detach()),
    "data of a copy": lambda layer: setattr(layer.weight, "data", layer.weight.data.float()),
    "register": lambda layer: layer.register_parameter("weight", None),
    "an item": lambda layer: layer.weight.data.__setitem__(0, 1.0),
    "a slice": lambda layer: layer.weight.__setitem__(slice(None), 1.0),
    "copy_": lambda layer: layer.weight.data.copy_(torch.zeros(layer.weight_shape)),
    "copy_ of its own": lambda layer: layer.weight.data.copy_(layer.weight),
    "data": lambda layer: setattr(layer.weight, "data", torch.zeros(layer.weight_shape)),
    "masked_fill_": lambda layer: layer.weight.data.masked_fill_(torch.ones(1, dtype=torch.bool), 0),
    "index_fill_": lambda layer: layer.weight.data.index_fill_(0, torch.zeros(1, dtype=torch.int64), 0),
    "exponential_": lambda layer: layer.weight.data.exponential_(),
    "clip_": lambda layer: layer.weight.data.clip_(0, 1),
}


@pytest.mark.parametrize("what", REFUSED)
@every_kind
def test_what_would_write_more_is_refused(kind: str, what: str) -> None:
    layer = make(kind)
    before = layer.weight.to_dense()
    with pytest.raises(
        TypeError, match=r"must not write to a sparse weight.*: write to layer\.weight_values"
    ):
        REFUSED[what](layer)
    assert torch.equal(layer.weight.to_dense(), before)
    assert "weight" not in layer._parameters


@every_kind
@pytest.mark.parametrize("name", ["mul_", "div_", "add_"])
def test_a_tensor_is_no_number(kind: str, name: str) -> None:
    layer = make(kind)
    before = layer.weight.to_dense()
    with pytest.raises(TypeError, match=f"{name} of a sparse weight must be given numbers, got a tensor"):
        getattr(layer.weight.data, name)(torch.ones(layer.weight_shape, dtype=DOUBLE))
    assert torch.equal(layer.weight.to_dense(), before)


IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "mul_": lambda w: w.mul_(3),
    "mul_ by a tensor": lambda w: w.mul_(torch.tensor(3.0)),
    "div_": lambda w: w.div_(2**2),
    "zero_": lambda w: w.zero_(),
    "add_": lambda w: w.add_(0.5),
    "fill_": lambda w: w.fill_(0.5),
    "clamp_": lambda w: w.clamp_(min=0.1, max=0.2),
}


@pytest.mark.parametrize("what", IN_PLACE)
@every_kind
def test_numbers_in_place(kind: str, what: str) -> None:
    layer = make(kind)
    live = spread(layer, torch.ones_like(layer.weight_values)).bool()
    expected = torch.where(live, IN_PLACE[what](layer.weight.to_dense().detach()), 0)
    version, x = layer.weight_values._version, input_of(layer)
    y = layer(x)
    result = IN_PLACE[what](layer.weight.data)
    assert result.shape == layer.weight.shape
    assert torch.equal(layer.weight.to_dense(), expected)
    assert layer.weight_values._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    make(kind).load_state_dict(layer.state_dict())  # which refuses weights beyond the matrix


def test_in_place_as_of_a_parameter() -> None:
    layer = make("single")
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        layer.weight.mul_(2)
    before = layer.weight.to_dense().detach()
    layer.weight.data *= 2
    with torch.no_grad():
        layer.weight *= 2
        layer.weight /= 8
    torch.testing.assert_close(layer.weight.to_dense(), before / 2)


INITS: dict[str, Callable[[Any], Any]] = {
    "normal_": lambda w: init.normal_(w, 0.5, 0.1),
    "uniform_": lambda w: init.uniform_(w, 1, 2),
    "trunc_normal_": lambda w: init.trunc_normal_(w, 0, 1, -0.5, 0.5),
    "trunc_normal_, away from 0": lambda w: init.trunc_normal_(w, 1, 0.5, 0.5, 1.5),
    "zeros_": lambda w: init.zeros_(w),
    "ones_": lambda w: init.ones_(w),
    "constant_": lambda w: init.constant_(w, 0.5),
    "generator": lambda w: init.normal_(w, generator=torch.Generator().manual_seed(3)),
}


@pytest.mark.parametrize("what", INITS)
@every_kind
def test_torch_draws_live_weights_alone(kind: str, what: str) -> None:
    layer = make(kind)
    twin = copy.deepcopy(layer)
    torch.manual_seed(1)
    result = INITS[what](layer.weight)
    assert result is not None
    torch.manual_seed(1)
    INITS[what](twin.weight_values)
    assert torch.equal(layer.weight.to_dense(), spread(twin, twin.weight_values))
    assert layer.weight_values.requires_grad
    make(kind).load_state_dict(layer.state_dict())  # which refuses weights beyond the matrix


@every_kind
def test_the_data_is_drawn_as_models_write_it(kind: str) -> None:
    layer = make(kind)
    twin = copy.deepcopy(layer)
    torch.manual_seed(1)
    layer.weight.data.normal_(mean=0.0, std=0.02)
    torch.manual_seed(1)
    twin.weight_values.data.normal_(mean=0.0, std=0.02)
    assert torch.equal(layer.weight.to_dense(), spread(twin, twin.weight_values))


FANS: dict[str, Callable[[Any], Any]] = {
    "xavier_uniform_": init.xavier_uniform_,
    "xavier_normal_": init.xavier_normal_,
    "kaiming_uniform_": lambda w: init.kaiming_uniform_(w, mode="fan_out"),
    "kaiming_normal_": lambda w: init.kaiming_normal_(w, nonlinearity="relu"),
}


@pytest.mark.parametrize("what", FANS)
def test_fans_are_those_of_the_dense_weight(what: str) -> None:
    layer = SparseLinear(300, 200, sparsity=0.9)
    dense = torch.empty(200, 300)
    FANS[what](layer.weight)
    FANS[what](dense)
    assert layer.weight_values.std().item() == pytest.approx(dense.std().item(), rel=0.05)


@pytest.mark.parametrize("name", ["orthogonal_", "dirac_", "eye_", "sparse_"])
@every_kind
def test_what_sets_more_than_live_weights_is_refused_by_name(kind: str, name: str) -> None:
    layer = make(kind)
    before = layer.weight_values.detach().clone()
    arguments = (0.5,) if name == "sparse_" else ()
    with pytest.raises(TypeError, match=name):
        getattr(init, name)(layer.weight, *arguments)
    assert torch.equal(layer.weight_values, before)


def test_a_narrow_truncation_is_refused_before_anything_is_drawn() -> None:
    layer = make("single")
    before = layer.weight_values.detach().clone()
    try:
        init.trunc_normal_(layer.weight, 0, 1, 2, 2.5)
    except TypeError as error:
        assert "layer.weight_values" in str(error)  # noqa: PT017
        assert torch.equal(layer.weight_values, before)
    else:  # versions of torch that draw without another tensor
        assert ((layer.weight_values >= 2) & (layer.weight_values <= 2.5)).all()


def test_a_copy_in_another_dtype_is_written_alone() -> None:
    layer = BlockSparseLinear(10, 10, sparsity=0.3, block_shape=(4, 4))
    before = layer.weight.to_dense().detach()
    wide = layer.weight.data.double()
    wide.fill_(2)
    assert torch.equal(layer.weight.to_dense(), before)
    assert torch.equal(wide.to_dense() == 2, spread(layer, torch.ones_like(layer.weight_values)) == 1)


def test_rescaling_as_rwkv_does() -> None:
    layer = make("blocks")
    x: Tensor = input_of(layer)
    expected = (layer(x) - layer.bias) / 4
    with torch.no_grad():
        layer.weight.div_(2**2)
    torch.testing.assert_close(layer(x) - layer.bias, expected)
