"""FanInLinear: what its layout promises, and the same answers as every other layer."""

from __future__ import annotations

import copy
import doctest
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparselab import FanInLinear, MaskedLinear, SparseLinear, densify, load_model, memory_report, save_model
from sparselab.nn import materialize
from sparselab.nn.layers import fan_in as module
from tests.nn.layers.test_linear import check_gradients

SIZES = (1, 7, 8, 9, 33, 64, 129)
TOKENS = (0, 1, 2, 7, 17, 65)


def ablated(layer: FanInLinear, *outputs: int) -> FanInLinear:
    """The layer without the connections of some outputs."""
    rows = layer.positions() // layer.in_features
    gone = torch.isin(rows, torch.tensor(outputs)).nonzero()[:, 0]
    layer.rewrite(gone, torch.empty(0, dtype=torch.int64))
    return layer


def make(*outputs: int, **settings: Any) -> FanInLinear:
    return ablated(FanInLinear(30, 20, **{"fan_in": 6, **settings}), *outputs)


def by_position(layer: FanInLinear, entries: Tensor) -> dict[int, float]:
    return dict(zip(layer.positions().tolist(), layer.per_connection(entries).tolist(), strict=True))


def check(layer: FanInLinear, n_tokens: int = 5) -> None:
    """Output and gradients are those of the oracle."""
    x = torch.randn(n_tokens, layer.in_features, dtype=layer.weight_values.dtype, requires_grad=True)
    layer.zero_grad()
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert layer.weight_values.grad is not None
    assert layer.weight_values.grad.shape == layer.weight_values.shape
    check_gradients(layer, x, y, dy)


