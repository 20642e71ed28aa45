"""Layers frozen in bfloat16 and int8: what they compute, and their life: states, copies, casts, refusals."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparselab import RigL, SparseLinear, TiedLinear, TransposedLinear
from tests.nn.narrow import (
    KINDS,
    STRIDES,
    TOKENS,
    assert_right,
    every_dtype,
    every_kind,
    layers,
    spread,
    weights_of,
)

INT8, BF16, F32 = torch.int8, torch.bfloat16, torch.float32


def other(dtype: torch.dtype) -> torch.dtype:
    return INT8 if dtype is BF16 else BF16


@every_dtype
@given(layer=layers(), tokens=st.sampled_from(TOKENS), strides=st.sampled_from(sorted(STRIDES)))
def test_any_pattern_tokens_and_strides(dtype: torch.dtype, layer: Any, tokens: int, strides: str) -> None:
    layer.freeze(weights=dtype)
    x = STRIDES[strides](torch.randn(tokens, layer.in_features))
    y = layer(x)
    assert (y.dtype, y.shape, y.requires_grad) == (F32, (tokens, layer.out_features), False)
    assert_right(layer, x, y)


@every_kind
@every_dtype
def test_every_way_to_compute(kind: str, dtype: torch.dtype) -> None:
    layer = KINDS[kind](61, 43).freeze(weights=dtype)
    seen = set()
    for tokens in (1, 2, 9, 40, 130):
        x = torch.randn(tokens, 61)
        for name, way in layer.ways(x).items():
            assert_right(layer, x, way())
            seen.add(name)
    assert seen == {"skinny", "tiles", "dense blocks"}


def test_a_wrong_answer_is_seen() -> None:
    layer, x = SparseLinear(61, 43).freeze(weights=INT8), torch.randn(3, 61)
    y = layer(x)
    layer.weight_scales[int(y.abs().sum(0).argmax())] *= 1.001
    with pytest.raises(AssertionError, match="off by more than the bound"):
        assert_right(layer, x, y)


@every_dtype
def test_more_inputs_than_16_bits_can_name(dtype: torch.dtype) -> None:
    layer = SparseLinear(70_000, 5, sparsity=0.999).freeze(weights=dtype)
    for tokens in (1, 3, 20, 40):
        x = torch.randn(tokens, 70_000)
        assert_right(layer, x, layer(x))


@every_kind
@every_dtype
@pytest.mark.parametrize("given_dtype", [F32, BF16, torch.float16])
@pytest.mark.parametrize("shape", [(61,), (1, 61), (2, 3, 61), (70, 61), (0, 61)])
def test_outputs_have_the_dtype_of_inputs(
    kind: str, dtype: torch.dtype, given_dtype: Any, shape: Any
) -> None:
    layer = KINDS[kind](61, 43).freeze(weights=dtype)
    x = torch.randn(shape).to(given_dtype)
    y = layer(x)
    assert (y.dtype, y.shape) == (given_dtype, (*shape[:-1], 43))
    eps = torch.finfo(given_dtype).eps
    torch.testing.assert_close(y.float(), layer.to_dense()(x.float()), rtol=2 * eps, atol=max(2 * eps, 1e-5))


@every_kind
@every_dtype
@pytest.mark.parametrize("autocast", [BF16, torch.float16])
@pytest.mark.parametrize("given_dtype", [F32, BF16, torch.float64])
@pytest.mark.parametrize("tokens", [1, 17, 130])
def test_autocast(kind: str, dtype: torch.dtype, autocast: Any, given_dtype: Any, tokens: int) -> None:
    layer = KINDS[kind](64, 48).freeze(weights=dtype)
    x = torch.randn(tokens, 64).to(given_dtype).requires_grad_()
    with torch.autocast("cpu", autocast):
        y = layer(x)
    assert y.dtype is autocast
    eps = torch.finfo(autocast).eps
    # A matrix unit multiplies in bfloat16, which rounds int8 times its scale.
    torch.testing.assert_close(y.float(), layer.to_dense()(x.float()), rtol=4 * eps, atol=4 * eps)
    y.sum().backward()
    assert x.grad.dtype is given_dtype
    expected = weights_of(layer).sum(0).expand(tokens, -1).to(given_dtype)
    torch.testing.assert_close(x.grad, expected, rtol=2 * eps, atol=2 * eps)


@every_kind
@every_dtype
@pytest.mark.parametrize("tokens", [1, 9, 40, 200])
def test_the_gradient_of_the_input(kind: str, dtype: torch.dtype, tokens: int) -> None:
    layer = KINDS[kind](61, 43).freeze(weights=dtype)
    dense = layer.to_dense()
    assert not dense.weight.requires_grad
    x = torch.randn(tokens, 61, requires_grad=True)
    dy = torch.randn(tokens, 43)
    y = layer(x)
    y.backward(dy)
    ours, x.grad = x.grad, None
    dense(x).backward(dy)
    torch.testing.assert_close(ours, x.grad)
    assert all(each.grad is None for each in layer.parameters())
    layer.bias.requires_grad_(True)  # if somebody wants that alone
    layer(x.detach()).backward(dy)
    torch.testing.assert_close(layer.bias.grad, dy.sum(0))


@every_dtype
def test_second_derivatives_by_the_input(dtype: torch.dtype) -> None:
    layer = SparseLinear(12, 7, sparsity=0.5).freeze(weights=dtype)
    x = torch.randn(3, 12, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return layer(x).square().sum()

    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    W = weights_of(layer).float()
    expected = 2 * first.detach() @ (2 * W.T @ W)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-5)


@every_kind
@every_dtype
def test_its_state_loads_into_a_layer_of_another_topology(kind: str, dtype: torch.dtype) -> None:
    layer, x = KINDS[kind](64, 48).freeze(weights=dtype), torch.randn(5, 64)
    sparser = 0.9 if kind != "16x16" else 0.7
    for assign in (False, True):
        fresh = KINDS[kind](64, 48, sparsity=sparser).freeze(weights=dtype)
        fresh(x)  # has a topology, and plans
        assert fresh.nnz != layer.nnz
        fresh.load_state_dict(copy.deepcopy(layer.state_dict()), assign=assign)
        assert fresh.nnz == layer.nnz
        assert torch.equal(fresh(x), layer(x))
        assert fresh.weight_values.dtype is dtype
        assert not any(each.requires_grad for each in fresh.parameters())


@every_kind
@every_dtype
def test_states_that_do_not_fit_change_nothing(kind: str, dtype: torch.dtype) -> None:
    plain, layer = KINDS[kind](64, 48), KINDS[kind](64, 48).freeze(weights=dtype)
    x = torch.randn(5, 64)
    plain_state, state = copy.deepcopy(plain.state_dict()), copy.deepcopy(layer.state_dict())
    wrong: list[tuple[Any, dict[str, Any], str]] = []
    if dtype is INT8:
        wrong += [
            (plain, state, r"a Parameter, got a state with torch\.int8; freeze it first: layer\.freeze\(wei"),
            (
                layer,
                plain_state,
                r"frozen in int8, got a state with torch\.float32; load it into a layer that",
            ),
            (
                layer,
                {n: t for n, t in state.items() if n != "weight_scales"},
                "loaded with weights in int8, .* None",
            ),
            (
                layer,
                {**state, "weight_scales": torch.ones(3)},
                r"of shape \(48,\), got torch.float32 of shape",
            ),
            (layer, {**state, "weight_scales": torch.ones(48).double()}, "got torch.float64 of shape"),
        ]
    mask = torch.ones(layer.weight_values.shape, dtype=torch.bool)
    wrong.append((layer, {**state, "forward_mask": mask}, "a frozen layer has no forward_mask"))
    indices = state["indices"].to(torch.int32) + 64
    wrong.append((layer, {**state, "indices": indices}, "indices"))
    for taker, bad, message in wrong:
        before, y = copy.deepcopy(taker.state_dict()), taker(x)
        with pytest.raises(RuntimeError, match=message):
            taker.load_state_dict(bad)
        assert all(torch.equal(taker.state_dict()[name], tensor) for name, tensor in before.items())
        assert torch.equal(taker(x), y)


def test_bfloat16_and_float32_load_into_each_other() -> None:
    plain, layer, x = SparseLinear(64, 48), SparseLinear(64, 48).freeze(weights=BF16), torch.randn(5, 64)
    layer.load_state_dict(plain.state_dict())
    rounded = copy.deepcopy(plain).freeze(weights=BF16)
    assert torch.equal(layer(x), rounded(x))
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(plain(x), layer(x))
    assert plain.weight_values.dtype is F32


@every_kind
@every_dtype
def test_copies(kind: str, dtype: torch.dtype) -> None:
    layer, x = KINDS[kind](64, 48).freeze(weights=dtype), torch.randn(5, 64)
    y = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    for twin in twins:
        assert repr(twin) == repr(layer)
        assert torch.equal(twin(x), y)
        twin.weight_values.zero_()
    assert torch.equal(layer(x), y)


@every_kind
@every_dtype
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_casts_of_a_model_leave_frozen_weights_alone(kind: str, dtype: torch.dtype, cast: str) -> None:
    model = nn.Sequential(KINDS[kind](64, 48).freeze(weights=dtype), nn.ReLU(), nn.Linear(48, 8))
    x = torch.randn(5, 64)
    y = model(x)
    held = dict(model[0].named_buffers())
    getattr(model, cast)()
    for name, each in model[0].named_buffers():
        assert each is held[name]  # the very same
    to = model[2].weight.dtype
    assert model[0].bias.dtype is to
    if to is torch.float64:
        with pytest.raises(RuntimeError, match=r"float16 for a layer .* frozen in .*, got torch\.float64"):
            model(x.to(to))
        return
    found = model(x.to(to))
    assert found.dtype is to
    torch.testing.assert_close(found.float(), y, rtol=0.05, atol=0.05)


@every_dtype
def test_moves_and_shared_memory(dtype: torch.dtype) -> None:
    layer, x = SparseLinear(64, 48).freeze(weights=dtype), torch.randn(5, 64)
    y = layer(x)
    layer.share_memory()
    assert layer.weight_values.is_shared()
    assert torch.equal(layer.to("cpu")(x), y)
    gone = copy.deepcopy(layer).to("meta")
    assert (gone.weight_values.dtype, gone.weight_values.is_meta) == (dtype, True)
    with pytest.raises(RuntimeError, match="input must be on the layer's device, meta, got cpu"):
        gone(x)


@every_dtype
def test_inputs_that_do_not_fit(dtype: torch.dtype) -> None:
    layer = SparseLinear(64, 48).freeze(weights=dtype)
    kind = str(dtype)[6:]
    with pytest.raises(RuntimeError, match=rf"frozen in {kind}, whose sums are float32, got torch\.float64"):
        layer(torch.randn(3, 64).double())
    with pytest.raises(RuntimeError, match=r"shape \(\.\.\., in_features=64\), got \(3, 63\)"):
        layer(torch.randn(3, 63))
    with pytest.raises(TypeError, match=r"input must be a torch\.Tensor, got list"):
        layer([1.0])
    for wrong in (torch.ones(3, 64, dtype=torch.int64), torch.ones(3, 64, dtype=torch.complex64)):
        with pytest.raises(RuntimeError, match="input must be float32, bfloat16 or float16"):
            layer(wrong)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@every_kind
@every_dtype
def test_sparse_and_nested_inputs(kind: str, dtype: torch.dtype) -> None:
    layer = KINDS[kind](64, 48).freeze(weights=dtype)
    x = torch.where(torch.rand(6, 64) < 0.2, torch.randn(6, 64), 0)
    y = layer(x)
    for sparse in (x.to_sparse(), x.to_sparse_csr(), x.bfloat16().to_sparse_csr()):
        found = layer(sparse)
        assert found.dtype is sparse.dtype
        eps = torch.finfo(sparse.dtype).eps
        torch.testing.assert_close(found.float(), y, rtol=4 * eps, atol=max(4 * eps, 1e-5))
    torch.testing.assert_close(layer(x[0].to_sparse()), y[0])
    jagged = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)
    torch.testing.assert_close(layer(jagged).values(), y)


@every_kind
@every_dtype
def test_the_weight_that_other_code_multiplies_with(kind: str, dtype: torch.dtype) -> None:
    layer, x = KINDS[kind](64, 48).freeze(weights=dtype), torch.randn(5, 64)
    weight = layer.weight
    assert (weight.dtype, weight.device, weight.requires_grad, weight.is_meta) == (
        F32,
        x.device,
        False,
        False,
    )
    assert weight.grad is None
    torch.testing.assert_close(nn.functional.linear(x, weight, layer.bias), layer(x))
    torch.testing.assert_close(layer(x) @ weight, layer.to_dense()(x) @ layer.to_dense().weight)
    assert weight.requires_grad_(False) is weight
    for write in (
        lambda: layer.weight.mul_(2),
        lambda: nn.init.normal_(layer.weight),
        lambda: weight.requires_grad_(True),
        lambda: layer.stored,
        lambda: layer.rewrite(torch.tensor([0]), torch.tensor([1])),
        layer.reset_parameters,
        lambda: layer.set_topology(torch.ones(layer.grid, dtype=torch.bool)),
        lambda: TiedLinear(layer),
    ):
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(
            TypeError, match=r"frozen in (int8|bfloat16), which are neither trained nor written to"
        ):
            write()
        assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in before.items())


@every_dtype
def test_what_is_tied_to_it_follows(dtype: torch.dtype) -> None:
    layer, x = SparseLinear(64, 48), torch.randn(5, 48)
    decoder = TransposedLinear(layer)
    layer.freeze(weights=dtype)
    expected = x.double() @ weights_of(layer) + decoder.bias.detach().double()
    torch.testing.assert_close(decoder(x).double(), expected, rtol=1e-4, atol=1e-5)


@every_dtype
def test_its_weights_are_not_trained(dtype: torch.dtype) -> None:
    layer, x = SparseLinear(64, 48).freeze(weights=dtype), torch.randn(5, 64)
    layer.requires_grad_(True)
    assert [name for name, each in layer.named_parameters() if each.requires_grad] == ["bias"]
    with pytest.raises(TypeError, match=r"frozen in .*freeze\(weights=torch\.float32\) makes a Parameter"):
        layer.apply(RigL())
    with pytest.raises(TypeError, match="frozen in"):
        RigL().attach(layer)
    if dtype is INT8:
        with pytest.raises(RuntimeError, match="only Tensors of floating point"):
            layer.weight_values.requires_grad_(True)
        layer.weight_scales.requires_grad_(True)
    else:
        layer.weight_values.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"frozen in \w+ must not require a gradient, .*makes a Parameter"):
        layer(x)


def test_what_computes_a_frozen_weight_of_a_subclass_is_not_wrong_in_silence() -> None:
    class Doubled(SparseLinear):
        def forward(self, input: Tensor) -> Tensor:
            return self._multiply(input, 2 * self.weight_values, self.bias)

    layer = Doubled(64, 48).freeze(weights=INT8)
    with pytest.raises(TypeError, match=r"values must be torch\.float32, .* got torch\.int8"):
        layer(torch.randn(2, 64))


@every_kind
@every_dtype
def test_in_inference_mode(kind: str, dtype: torch.dtype) -> None:
    layer = KINDS[kind](61, 43)
    with torch.inference_mode():
        frozen = copy.deepcopy(layer).freeze(weights=dtype)
        for tokens in (1, 9, 70):
            x = torch.randn(tokens, 61)
            y = frozen(x)
            assert y.is_inference()
            assert_right(frozen, x, y)
        frozen.load_state_dict(KINDS[kind](61, 43).freeze(weights=dtype).state_dict())
        assert_right(frozen, x, frozen(x))


@every_dtype
def test_a_frozen_layer_forgets_neither_mode_nor_hooks(dtype: torch.dtype) -> None:
    layer, x = SparseLinear(64, 48).eval(), torch.randn(5, 64)
    called: list[Any] = []
    layer.register_forward_hook(lambda *args: called.append(args))
    layer.freeze(weights=dtype)
    layer(x)
    assert not layer.training
    assert len(called) == 1
    assert spread(layer, layer.in_use).shape == (48, 64)
