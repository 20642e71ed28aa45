"""Convolutions of one to three dimensions, transposed or not, sparse or masked, beside torch's dense ones."""

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
from torch.nn import functional as F

import sparselab
from sparselab import load_model, save_model
from sparselab.nn.ops.conv.operands import ConvolutionOperands
from tests.nn.layers.conv.rows import (
    KINDS,
    NAMES,
    dense_of,
    dims,
    every_kind,
    every_name,
    input_of,
    is_transposed,
    make,
)
from tests.nn.layers.conv.test_sparse import gradients

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def assert_as_torch(layer: Any, dense: Any, x: Tensor, *size: Any) -> None:
    """Fail unless output and gradients are those of a dense layer, of which only the connections are left."""
    with torch.no_grad():
        live = torch.zeros(dense.weight.numel(), dtype=torch.bool)
        live[layer.positions()] = True
        dense.weight[~live.view(dense.weight.shape)] = 0
    found = []
    for each in (layer, dense):
        leaf = x.detach().clone().requires_grad_()
        y = each(leaf, *size)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
        weights = layer.stored if each is layer else dense.weight
        bias = [] if each.bias is None else [each.bias]
        found.append([y, *torch.autograd.grad(y, [leaf, weights, *bias], upstream)])
    found[0][2] = layer.per_connection(found[0][2])
    found[1][2] = found[1][2].reshape(-1)[layer.positions()]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@st.composite
def cases(draw: st.DrawFn, name: str) -> tuple[dict[str, Any], tuple[int, ...], Any]:
    """Settings, the shape of an input, and the output size that is asked for, if any."""
    n = dims(name)

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(n))

    groups = draw(st.sampled_from((1, 1, 2, 3)))
    kernel, stride, dilation, padding = sizes(1, 3), sizes(1, 3), sizes(1, 3), sizes(0, 2)
    options: dict[str, Any] = {
        "in_channels": groups * draw(st.integers(1, 2)), "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
        "bias": draw(st.booleans()),
    }  # fmt: skip
    extents = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    if not is_transposed(name):
        spatial = [max(1, each) + draw(st.integers(0, 4)) for each in extents]
        return options, (draw(st.integers(0, 2)), options["in_channels"], *spatial), None
    options["output_padding"] = tuple(
        draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
    )
    # So many inputs that an output is left.
    spatial = [
        max(1, -(-(s + 1 - e) // s)) + draw(st.integers(0, 2)) for s, e in zip(stride, extents, strict=True)
    ]
    output_size = None
    if draw(st.booleans()):
        least = [(i - 1) * s + e for i, s, e in zip(spatial, stride, extents, strict=True)]
        output_size = [m + draw(st.integers(0, s - 1)) for m, s in zip(least, stride, strict=True)]
    return options, (draw(st.integers(0, 2)), options["in_channels"], *spatial), output_size


@every_name
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_output_and_every_gradient(name: str, data: st.DataObject) -> None:
    options, shape, output_size = data.draw(cases(name))
    sparsity, how = data.draw(st.sampled_from((0.0, 0.5, 0.9, 1.0))), data.draw(st.sampled_from("SM"))
    dense = dense_of(name)(**options, dtype=torch.float64)
    layer = getattr(sparselab, {"S": "Sparse", "M": "Masked"}[how] + name).from_dense(dense, sparsity)
    assert layer.nnz == round((1 - sparsity) * dense.weight.numel())
    assert torch.equal(layer.to_dense().weight[dense.weight == 0], dense.weight[dense.weight == 0])
    size = () if output_size is None else (output_size,)
    assert_as_torch(layer, dense, torch.randn(shape, dtype=torch.float64), *size)


@every_kind
def test_a_wrong_weight_is_found_out(kind: str) -> None:
    layer, x = make(kind), input_of(kind)
    dense = layer.to_dense()
    assert_as_torch(layer, dense, x)
    with torch.no_grad():
        layer.put(layer.stored.detach(), torch.tensor([3]), torch.tensor([5.0], dtype=torch.float64))
    with pytest.raises(AssertionError):
        assert_as_torch(layer, dense, x)


@every_kind
def test_one_input_without_a_batch(kind: str) -> None:
    layer, x = make(kind), input_of(kind)
    torch.testing.assert_close(layer(x[1]), layer(x)[1])
    assert_as_torch(layer, layer.to_dense(), x[1])


@every_kind
def test_a_hook_sees_the_dense_gradient(kind: str) -> None:
    layer, x = make(kind), input_of(kind)
    seen: list[ConvolutionOperands] = []
    layer.gradient_hook = seen.append
    layer.stored.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    assert seen == []
    layer.stored.requires_grad_(True)
    gradients(layer, x)
    (operands,) = seen
    expected = gradients(layer.to_dense(), x)[2].flatten(1)
    assert expected.shape == layer.shape
    whole = torch.full(layer.shape, torch.nan, dtype=torch.float64)
    operands.add_rows(0, whole, beta=0)
    torch.testing.assert_close(whole, expected, **EXACT)
    positions = np.arange(1, expected.numel(), 3)
    np.testing.assert_allclose(operands.sampled(positions), expected.reshape(-1)[positions], atol=1e-12)
    assert operands.is_finite()
    rows, columns = operands.totals(np.ones(operands.n_tokens))
    assert (rows.shape, columns.shape) == ((layer.shape[0],), (layer.shape[1],))


# Torch's own, of the dense convolution.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same", "valid"])
@pytest.mark.parametrize("kind", ["SparseConv1d", "SparseConv3d", "MaskedConv1d", "MaskedConv3d"])
def test_every_padding(kind: str, padding: Any, mode: str) -> None:
    layer = make(kind, padding=padding, padding_mode=mode, stride=1, dilation=(2, 1, 1)[-dims(kind) :])
    assert_as_torch(layer, layer.to_dense(), input_of(kind))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if is_transposed(kind)])