@given(
    inputs=st.sampled_from(SIZES),
    outputs=st.sampled_from(SIZES),
    tokens=st.sampled_from(TOKENS),
    share=st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    left=st.sampled_from((0.0, 0.5, 1.0)),
    bias=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    seed=st.integers(0, 2**31),
)
def test_output_and_every_gradient_equal_the_dense_layer(
    inputs: int, outputs: int, tokens: int, share: float, left: float, bias: bool,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    layer = FanInLinear(inputs, outputs, bias, fan_in=round(share * inputs), dtype=dtype)
    gone = torch.rand(outputs) >= left
    ablated(layer, *gone.nonzero()[:, 0].tolist())
    assert layer.nnz == layer.fan_in * len(layer.rows)
    check(layer, tokens)


def test_gradcheck() -> None:
    layer = make(3, dtype=torch.float64)
    x = torch.randn(2, 3, 30, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(layer, {"weight_values": values, "bias": bias}, (x,))
        return result

    assert torch.autograd.gradcheck(call, (x, layer.weight_values, layer.bias))


@pytest.mark.parametrize(
    ("settings", "fan_in"),
    [({}, 3), ({"sparsity": 0.87}, 4), ({"sparsity": 0.99}, 0), ({"fan_in": 30}, 30), ({"fan_in": 0}, 0)],
)
def test_every_output_has_the_fan_in(settings: dict[str, Any], fan_in: int) -> None:
    layer = FanInLinear(30, 20, **settings)
    assert layer.fan_in == fan_in
    assert layer.weight_values.shape == (20 * fan_in, 1, 1)
    assert layer.indices.shape == (20 * fan_in,)
    assert torch.diff(layer.indptr).tolist() == [fan_in] * 20
    assert bool((layer.indices.int().view(20, fan_in).diff(dim=1) > 0).all())
    assert layer.indices.dtype == torch.uint16
    if not fan_in:
        assert torch.equal(layer(torch.randn(2, 30)), layer.bias.expand(2, 20))


def test_the_fan_in_sets_the_range_of_weights_and_biases() -> None:
    layer = FanInLinear(400, 300, fan_in=25)
    for numbers in (layer.weight_values, layer.bias):
        assert 0.98 < numbers.detach().abs().max() * 5 <= 1
    assert layer.weight_values.detach().std() * 5 == pytest.approx(3**-0.5, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"fan_in": 3, "sparsity": 0.9},
            ValueError,
            "only one of sparsity or fan_in must be given, got 0.9 and 3",
        ),
        ({"fan_in": 31}, ValueError, "fan_in must be at most 30, the inputs of an output, got 31"),
        ({"fan_in": -1}, ValueError, "fan_in must be at least 0, got -1"),
        ({"fan_in": 0.5}, TypeError, "fan_in must be an integer, got 0.5"),
        ({"sparsity": 1.5}, ValueError, "got 1.5"),
        ({"dtype": torch.complex64}, TypeError, "dtype must be"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FanInLinear(30, 20, **settings)


def test_ablated_outputs_are_gone_and_come_back() -> None:
    layer = make(0, 7)
    assert layer.weight_values.shape == (18 * 6, 1, 1)
    assert set(range(20)) - set(layer.rows.tolist()) == {0, 7}
    x = torch.randn(40, 30)
    assert torch.equal(layer(x)[:, [0, 7]], layer.bias[[0, 7]].expand(40, 2))
    check(layer)
    source = layer.rewrite(torch.empty(0, dtype=torch.int64), 7 * 30 + torch.arange(6))
    assert layer.weight_values.shape == (19 * 6, 1, 1)
    assert (source < 0).nonzero()[:, 0].tolist() == [36, 37, 38, 39, 40, 41]
    check(layer)


def test_a_rewrite_moves_weights_gradient_and_what_lives_beside_them() -> None:
    layer = make()
    layer(torch.randn(4, 30)).sum().backward()
    beside = layer.weight_values.detach() * 2
    before, gradient = by_position(layer, layer.weight_values), by_position(layer, layer.weight_values.grad)
    free = sorted(set(range(600)) - set(before))
    grow = torch.tensor([next(p for p in free if p // 30 == row) for row in range(20)])
    source = layer.rewrite(torch.arange(0, 120, 3), grow)
    moved = layer.moved(beside, source)
    assert layer.fan_in == 5
    assert moved.shape == layer.weight_values.shape == layer.weight_values.grad.shape == (100, 1, 1)
    weights, slopes = by_position(layer, layer.weight_values), by_position(layer, layer.weight_values.grad)
    assert weights == {p: before.get(p, 0) for p in weights}
    assert slopes == {p: gradient.get(p, 0) for p in weights}
    assert by_position(layer, moved) == {p: 2 * weight for p, weight in weights.items()}


def test_entries_stay_in_place_where_the_shape_does() -> None:
    layer = make()
    entries = torch.randn(120, 1, 1)
    position = next(p for p in range(30) if p not in layer.positions()[:6].tolist())
    source = layer.rewrite(torch.tensor([2]), torch.tensor([position]))
    assert layer.moved(entries, source) is entries
    layer.put(entries, torch.tensor([3, 119]), torch.tensor([5.0, 6.0]))
    assert (entries[3], entries[119]) == (5, 6)
    strided = torch.zeros(120, 2, 1)[:, :1]
    layer.put(strided, torch.tensor([7], dtype=torch.int32), torch.tensor([1.0]))
    assert strided[7] == 1


def test_a_rewrite_to_unequal_rows_is_refused_and_changes_nothing() -> None:
    layer = make()
    layer(torch.randn(4, 30)).sum().backward()
    before = copy.deepcopy(layer.state_dict())
    gradient = layer.weight_values.grad.clone()
    with pytest.raises(ValueError, match=r"equally many connections, or none, got 5 for output 0 and 6 for"):
        layer.rewrite(torch.tensor([2]), torch.empty(0, dtype=torch.int64))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert torch.equal(layer.weight_values.grad, gradient)
    check(layer)


def test_from_dense_keeps_the_largest_of_each_output() -> None:
    linear = nn.Linear(4, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, -9.0, 2.0, 3.0], [0.1, 0.1, -0.3, 0.1]]))
    linear.bias.requires_grad_(False)
    layer = FanInLinear.from_dense(linear.eval(), 0.5)
    assert layer.to_dense().weight.tolist() == [
        [0, -9, 0, 3],
        [pytest.approx(0.1), 0, pytest.approx(-0.3), 0],
    ]
    assert torch.equal(layer.bias, linear.bias)
    assert (layer.training, layer.bias.requires_grad, layer.weight_values.requires_grad) == (
        False,
        False,
        True,
    )
    assert FanInLinear.from_dense(linear, fan_in=1).indices.tolist() == [1, 2]
    with pytest.raises(TypeError, match=r"linear must be .*, got Conv2d"):
        FanInLinear.from_dense(nn.Conv2d(1, 1, 1), 0.5)


@pytest.mark.parametrize("gone", [(), (0, 19), range(20)])
def test_conversions_lead_back(gone: tuple[int, ...]) -> None:
    layer = make(*gone).eval()
    layer.weight_values.requires_grad_(False)
    x = torch.randn(40, 30)
    expected = layer(x)
    for there in (
        layer.to_sparse(),
        MaskedLinear.from_sparse(layer),
        FanInLinear.from_sparse(layer.to_sparse()),
        FanInLinear.from_sparse(MaskedLinear.from_sparse(layer)),
        FanInLinear.from_pattern(layer.to_scipy()),
        FanInLinear.from_pattern(layer.to_sparse_csr()),
    ):
        if there.training:
            there.bias = layer.bias
        else:
            assert not there.stored.requires_grad
        assert torch.equal(there.positions(), layer.positions())
        torch.testing.assert_close(there(x), expected)
    torch.testing.assert_close(densify(nn.Sequential(layer))(x), expected)


def test_a_forward_mask_is_converted_saved_and_moved() -> None:
    layer = make(4)
    layer.forward_mask = torch.rand(114, 1, 1) > 0.5
    x = torch.randn(3, 30)
    expected = layer(x)
    assert torch.equal(layer.to_sparse()(x), expected)
    assert torch.equal(FanInLinear.from_sparse(layer.to_sparse())(x), expected)
    torch.testing.assert_close(MaskedLinear.from_sparse(layer)(x), expected)
    other = make()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)
    ablated(layer, 5)
    assert layer.forward_mask.shape == (108, 1, 1)


def test_patterns_with_unequal_rows_are_refused_and_change_nothing() -> None:
    pattern = np.tri(20, 30, dtype=bool)
    with pytest.raises(ValueError, match="got 1 for output 0 and 2 for output 1"):
        FanInLinear.from_pattern(pattern)
    with pytest.raises(ValueError, match="got 1 for output 0 and 2 for output 1"):
        FanInLinear.from_sparse(SparseLinear.from_pattern(pattern))
    with pytest.raises(TypeError, match=r"layer must be a sparse linear layer .*, got Linear"):
        FanInLinear.from_sparse(nn.Linear(3, 2))
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="got 1 for output 0"):
        layer.set_topology(pattern)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    layer.set_topology(np.eye(20, 30, dtype=bool))
    assert layer.weight_values.shape == (20, 1, 1)
    check(layer)


