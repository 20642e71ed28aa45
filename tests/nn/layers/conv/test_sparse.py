"""SparseConv2d against torch's dense convolution, and MaskedConv2d beside it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from sparselab import (
    MaskedConv2d,
    SparseConv2d,
    load_model,
    memory_report,
    save_model,
    sparsify,
)
from sparselab.nn.ops.cpu import convolution as _convolution

KINDS = [SparseConv2d, MaskedConv2d]
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-4},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
}


def make(kind: Any = SparseConv2d, *args: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    amount = {} if "fan_in" in changes else {"sparsity": 0.7}
    options = {"padding": 1, "dtype": torch.float64, **amount, **changes}
    return kind(*(args or (4, 6, 3)), **options)


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=dtype, requires_grad=True)


def gradients(layer: Any, x: Tensor) -> list[Tensor]:
    """Output and every gradient, that of the weights at the connections only."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    layer.zero_grad()
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y.backward(upstream.to(torch.bfloat16).to(y.dtype))
    weights = layer.stored if hasattr(layer, "stored") else layer.weight
    found = [y.detach(), x.grad, weights.grad]
    return found if layer.bias is None else [*found, layer.bias.grad]


def assert_as_dense(layer: Any, x: Tensor) -> None:
    """Fail unless output and gradients are those of torch's convolution with the same weight."""
    found, expected = gradients(layer, x), gradients(layer.to_dense(), x)
    at = layer.positions()
    expected[2] = expected[2].reshape(-1)[at]
    found[2] = layer.per_connection(found[2])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE[x.dtype])


def test_a_wrong_layer_is_found_out() -> None:
    layer, x = make(), images(2, 4, 5, 5)
    assert_as_dense(layer, x)
    twin = copy.deepcopy(layer)
    layer.to_dense = lambda: twin.to_dense()
    with torch.no_grad():
        layer.weight_values[3] += 1e-6
    with pytest.raises(AssertionError):
        assert_as_dense(layer, x)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[int, ...], torch.dtype]:
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    groups = draw(st.sampled_from((1, 1, 2, 3)))
    kernel, dilation = pair(1, 4), pair(1, 3)
    options: dict[str, Any] = {
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 4)),
        "kernel_size": kernel,
        "stride": pair(1, 3),
        "padding": pair(0, 3),
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "sparsity": draw(st.sampled_from((0.0, 0.5, 0.9, 1.0))),
    }
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, options["padding"], strict=True)
    ]
    size = tuple(n + draw(st.integers(0, 9)) for n in least)
    shape = (draw(st.integers(0, 3)), options["in_channels"], *size)
    return options, shape, draw(st.sampled_from((torch.float32, torch.float64)))


@settings(max_examples=80, deadline=None)
@given(cases(), st.booleans())
def test_output_and_every_gradient(case: Any, one_chunk: bool) -> None:
    options, shape, dtype = case
    layer = SparseConv2d(**options, dtype=dtype)
    before = _convolution._CHUNK_BYTES
    _convolution._CHUNK_BYTES = before if one_chunk else 1
    try:
        assert_as_dense(layer, torch.randn(shape, dtype=dtype))
    finally:
        _convolution._CHUNK_BYTES = before


# Torch's own, of the dense convolution.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 0), "same", "valid"])
def test_every_padding(kind: Any, mode: str, padding: Any) -> None:
    layer = make(kind, 4, 6, (4, 3), padding=padding, padding_mode=mode, dilation=(1, 2))
    assert_as_dense(layer, images(2, 4, 6, 7))