def test_output_sizes_are_those_of_torch(kind: str) -> None:
    layer, x = make(kind, stride=3), input_of(kind)
    dense, n = layer.to_dense(), dims(kind)
    least = list(dense(x).shape[2:])
    assert layer(x).shape == dense(x).shape
    most = [each + 2 for each in least]
    for asked in (most, [2, 6, *most], tuple(most)):
        torch.testing.assert_close(layer(x, asked), dense(x, asked), **EXACT)
    torch.testing.assert_close(layer(x[0], most), dense(x[0], most), **EXACT)
    for wrong in ([each + 3 for each in least], [each - 1 for each in least], least * 5):
        for each in (layer, dense):
            with pytest.raises(ValueError, match=r"output_size|output size"):
                each(x, wrong)
    for each in (make(kind, stride=2, dilation=2, output_padding=2), make(kind, output_padding=-1)):
        for either in (each, each.to_dense()):
            with pytest.raises(RuntimeError, match=r"output.padding"):
                either(x)
    with pytest.raises(RuntimeError, match="outputs are left"):
        make(kind, padding=9)(x)
    assert n == layer.space.n_dims
    with pytest.raises(ValueError, match='Only "zeros" padding mode is supported'):
        make(kind, padding_mode="reflect")


@every_kind
def test_inputs_that_do_not_fit_are_named(kind: str) -> None:
    layer, x = make(kind), input_of(kind)
    size = {1: "length", 2: "height, width", 3: "depth, height, width"}[dims(kind)]
    for wrong in (x[0, 0], x.unsqueeze(0), x[:, :3]):
        with pytest.raises(RuntimeError, match=rf"input must have shape \(n, in_channels=4, {size}\)"):
            layer(wrong)
    if not is_transposed(kind):
        with pytest.raises(RuntimeError, match="as large as the kernel"):
            make(kind, padding=0)(x[..., :2])
    dense = dense_of(kind).__name__
    with pytest.raises(TypeError, match=rf"conv must be a torch.nn.{dense}, got Linear"):
        type(layer).from_dense(nn.Linear(3, 3))
    for options in ({"groups": 3}, {"sparsity": 2.0}, {"sparsity": 0.5, "density": 0.5}):
        with pytest.raises(ValueError, match=r"divisible by groups|finite number|only one of"):
            make(kind, **options)
    with pytest.raises(TypeError, match=rf"bias must be True or False, .* write SparseConv.*{dims(kind)}d\("):
        make(kind, bias=0.5)


@every_kind
def test_what_is_printed_is_what_torch_prints(kind: str) -> None:
    layer = make(kind)
    shown = repr(layer.to_dense()).removeprefix(f"{dense_of(kind).__name__}(").removesuffix(")")
    assert repr(layer) == f"{kind}({shown}, sparsity={layer.sparsity:.4g}, nnz={layer.nnz})"