def by_pickle(layer: FanInLinear) -> Any:
    return pickle.loads(pickle.dumps(layer))


def by_file(layer: FanInLinear) -> Any:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = FanInLinear(30, 20, device="meta")
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    return other


def by_state(layer: FanInLinear) -> Any:
    other = ablated(FanInLinear(30, 20, fan_in=3), 2, 4)
    parameter = other.weight_values
    other(torch.randn(2, 30))  # so that there are plans to go stale
    assert other.load_state_dict(layer.state_dict()) == ([], [])
    assert other.weight_values is parameter
    return other


@pytest.mark.parametrize("copied", [by_pickle, by_file, by_state, copy.deepcopy])
@pytest.mark.parametrize("gone", [(), (0, 19), range(20)])
def test_copies_compute_the_same_and_train_on(
    copied: Callable[[FanInLinear], FanInLinear], gone: tuple[int, ...]
) -> None:
    layer = make(*gone)
    assert ("rows" in layer.state_dict()) == (0 < len(gone) < 20)
    other = copied(layer)
    x = torch.randn(40, 30)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.rows, layer.rows)
    check(other)


def test_a_model_comes_back_from_a_file(tmp_path: Any) -> None:
    source, target = (nn.Sequential(make(*gone), nn.ReLU(), FanInLinear(20, 3)) for gone in ((1, 2), ()))
    save_model(source, tmp_path / "model.safetensors")
    load_model(target, tmp_path / "model.safetensors")
    x = torch.randn(5, 30)
    assert torch.equal(target(x), source(x))


def test_a_layer_of_the_meta_device_is_made_and_counted() -> None:
    with torch.device("meta"):
        model = nn.Sequential(FanInLinear(30, 20, fan_in=6))
    assert model.state_dict().keys() == {"0.weight_values", "0.indices", "0.bias", "0.fan_in"}
    layer = materialize(model)[0]
    check(layer)
    report = memory_report(model)
    assert report.weight_bytes == 20 * 6 * (4 + 2) + 20 * 4 + 21 * 8
    assert report.parameters_dense == 20 * 30 + 20


def test_drawn_anew_every_output_has_connections() -> None:
    layer = make(0, 7)
    layer.reset_parameters()
    assert layer.weight_values.shape == (120, 1, 1)
    check(layer)


def test_life_inside_torch() -> None:
    layer = make(3)
    x = torch.randn(5, 30)
    expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x.bfloat16()), layer(x.bfloat16().float()).bfloat16())
    values, expected = torch.randn(2, 114, 1, 1), expected.detach()
    by_values = torch.func.vmap(lambda v: torch.func.functional_call(layer, {"weight_values": v}, (x,)))(
        values
    )
    for each, y in zip(values, by_values, strict=True):
        torch.testing.assert_close(y, torch.func.functional_call(layer, {"weight_values": each}, (x,)))
    half = copy.deepcopy(layer).to(torch.bfloat16)(x.bfloat16())
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.05)
    with pytest.raises(RuntimeError, match=r"values must be torch.float32 of shape \(114, 1, 1\)"):
        torch.func.functional_call(layer, {"weight_values": values[0].flatten()}, (x,))
    assert layer.freeze() is layer
    assert torch.equal(layer(x), expected)


def test_compiles_and_follows_a_rewrite() -> None:
    torch.compiler.reset()
    layer = make()
    call = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for outputs in ((), (3,)):
        ablated(layer, *outputs)
        x = torch.randn(5, 30, requires_grad=True)
        layer.zero_grad()
        y = call(x)
        dy = torch.randn_like(y)
        y.backward(dy)
        check_gradients(layer, x, y, dy)


@pytest.mark.parametrize("n_tokens", [1, 5, 40])
def test_nan_reaches_the_outputs_that_read_it_and_no_other(n_tokens: int) -> None:
    layer = make(3)
    x = torch.randn(n_tokens, 30)
    x[0, 11] = torch.nan
    reads = layer.to_dense().weight[:, 11] != 0
    assert 0 < reads.sum() < 20
    assert torch.equal(layer(x).isnan()[0], reads)
    assert not layer(x)[1:].isnan().any()


def test_the_example_in_the_docstring_runs() -> None:
    result = doctest.testmod(module)
    assert (result.failed, result.attempted > 2) == (0, True)