@pytest.mark.parametrize("kind", KINDS)
def test_one_image(kind: Any) -> None:
    layer, x = make(kind), images(1, 4, 5, 6)
    assert layer(x[0]).shape == (6, 5, 6)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    assert_as_dense(layer, x[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_more_than_a_tile_of_outputs_on_any_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    layer = make(SparseConv2d, 80, 40, 3, sparsity=0.5, dtype=torch.float32)
    x = images(3, 80, 12, 13, dtype=torch.float32)
    try:
        assert_as_dense(layer, x)
        found = gradients(layer, x)
        torch.set_num_threads(3 - threads)
        assert all(torch.equal(*pair) for pair in zip(found, gradients(layer, x), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("view", ["channels_last", "expanded", "cut"])
def test_images_of_any_strides(view: str) -> None:
    layer, x = make(), images(3, 4, 6, 7)
    if view == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    x = {"expanded": x[:1].expand(3, 4, 6, 7), "cut": images(3, 9, 6, 14)[:, 1::2, :, ::2]}.get(view, x)
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    assert layer(x).is_contiguous() == (view != "channels_last")


def test_gradcheck() -> None:
    layer = make(SparseConv2d, 2, 4, (2, 3), stride=(1, 2), groups=2)
    x = images(2, 2, 4, 5)
    torch.autograd.gradcheck(
        lambda x, values, bias: functional_call(layer, {"weight_values": values, "bias": bias}, x),
        (x, layer.weight_values, layer.bias),
    )


def test_operator_is_well_formed() -> None:
    from sparselab.nn.ops.conv import conv2d

    layer, x = make(), images(2, 4, 5, 5)
    topology, numbers = layer.topology_arguments(), layer.geometry.numbers
    values, dy = layer.weight_values.detach(), torch.randn(2, 6, 5, 5, dtype=torch.float64)
    torch.library.opcheck(conv2d.conv2d_operator, (x, layer.weight_values, layer.bias, *topology, numbers))
    torch.library.opcheck(conv2d.conv2d_input_grad, (dy, values, *topology, numbers, 5, 5))
    torch.library.opcheck(conv2d.conv2d_values_grad, (dy, x.detach(), *topology, numbers))


def test_it_compiles() -> None:
    torch.compiler.reset()
    layer, x = make(), images(2, 4, 5, 5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    for ours, theirs in zip(gradients(compiled, x), gradients(layer, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_exports_and_runs_in_inference_mode_and_on_meta() -> None:
    layer, x = make(), images(2, 4, 5, 5)
    program = torch.export.export(layer, (x.detach(),))
    torch.testing.assert_close(program.module()(x.detach()), layer(x))
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), layer.to_dense()(x))
    y = SparseConv2d(4, 6, 3, stride=2, device="meta")(torch.empty(2, 4, 9, 8, device="meta"))
    assert y.shape == (2, 6, 4, 3)


def test_low_precision() -> None:
    layer = make(SparseConv2d, 4, 6, 3, dtype=torch.float32)
    x = images(2, 4, 5, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16().float()).bfloat16())
    low = copy.deepcopy(layer).bfloat16()
    found = gradients(low, x.bfloat16())
    assert {each.dtype for each in found} == {torch.bfloat16}
    for ours, theirs in zip(found, gradients(low.float(), x.bfloat16().float()), strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=0.03, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "options", "shape"),
    [
        ((4, 6, 1), {"padding": 0}, (2, 4, 5, 5)),
        ((4, 6, 1), {"stride": 2}, (2, 4, 5, 5)),
        ((3, 5, 7), {"padding": 3, "stride": 2}, (1, 3, 15, 9)),
        ((4, 4, 3), {"groups": 4}, (2, 4, 5, 5)),
    ],
)
@pytest.mark.parametrize("sparsity", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_usual_shapes(kind: Any, arguments: Any, options: Any, shape: Any, sparsity: float) -> None:
    assert_as_dense(make(kind, *arguments, sparsity=sparsity, **options), images(*shape))


def test_the_masked_twin_has_the_same_everything() -> None:
    options = {"stride": 2, "groups": 2, "sparsity": 0.6, "dtype": torch.float64}
    sparse, masked = make(SparseConv2d, **options), make(MaskedConv2d, **options)
    assert torch.equal(sparse.positions(), masked.positions())
    assert torch.equal(sparse.weight_values.flatten(), masked.per_connection(masked.weight))
    x = images(2, 4, 6, 6)
    for ours, theirs in zip(gradients(sparse, x), gradients(masked, x), strict=True):
        theirs = masked.per_connection(theirs).view(-1, 1, 1) if theirs.shape == masked.shape else theirs
        torch.testing.assert_close(ours, theirs)
    sparse.forward_mask = (torch.arange(sparse.nnz) % 3 > 0).view(-1, 1, 1)
    masked = MaskedConv2d.from_sparse(sparse)
    torch.testing.assert_close(sparse(x), masked(x))
    assert torch.equal(masked.to_sparse().forward_mask, sparse.forward_mask)
    torch.testing.assert_close(sparse(x), sparse.to_dense()(x))
    torch.testing.assert_close(masked.to_dense()(x), sparse(x))


def test_the_largest_weights_stay() -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(4, 6, 3, padding=1).eval().requires_grad_(False)
    layer = SparseConv2d.from_dense(dense, 0.75)
    threshold = dense.weight.abs().flatten().sort().values[-54]
    assert torch.equal(layer.to_dense().weight, torch.where(dense.weight.abs() >= threshold, dense.weight, 0))
    assert not layer.training
    assert not layer.weight_values.requires_grad
    assert torch.equal(layer.bias, dense.bias)
    per_row = SparseConv2d.from_dense(dense, fan_in=5)
    assert per_row.indptr.diff().tolist() == [5] * 6
    kept = dense.weight.flatten(1).abs().sort(1).values[:, -5:].sum()
    torch.testing.assert_close(per_row.weight_values.abs().sum(), kept)
    masked = MaskedConv2d.from_dense(dense, 0.75)
    assert torch.equal(masked.to_sparse().weight_values, layer.weight_values)


def test_constant_fan_in() -> None:
    layer = make(fan_in=7)
    assert layer.fan_in == 7
    assert layer.indptr.diff().tolist() == [7] * 6
    before = layer.positions()
    layer.reset_parameters()
    assert layer.indptr.diff().tolist() == [7] * 6
    assert not torch.equal(layer.positions(), before)
    layer.rewrite(torch.arange(3), torch.tensor([], dtype=torch.int64))
    assert layer.fan_in is None
    layer.reset_parameters()
    assert layer.nnz == 39
    with pytest.raises(ValueError, match="fan_in must be at most 36, the inputs of an output, got 37"):
        make(fan_in=37)
    with pytest.raises(ValueError, match=r"only one of sparsity or fan_in must be given, got 0\.5 and 4"):
        make(sparsity=0.5, fan_in=4)


@pytest.mark.parametrize("kind", KINDS)
def test_patterns(kind: Any) -> None:
    rng = np.random.default_rng(0)
    pattern = rng.random((6, 2, 3, 2)) < 0.3
    layer = kind.from_pattern(pattern, groups=2, padding="same")
    assert layer.shape == (6, 12)
    assert (layer.in_channels, layer.kernel_size) == (4, (3, 2))
    assert layer.positions().tolist() == np.flatnonzero(pattern).tolist()
    same = kind.from_pattern(torch.from_numpy(pattern.reshape(6, 12)), kernel_size=(3, 2), groups=2)
    assert torch.equal(same.positions(), layer.positions())
    same.set_topology(~pattern.reshape(6, 12))
    assert same.nnz == 72 - layer.nnz
    with pytest.raises(TypeError, match="kernel_size must be given"):
        kind.from_pattern(np.ones((2, 9), bool))
    with pytest.raises(ValueError, match=r"whole kernels of size \(2, 2\), got 9 columns"):
        kind.from_pattern(np.ones((2, 9), bool), kernel_size=2)


@pytest.mark.parametrize("kind", KINDS)
def test_state_copies_and_files(kind: Any, tmp_path: Any) -> None:
    layer, x = make(kind), images(2, 4, 5, 5)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y)
        assert repr(twin) == repr(layer)
    other = make(kind, sparsity=0.2)
    torch.save(layer.state_dict(), tmp_path / "state")
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(other(x), y)
    another = make(kind, sparsity=0.4)
    save_model(layer, tmp_path / "model")
    load_model(another, tmp_path / "model")
    assert torch.equal(another(x), y)
    if kind is SparseConv2d:
        state = {**layer.state_dict(), "indices": layer.indices.long() + 40}
        with pytest.raises(RuntimeError, match="SparseConv2d: "):
            other.load_state_dict(state)


def test_rewired_it_still_computes() -> None:
    layer, x = make(groups=2), images(2, 4, 5, 5)
    gradients(layer, x)
    free = torch.ones(6 * 18, dtype=torch.bool)
    free[layer.positions()] = False
    layer.rewrite(torch.arange(0, layer.nnz, 2), free.nonzero().reshape(-1)[:9])
    with torch.no_grad():
        layer.weight_values.add_(0.5)
    assert_as_dense(layer, x)


def test_plans_are_counted_and_let_go() -> None:
    layer, x = make(groups=2), images(2, 4, 5, 5)
    assert layer.plan_bytes() == 0
    gradients(layer, x)
    whole = layer.plan_bytes()
    assert memory_report(layer).plan_bytes == whole
    layer.freeze()
    assert 0 < layer.plan_bytes() < whole
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_those_of_a_convolution(kind: Any) -> None:
    for options, error in (
        ({"groups": 3}, "in_channels must be divisible by groups"),
        ({"padding": "some"}, "Invalid padding string"),
        ({"padding": "same", "stride": 2}, "padding='same' is not supported for strided"),
        ({"padding_mode": "none"}, "padding_mode must be one of"),
        ({"sparsity": 2.0}, "sparsity must be a finite number"),
    ):
        with pytest.raises(ValueError, match=error):
            make(kind, **options)
    layer = make(kind)
    for shape in ((2, 5, 4, 4), (4, 4), (1, 2, 4, 4, 4)):
        with pytest.raises(RuntimeError, match=r"input must have shape \(n, in_channels=4, height, width\)"):
            layer(torch.randn(shape, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="as large as the kernel"):
        make(kind, padding=0)(images(1, 4, 2, 5))
    with pytest.raises(TypeError, match=r"conv must be a torch.nn.Conv2d, got Linear"):
        kind.from_dense(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="model must contain the layers to swap"):
        sparsify(nn.Conv2d(3, 3, 3), {"*": 0.5})


def test_a_wrong_dtype_is_named() -> None:
    with pytest.raises(RuntimeError, match="input must have the dtype of the layer's values"):
        make()(images(1, 4, 5, 5, dtype=torch.float32))


def test_memory_stays_within_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = _convolution.scratch
    monkeypatch.setattr(
        _convolution,
        "scratch",
        lambda rows, items, dtype: asked.append(items) or original(rows, items, dtype),
    )
    layer = make(SparseConv2d, 16, 16, 3, dtype=torch.float32)
    gradients(layer, images(100, 16, 30, 30, dtype=torch.float32))
    assert len(asked) >= 6
    assert max(asked) * 4 <= _convolution._CHUNK_BYTES * 1.05
