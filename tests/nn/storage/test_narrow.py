"""How weights are rounded to bfloat16 and int8, what is refused, and what a layer then holds."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from sparselab import SparseConv2d, SparseEmbedding, SparseLinear
from sparselab.nn.ops.narrow.weights import widened
from sparselab.nn.storage.narrow import find_narrow
from tests.nn.narrow import KINDS, every_dtype, every_kind, layers, spread, weights_of

BF16, INT8 = torch.bfloat16, torch.int8


@given(layer=layers())
def test_every_weight_is_within_half_a_scale(layer: Any) -> None:
    W = spread(layer, layer.weight_values)
    layer.freeze(weights=INT8)
    values, scales = layer.weight_values, layer.weight_scales
    assert (values.dtype, scales.dtype, scales.shape) == (INT8, torch.float32, (layer.out_features,))
    assert bool((values >= -127).all())
    half = scales.double()[:, None] / 2
    # A quotient in float64 may be rounded to one side of a tie that is there exactly.
    assert bool(((W - weights_of(layer)).abs() <= half * (1 + 1e-12)).all())
    largest = W.abs().amax(1) if W.numel() else W.new_zeros(len(W))
    assert torch.equal(scales == 0, largest == 0)
    # No scale is larger than it must be, but for what float32 has next to it.
    least = torch.nextafter(scales, torch.zeros(())).double()
    assert bool((least * 127 <= largest).all())
    # The largest of each row keeps what its row allows.
    if values.numel():
        assert torch.equal(
            spread(layer, values).abs().amax(1)[largest > 1e-30],
            torch.full_like(largest, 127)[largest > 1e-30],
        )


@given(layer=layers())
def test_bfloat16_is_the_nearest(layer: Any) -> None:
    before = layer.weight_values.detach().clone()
    layer.freeze(weights=BF16)
    assert torch.equal(layer.weight_values, before.to(BF16))
    assert find_narrow(layer).scales is None
    assert not hasattr(layer, "weight_scales")


@every_dtype
@given(layer=layers())
def test_what_weights_stand_for_is_the_same_however_it_is_asked(layer: Any, dtype: torch.dtype) -> None:
    layer.freeze(weights=dtype)
    expected = weights_of(layer).float()
    traced = widened(find_narrow(layer), layer.indptr, layer.topology_arguments()[2])
    for found in (layer.in_use, traced):
        assert found.dtype is torch.float32
        assert torch.equal(spread(layer, found).float(), expected)
    assert torch.equal(layer.weight.detach().to_dense(), expected)
    assert torch.equal(layer.to_dense().weight, expected)
    assert torch.equal(layer.to_sparse_csr().to_dense(), expected)
    np.testing.assert_array_equal(layer.to_scipy().toarray(), expected.numpy())


def test_numbers_that_are_known() -> None:
    weights = torch.tensor([127.0, -63.5, 0.4, 1.0, -254.0, 3.0, 0.0, 0.0])
    layer = SparseLinear.from_pattern(torch.ones(4, 2).to_sparse_csr(), bias=False)
    with torch.no_grad():
        layer.weight_values.copy_(weights.view(-1, 1, 1))
    layer.freeze(weights=INT8)
    # Of ties the even one.
    assert layer.weight_values.flatten().tolist() == [127, -64, 51, 127, -127, 2, 0, 0]
    assert layer.weight_scales.tolist()[::2] == [1.0, 2.0]
    assert layer.weight_scales[3] == 0
    assert layer(torch.tensor([[1.0, 2.0]])).tolist()[0][0] == -1.0


@every_kind
@every_dtype
def test_no_number_of_float32_is_left(kind: str, dtype: torch.dtype) -> None:
    layer = KINDS[kind](64, 48)
    nnz, numbers = layer.nnz, layer.weight_values.numel()
    parameter = layer.weight_values
    assert layer.freeze(weights=dtype) is layer
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert parameter.requires_grad is True  # whoever holds it still has it as it was
    held = {name: buffer for name, buffer in layer.named_buffers() if "weight" in name}
    assert held["weight_values"].dtype is dtype
    assert (layer.nnz, layer.weight_values.numel()) == (nnz, numbers)
    assert sum(each.nbytes for each in held.values()) == numbers * dtype.itemsize + (48 * 4) * (dtype is INT8)
    assert f"weights={str(dtype)[6:]}" in repr(layer)


def unchanged(layer: Any, before: dict[str, Tensor]) -> None:
    after = layer.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert isinstance(layer.weight_values, torch.nn.Parameter)
    assert layer.weight_values.requires_grad


@every_kind
@every_dtype
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_refused(kind: str, dtype: torch.dtype, number: float) -> None:
    layer = KINDS[kind](64, 48)
    with torch.no_grad():
        layer.weight_values.view(-1)[7] = number
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=rf"frozen in it, got 1 of \d+ that are not, such as {number}"):
        layer.freeze(weights=dtype)
    unchanged(layer, before)


def test_what_bfloat16_has_no_number_for_is_refused() -> None:
    layer = SparseLinear(8, 4)
    with torch.no_grad():
        layer.weight_values[0] = 3.4e38
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"numbers of bfloat16 .* such as 3\.39"):
        layer.freeze(weights=BF16)
    unchanged(layer, before)
    assert torch.isfinite(layer.freeze(weights=INT8).weight.detach().to_dense()).all()


@pytest.mark.parametrize("weights", [torch.float64, torch.float16, torch.uint8, "int8", 8])
def test_other_dtypes_are_refused(weights: Any) -> None:
    layer = SparseLinear(8, 4)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(TypeError, match=r"weights must be one of torch\.float32, torch\.bfloat16, torch\.i"):
        layer.freeze(weights=weights)
    unchanged(layer, before)


@every_dtype
def test_layers_that_cannot_are_told_which_can(dtype: torch.dtype) -> None:
    for layer in (SparseConv2d(3, 4, 3), SparseEmbedding(9, 8)):
        with pytest.raises(
            TypeError, match=r"weights of a Sparse\w+ must stay .* SparseLinear, FanInLinear and Bl"
        ):
            layer.freeze(weights=dtype)
        assert layer.weight_values.requires_grad
        assert not layer.freeze().weight_values.requires_grad
    layer = SparseLinear(8, 4, dtype=torch.float64)
    with pytest.raises(
        TypeError, match=r"must be float32 or narrower, got float64; .*layer\.float\(\) first"
    ):
        layer.freeze(weights=dtype)
    torch.nn.utils.parametrizations.weight_norm(layer.float(), "weight_values")
    with pytest.raises(TypeError, match="one that is computed; remove its parametrization"):
        layer.freeze(weights=dtype)


@every_dtype
def test_layers_of_few_bits_can_be_frozen_in_others(dtype: torch.dtype) -> None:
    for own in (torch.bfloat16, torch.float16):
        layer = SparseLinear(64, 48).to(own)
        W = spread(layer, layer.weight_values)
        layer.freeze(weights=dtype)
        assert find_narrow(layer).values.dtype is dtype
        assert layer.bias.dtype is own
        torch.testing.assert_close(weights_of(layer), W, rtol=0.01, atol=0.002)
        assert layer(torch.randn(3, 64, dtype=own)).dtype is own
        assert layer.float()(torch.randn(3, 64)).dtype is torch.float32


@every_kind
@every_dtype
def test_a_parameter_again_and_back(kind: str, dtype: torch.dtype) -> None:
    layer, x = KINDS[kind](64, 48), torch.randn(5, 64)
    layer.freeze(weights=dtype)
    y, W, state = layer(x), weights_of(layer).float(), copy.deepcopy(layer.state_dict())
    assert layer.freeze(weights=dtype) is layer  # as it is
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in state.items())
    layer.freeze()
    assert layer.weight_values.dtype is dtype
    layer.freeze(weights=torch.float32)
    assert isinstance(layer.weight_values, torch.nn.Parameter)
    assert not layer.weight_values.requires_grad
    assert "weight_scales" not in layer.state_dict()
    assert torch.equal(layer.to_dense().weight, W)
    torch.testing.assert_close(layer(x), y)
    layer.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.weight_values.grad is not None
    layer.freeze(weights=dtype)
    if dtype is BF16:
        assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in state.items())
    other = INT8 if dtype is BF16 else BF16
    layer.freeze(weights=other)
    assert layer.weight_values.dtype is other
    torch.testing.assert_close(weights_of(layer).float(), W, rtol=0.02, atol=0.01)


@every_dtype
def test_what_a_mask_leaves_out_becomes_0(dtype: torch.dtype) -> None:
    layer = SparseLinear(64, 48, sparsity=0.5)
    layer.forward_mask = layer.weight_values.detach().abs() > 0.1
    x = torch.randn(4, 64)
    W = spread(layer, layer.in_use)
    mask = layer.forward_mask
    layer.freeze(weights=dtype)
    assert layer.forward_mask is None
    assert not layer.weight_values[~mask].any()
    torch.testing.assert_close(weights_of(layer), W, rtol=0.01, atol=0.01)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


@every_kind
@every_dtype
def test_on_the_device_meta(kind: str, dtype: torch.dtype) -> None:
    held = KINDS[kind](64, 48).freeze(weights=dtype)
    layer = KINDS[kind](64, 48, device="meta").freeze(weights=dtype)
    assert layer.weight_values.dtype is dtype
    assert layer.weight_values.is_meta
    assert layer(torch.empty(3, 64, device="meta")).shape == (3, 48)
    layer.to_empty(device="cpu").load_state_dict(held.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), held(x))