@every_kind
def test_patterns(kind: str) -> None:
    layer, n = make(kind), dims(kind)
    shape = tuple(dense_of(kind)(4, 6, (3, 2, 3)[-n:], groups=2).weight.shape)
    pattern = np.random.default_rng(0).random(shape) < 0.3
    cls = type(layer)
    new = cls.from_pattern(pattern, groups=2, stride=2)
    assert (new.in_channels, new.out_channels, new.kernel_size) == (4, 6, shape[2:])
    assert new.positions().tolist() == np.flatnonzero(pattern).tolist()
    assert new.bias.shape == (6,)
    assert 0 < new.bias.detach().abs().max() <= 1
    same = cls.from_pattern(pattern.reshape(shape[0], -1), kernel_size=shape[2:], groups=2)
    assert torch.equal(same.positions(), new.positions())
    layer.set_topology(pattern.reshape(shape[0], -1))
    assert_as_torch(layer, layer.to_dense(), input_of(kind))


@every_kind
def test_state_copies_and_files(kind: str, tmp_path: Any) -> None:
    layer, x = make(kind), input_of(kind)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y)
        assert repr(twin) == repr(layer)
    for sparsity in (0.2, 0.9):
        other = make(kind, sparsity=sparsity)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), y)
    save_model(layer, tmp_path / "model")
    load_model(other := make(kind, sparsity=0.4), tmp_path / "model")
    assert torch.equal(other(x), y)
    like = type(layer).like(layer, 0.5)
    assert repr(like.to_dense()) == repr(layer.to_dense())
    assert like.nnz == round(0.5 * np.prod(layer.shape))


@every_name
def test_the_masked_twin_has_the_same_everything(name: str) -> None:
    sparse, masked, x = make(f"Sparse{name}"), make(f"Masked{name}"), input_of(name)
    assert torch.equal(sparse.positions(), masked.positions())
    for ours, theirs in zip(gradients(sparse, x), gradients(masked, x), strict=True):
        theirs = masked.per_connection(theirs).view(-1, 1, 1) if theirs.shape == masked.shape else theirs
        torch.testing.assert_close(ours, theirs, **EXACT)
    sparse.forward_mask = (torch.arange(sparse.nnz) % 3 > 0).view(-1, 1, 1)
    masked = type(masked).from_sparse(sparse)
    torch.testing.assert_close(sparse(x), masked(x), **EXACT)
    assert torch.equal(masked.to_sparse().forward_mask, sparse.forward_mask)
    other = make("SparseConv1d" if name != "Conv1d" else "SparseConv2d")
    with pytest.raises(TypeError, match=f"layer must be a Sparse{name}, got {type(other).__name__}"):
        type(masked).from_sparse(other)


@every_name
def test_rewired_it_still_computes(name: str) -> None:
    layer, x = make(f"Sparse{name}"), input_of(name)
    gradients(layer, x)
    free = torch.ones(layer.shape[0] * layer.shape[1], dtype=torch.bool)
    free[layer.positions()] = False
    layer.rewrite(torch.arange(0, layer.nnz, 2), free.nonzero().reshape(-1)[:5])
    with torch.no_grad():
        layer.weight_values.add_(0.5)
    assert_as_torch(layer, layer.to_dense(), x)


@every_name
def test_frozen_in_inference_and_on_meta(name: str) -> None:
    layer, x = make(f"Sparse{name}"), input_of(name)
    expected = layer.to_dense()(x)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected, **EXACT)
    torch.testing.assert_close(layer.freeze()(x), expected, **EXACT)
    assert not layer(x).requires_grad
    y = make(f"Sparse{name}", device="meta")(x.to("meta"))
    assert (y.is_meta, y.shape) == (True, expected.shape)
    with pytest.raises(NotImplementedError, match="got the device meta"):
        make(f"Masked{name}", device="meta")


@every_name
def test_it_compiles_in_one_graph(name: str) -> None:
    torch.compiler.reset()
    layer, x = make(f"Sparse{name}"), input_of(name)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(gradients(compiled, x), gradients(layer, x), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@every_kind
def test_low_precision(kind: str) -> None:
    layer, x = make(kind, dtype=torch.float32), input_of(kind, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        dense = layer.to_dense()(x)
    assert y.dtype == dense.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x.float()), rtol=0.03, atol=0.05)
    low = copy.deepcopy(layer).bfloat16()
    found = gradients(low, x)
    assert {each.dtype for each in found} == {torch.bfloat16}
    for ours, theirs in zip(found, gradients(low.float(), x.float()), strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=0.03, atol=0.08)


