"""What the weight of a sparse layer tells at no cost, and that nobody takes it for a Parameter."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselab import MaskedLinear, SparseLinear, SparseMultiheadAttention
from sparselab.nn import SparseWeight
from tests.nn.weight.rows import DOUBLE, LINEAR, every_kind, input_of, make, operand, spread


@every_kind
def test_as_the_dense_weight_says(kind: str) -> None:
    layer = make(kind)
    weight, dense = layer.weight, layer.to_dense().weight
    assert isinstance(weight, Tensor)
    assert isinstance(weight, SparseWeight)
    assert not isinstance(weight, nn.Parameter)
    for name in (
        "shape", "ndim", "dtype", "device", "requires_grad", "is_meta", "is_cpu", "is_cuda", "layout",
        "is_sparse", "is_nested", "is_quantized",
    ):  # fmt: skip
        assert getattr(weight, name) == getattr(dense, name), name
    assert weight.size() == dense.size()
    assert weight.size(1) == dense.size(1)
    assert (weight.dim(), weight.numel(), weight.nelement(), len(weight)) == (
        dense.dim(), dense.numel(), dense.numel(), len(dense)
    )  # fmt: skip
    assert torch.numel(weight) == dense.numel()
    assert torch.is_tensor(weight)
    assert torch.is_floating_point(weight)
    assert weight.is_floating_point()
    assert not weight.is_complex()
    assert not hasattr(weight, "quant_state")
    assert torch.equal(weight.values(), layer.weight_values)
    assert torch.equal(weight.to_dense(), dense)
    assert torch.equal(weight.new_tensor([1, 2]), dense.new_tensor([1, 2]))


@pytest.mark.parametrize("kind", LINEAR)
def test_of_the_transpose(kind: str) -> None:
    layer = make(kind)
    weight, dense = layer.weight.T, layer.to_dense().weight.T
    assert (weight.shape, weight.size(0), len(weight)) == (dense.shape, dense.size(0), len(dense))
    assert torch.equal(weight.to_dense(), dense)
    assert weight.T.shape == layer.weight.shape
    assert torch.t(layer.weight).shape == dense.shape
    assert layer.weight.transpose(1, -1).shape == layer.weight.shape


@every_kind
def test_no_list_of_the_layers_tensors_has_it(kind: str) -> None:
    layer = make(kind)
    names = [name for name, _ in layer.named_parameters()]
    assert hasattr(layer, "weight")
    assert sorted(names) == ["bias", "weight_values"]
    assert "weight" not in layer.state_dict()
    assert not any(isinstance(each, SparseWeight) for each in vars(layer).values())
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)
    ):  # fmt: skip
        assert torch.equal(twin.weight.to_dense(), layer.weight.to_dense())
        assert twin.weight.layer is twin


def test_it_is_of_the_layer_as_it_is_now() -> None:
    layer = SparseLinear(20, 12, sparsity=0.5)
    kept = layer.weight
    layer.to(torch.bfloat16)
    assert kept.dtype == layer.weight.dtype == torch.bfloat16
    layer.requires_grad_(False)
    assert not kept.requires_grad
    layer.to("meta")
    assert kept.is_meta
    assert layer.weight.device.type == "meta"


def test_requires_grad_is_that_of_the_parameter() -> None:
    layer = make("single")
    assert layer.weight.requires_grad_(False).requires_grad is False
    assert not layer.weight_values.requires_grad
    layer.weight.requires_grad = True
    assert layer.weight_values.requires_grad
    for other in (layer.weight.data, layer.weight.detach(), layer.weight.T.data):
        assert other.requires_grad_(False) is other
        with pytest.raises(TypeError, match=r"must be set on layer\.weight itself"):
            other.requires_grad_()
    assert not layer.weight.requires_grad_(False).float().requires_grad


def test_the_gradient_is_read_elsewhere() -> None:
    layer, x = make("single"), operand(3, 20)
    assert layer.weight.grad is None
    layer(x).sum().backward()
    with pytest.raises(TypeError, match=r"must be read as layer.weight_values.grad"):
        layer.weight.grad  # noqa: B018
    assert layer.weight.data.grad is None
    with pytest.raises(TypeError, match="must not write to a sparse weight"):
        layer.weight.grad = torch.zeros(12, 20)
    layer.weight.grad = None
    assert layer.weight_values.grad is None


def test_repr_says_what_it_is() -> None:
    layer = SparseLinear(20, 12, density=0.5)
    text = "<weight of a SparseLinear: (12, 20), torch.float32, 120 live weights>"
    assert repr(layer.weight) == str(layer.weight) == f"{layer.weight}" == text
    assert repr(layer.weight.T.data) == (
        "<weight of a SparseLinear: (20, 12), torch.float32, 120 live weights, transposed, detached>"
    )


def test_another_device_is_refused() -> None:
    weight = make("single").weight
    assert weight.to(DOUBLE) is weight
    assert weight.to("cpu") is weight
    assert weight.to(torch.zeros(1, dtype=DOUBLE)) is weight
    for move in (lambda: weight.to("meta"), lambda: weight.to("cuda", torch.float32)):
        with pytest.raises(TypeError, match="a weight must go with its layer"):
            move()


#: What has no meaning for live weights alone, or would make something dense behind the user's back.
REFUSED: dict[str, Callable[[Any, Tensor], Any]] = {
    "+": lambda w, x: w + 1,
    "+ right": lambda w, x: 1 + w,
    "+ of a tensor": lambda w, x: torch.zeros(12, 20, dtype=DOUBLE) + w,
    "*": lambda w, x: w * 2,
    "**": lambda w, x: w**2,
    "-": lambda w, x: -w,
    "==": lambda w, x: w == w,
    "<": lambda w, x: w < 0,
    "bool": lambda w, x: bool(w),
    "iteration": lambda w, x: list(w),
    "index": lambda w, x: w[0],
    "norm": lambda w, x: w.norm(),
    "abs": lambda w, x: torch.abs(w),
    "sum": lambda w, x: w.sum(),
    "clone": lambda w, x: w.clone(),
    "numpy": lambda w, x: w.numpy(),
    "tolist": lambda w, x: w.tolist(),
    "item": lambda w, x: w.item(),
    "type": lambda w, x: w.type(),
    "view": lambda w, x: w.view(-1),
    "flatten": lambda w, x: w.flatten(),
    "stride": lambda w, x: w.stride(),
    "data_ptr": lambda w, x: w.data_ptr(),
    "cat": lambda w, x: torch.cat([w, w]),
    "zeros_like": lambda w, x: torch.zeros_like(w),
    "new_empty": lambda w, x: w.new_empty(3),
    "svd": lambda w, x: torch.linalg.svd(w),
    "einsum": lambda w, x: torch.einsum("oi,bi->bo", w, x),
    "bmm": lambda w, x: torch.bmm(x[None], w),
    "embedding": lambda w, x: F.embedding(torch.zeros(2, dtype=torch.int64), w),
    "bilinear": lambda w, x: F.bilinear(x, x, w),
    "as input": lambda w, x: F.linear(w, x),
    "as bias": lambda w, x: torch.addmm(w, x, x.T),
    "both": lambda w, x: w @ w.T,
    "both of mm": lambda w, x: torch.mm(w, w.T),
    "deepcopy": lambda w, x: copy.deepcopy(w),
    "pickle": lambda w, x: pickle.dumps(w),
    "save": lambda w, x: torch.save(w, io.BytesIO()),
    "grad": lambda w, x: torch.autograd.grad((x @ w.T).sum(), w),
    "hook": lambda w, x: w.register_hook(print),
    "cuda": lambda w, x: w.cuda(),
    "aten": lambda w, x: torch.ops.aten.linear(x, w),
    "out": lambda w, x: torch.add(x, x, out=w),
}


@pytest.mark.parametrize("what", REFUSED)
def test_everything_else_is_refused(what: str) -> None:
    layer = make("single")
    before = layer.weight_values.detach().clone()
    with pytest.raises(TypeError, match=r"layer\.weight\.to_dense\(\) for the dense matrix"):
        REFUSED[what](layer.weight, operand(3, 20))
    assert torch.equal(layer.weight_values, before)


@every_kind
def test_an_optimizer_refuses_it(kind: str) -> None:
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD([make(kind).weight], lr=0.1)


def test_nobody_makes_a_parameter_of_it() -> None:
    with pytest.raises(TypeError, match=r"must be set on layer\.weight itself"):
        nn.Parameter(make("single").weight)


def test_a_twin_with_a_mask_has_a_real_one() -> None:
    masked = MaskedLinear(20, 12, sparsity=0.5)
    assert isinstance(masked.weight, nn.Parameter)
    masked.weight = nn.Parameter(masked.weight.detach() * 2)


def test_an_attention_has_those_of_its_projections() -> None:
    attention = SparseMultiheadAttention(16, 4, sparsity=0.5)
    assert attention.in_proj_weight is None
    dense = attention.to_dense()
    parts = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    assert torch.equal(torch.cat([part.to_dense() for part in parts]), dense.in_proj_weight)
    assert torch.equal(attention.out_proj.weight.to_dense(), dense.out_proj.weight)
    with torch.no_grad():
        nn.init.xavier_uniform_(attention.q_proj_weight)


def test_a_layer_of_torch_asks_for_it_before_its_fused_path() -> None:
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    block.linear1 = SparseLinear(16, 32, sparsity=0.5)
    x = torch.randn(2, 5, 16)
    expected = block(x)
    with torch.no_grad():
        torch.testing.assert_close(block.eval()(x), expected)


@every_kind
def test_where_the_weights_are_computed(kind: str) -> None:
    class Doubled(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return 2 * values

    layer = make(kind)
    nn.utils.parametrize.register_parametrization(layer, "weight_values", Doubled())
    assert layer.weight.requires_grad
    assert layer.weight.dtype == DOUBLE
    torch.testing.assert_close(layer.weight.to_dense(), spread(layer, layer.weight_values))
    x, w = input_of(layer), layer.weight
    y = (
        F.linear(x, w, layer.bias)
        if w.ndim == 2
        else F.conv2d(x, w, layer.bias, 1, layer.padding, 1, layer.groups)
    )
    torch.testing.assert_close(y, layer(x))
    y.sum().backward()
    assert layer.parametrizations.weight_values.original.grad is not None
    with pytest.raises(TypeError, match="remove its parametrization"):
        layer.weight.data.mul_(2)