@pytest.mark.parametrize("view", ["channels last", "expanded", "cut"])
@every_name
def test_inputs_of_any_strides(name: str, view: str) -> None:
    layer, x = make(f"Sparse{name}"), input_of(name)
    if view == "channels last":
        x = x.transpose(1, -1).contiguous().transpose(1, -1)
    x = {"expanded": x[:1].expand_as(x), "cut": x.repeat_interleave(2, -1)[..., ::2]}.get(view, x)
    assert not x.is_contiguous()
    assert_as_torch(layer, layer.to_dense(), x)


@every_name
def test_first_weights_are_within_the_bounds_of_torch_for_live_counts(name: str) -> None:
    layer = make(f"Sparse{name}", 40, 60, 3, sparsity=0.5)
    bound = layer.indptr.diff().double().rsqrt().repeat_interleave(layer.indptr.diff())
    share = layer.weight_values.detach().flatten() / bound
    assert 0.99 < share.abs().max() <= 1
    assert abs(float(share.mean())) < 0.05
    rows = layer.indptr.diff().double()
    most = rows.mean().rsqrt() if is_transposed(name) else rows.rsqrt()
    assert 0.85 < (layer.bias.detach().abs() / most).max() <= 1
    full = make(f"Sparse{name}", sparsity=0.0, bias=True)
    fan_in = full.shape[1]
    assert 0.8 * fan_in**-0.5 < full.weight_values.detach().abs().max() <= fan_in**-0.5
    assert full.bias.detach().abs().max() <= fan_in**-0.5
    empty = make(f"Sparse{name}", sparsity=1.0)
    assert empty.bias.detach().abs().max() <= 1


@pytest.mark.parametrize("name", ["Conv1d", "Conv3d"])
def test_constant_fan_in(name: str) -> None:
    cls = getattr(sparselab, f"Sparse{name}")
    layer = make(f"Sparse{name}", sparsity=None, fan_in=3)
    assert layer.fan_in == 3
    layer.reset_parameters()
    assert layer.indptr.diff().tolist() == [3] * 6
    dense = layer.to_dense()
    torch.nn.init.normal_(dense.weight)
    per_row = cls.from_dense(dense, fan_in=2)
    kept = dense.weight.flatten(1).abs().sort(1).values[:, -2:].sum()
    torch.testing.assert_close(per_row.weight_values.abs().sum(), kept)


#: Torch's function of each name.
FUNCTIONS = {
    "Conv1d": F.conv1d, "Conv2d": F.conv2d, "Conv3d": F.conv3d, "ConvTranspose1d": F.conv_transpose1d,
    "ConvTranspose2d": F.conv_transpose2d, "ConvTranspose3d": F.conv_transpose3d,
}  # fmt: skip


@every_name
def test_the_weight_in_the_function_of_torch(name: str) -> None:
    layer, x = make(f"Sparse{name}"), input_of(name)
    how = {each: getattr(layer, each) for each in ("stride", "padding", "dilation", "groups")}
    y = FUNCTIONS[name](x, layer.weight, layer.bias, **how)
    torch.testing.assert_close(y, layer(x), **EXACT)
    assert layer.weight.shape == layer.to_dense().weight.shape
    ours = torch.autograd.grad(y.square().sum(), layer.weight_values)[0].flatten()
    dense = layer.to_dense()
    theirs = torch.autograd.grad(dense(x).square().sum(), dense.weight)[0].reshape(-1)
    torch.testing.assert_close(ours, theirs[layer.positions()], **EXACT)
    other = FUNCTIONS[NAMES[(NAMES.index(name) + 1) % 3]]
    with pytest.raises(RuntimeError, match="weight must have"):
        other(x.unsqueeze(-1), layer.weight)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_an_autoencoder_may_tie_its_weights(n: int) -> None:
    layer = make(f"SparseConv{n}d", groups=1, sparsity=0.5, padding=1)
    x = input_of(f"Conv{n}d")
    tied = FUNCTIONS[f"ConvTranspose{n}d"]
    weight = layer.to_dense().weight.detach().requires_grad_()
    found = []
    for each, by in ((layer.weight, layer.weight_values), (weight, weight)):
        code = FUNCTIONS[f"Conv{n}d"](x, each, stride=2, padding=1)
        y = tied(code, each, stride=2, padding=1, output_padding=1)
        found.append([y, torch.autograd.grad(y.square().sum(), by)[0].reshape(-1)])
    found[1][1] = found[1][1][layer.positions()]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    with pytest.raises(RuntimeError, match="bias must have shape"):
        tied(code, layer.weight, torch.zeros(3))
