"""Torch's products with the weight of a sparse layer: numbers and gradients of the dense ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparselab import RigL, SparseConv2d, SparseLinear
from tests.nn.weight.rows import (
    DOUBLE,
    assert_as_dense,
    every_convolution,
    every_kind,
    every_linear_kind,
    input_of,
    make,
    operand,
    spread,
)

#: Computed from (weight, x, bias), and the shape of x.
FORMS: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "F.linear": (lambda w, x, b: F.linear(x, w, b), (3, 20)),
    "F.linear by name": (lambda w, x, b: F.linear(input=x, weight=w, bias=b), (2, 3, 20)),
    "F.linear without bias": (lambda w, x, b: F.linear(x, w), (3, 20)),
    "F.linear of one": (lambda w, x, b: F.linear(x, w, b), (20,)),
    "F.linear of none": (lambda w, x, b: F.linear(x, w, b), (0, 20)),
    "F.linear of .T": (lambda w, x, b: F.linear(x, w.T), (3, 12)),
    "tied": (lambda w, x, b: F.linear(F.linear(x, w, b).tanh(), w.t()), (3, 20)),
    "@ .T": (lambda w, x, b: x @ w.T, (3, 20)),
    "@ .mT": (lambda w, x, b: x @ w.mT, (2, 3, 20)),
    "@ .t()": (lambda w, x, b: x @ w.t(), (20,)),
    "@ transpose": (lambda w, x, b: x @ w.transpose(0, 1), (3, 20)),
    "torch.transpose": (lambda w, x, b: x @ torch.transpose(w, -1, -2), (3, 20)),
    "@ twice .T": (lambda w, x, b: x @ w.T.T, (3, 12)),
    "x @": (lambda w, x, b: x @ w, (3, 12)),
    "batches @": (lambda w, x, b: x @ w, (2, 3, 12)),
    "vector @": (lambda w, x, b: x @ w, (12,)),
    "@ x": (lambda w, x, b: w @ x, (20, 3)),
    "@ batches": (lambda w, x, b: w @ x, (2, 20, 3)),
    "@ vector": (lambda w, x, b: w @ x, (20,)),
    ".T @ x": (lambda w, x, b: w.T @ x, (12, 3)),
    "matmul": (lambda w, x, b: torch.matmul(w, x), (20, 3)),
    "matmul right": (lambda w, x, b: torch.matmul(x, w.T), (2, 3, 20)),
    ".matmul": (lambda w, x, b: w.matmul(x), (20, 3)),
    ".matmul of x": (lambda w, x, b: x.matmul(w), (3, 12)),
    "mm": (lambda w, x, b: torch.mm(w, x), (20, 3)),
    ".mm": (lambda w, x, b: w.mm(x), (20, 3)),
    ".mm of x": (lambda w, x, b: x.mm(w.T), (3, 20)),
    "mv": (lambda w, x, b: torch.mv(w, x), (20,)),
    ".mv": (lambda w, x, b: w.mv(x), (20,)),
    "addmm": (lambda w, x, b: torch.addmm(b, x, w.T), (3, 20)),
    "addmm left": (lambda w, x, b: torch.addmm(b[:, None], w, x, beta=0.5, alpha=2), (20, 3)),
    "addmm without": (lambda w, x, b: torch.addmm(b.detach() * torch.nan, x, w.T, beta=0), (3, 20)),
    ".addmm": (lambda w, x, b: b.addmm(x, w.T, alpha=-1), (3, 20)),
    "to_dense": (lambda w, x, b: x @ w.to_dense() if x.shape[-1] == 12 else x, (3, 12)),
    "to_dense of .T": (lambda w, x, b: w.T.to_dense() @ x, (12, 3)),
    "to a wider dtype": (lambda w, x, b: F.linear(x, w.to(torch.float64), b), (3, 20)),
    "type": (lambda w, x, b: F.linear(x, w.type(torch.float64), b), (3, 20)),
    "contiguous, cpu": (lambda w, x, b: F.linear(x, w.contiguous().cpu().type_as(x)), (3, 20)),
}


@pytest.mark.parametrize("form", FORMS)
@every_linear_kind
def test_every_product_is_that_with_the_dense_weight(kind: str, form: str) -> None:
    compute, shape = FORMS[form]
    assert_as_dense(make(kind), compute, operand(*shape))


GEOMETRIES: dict[str, dict[str, Any]] = {
    "its own kind": {},
    "strides": {"stride": (2, 1), "padding": (1, 2)},
    "dilation": {"dilation": 2, "padding": 1},
    "same": {"padding": "same"},
    "same, uneven": {"padding": "same", "dilation": (1, 2)},
    "valid": {"padding": "valid", "stride": 2},
    "other groups": {"groups": 3},
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@every_convolution
def test_a_convolution_may_have_any_geometry(kind: str, geometry: str) -> None:
    layer, settings = make(kind), {"groups": 2, **GEOMETRIES[geometry]}
    images = operand(2, layer.weight.shape[1] * settings["groups"], 7, 8)
    assert_as_dense(layer, lambda w, x, b: F.conv2d(x, w, b, **settings), images)
    assert_as_dense(layer, lambda w, x, b: F.conv2d(input=x, weight=w, bias=b, **settings), images)
    one = images.detach()[0].requires_grad_()
    assert_as_dense(layer, lambda w, x, b: F.conv2d(x, w, None, **settings), one)


@every_convolution
def test_a_convolution_as_its_forward_writes_it(kind: str) -> None:
    layer = make(kind)
    x = input_of(layer)
    y = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize(
    ("compute", "error", "match"),
    [
        (lambda w, x: F.conv2d(x, w, groups=5), RuntimeError, "channels"),
        (lambda w, x: F.conv2d(x[:, :, :1], w), RuntimeError, "as large as the kernel"),
        (lambda w, x: F.conv2d(x, w, stride=2, padding="same"), RuntimeError, "stride must be 1"),
        (lambda w, x: F.conv2d(x, w, padding="full"), ValueError, 'must be numbers, "same" or "valid"'),
        (lambda w, x: F.conv2d(x, w, stride=0), ValueError, "geometry must be"),
        (lambda w, x: F.linear(x, w), RuntimeError, "weight must have two dimensions"),
        (lambda w, x: x @ w, TypeError, "two dimensions to be transposed"),
        (lambda w, x: w.T, TypeError, "two dimensions to be transposed"),
    ],
)
def test_what_a_convolution_cannot_do(compute: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        compute(make("convolution").weight, operand(2, 4, 6, 7))


@pytest.mark.parametrize(
    ("compute", "match"),
    [
        (lambda w, x: F.linear(x[:, 1:], w), "in_features=20"),
        (lambda w, x: F.linear(x.float(), w), "dtype of the layer's values"),
        (lambda w, x: F.linear(x, w, x), "bias"),
        (lambda w, x: x @ w, "in_features=12"),
        (lambda w, x: torch.mm(x[0], w), "mm must be given two matrices"),
        (lambda w, x: torch.mv(w, x), "mv must be given a matrix and a vector"),
        (lambda w, x: F.conv2d(x, w), "weight must have four dimensions"),
    ],
)
def test_operands_that_do_not_fit(compute: Any, match: str) -> None:
    with pytest.raises(RuntimeError, match=match):
        compute(make("single").weight, operand(3, 20))


@every_kind
def test_a_forward_mask_counts(kind: str) -> None:
    layer = make(kind)
    mask = torch.ones_like(layer.weight_values, dtype=torch.bool)
    mask.view(-1)[::3] = False
    layer.forward_mask = mask
    x = input_of(layer)
    expected = torch.autograd.grad(layer(x).square().sum(), (layer.weight_values, x))
    torch.testing.assert_close(layer.weight.to_dense(), spread(layer, layer.in_use))
    w = layer.weight
    y = (
        F.linear(x, w, layer.bias)
        if w.ndim == 2
        else F.conv2d(x, w, layer.bias, 1, layer.padding, 1, layer.groups)
    )
    got = torch.autograd.grad(y.square().sum(), (layer.weight_values, x))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@every_linear_kind
def test_csr_with_gradients(kind: str) -> None:
    layer = make(kind)
    csr = layer.weight.to_sparse_csr()
    dense = layer.weight.to_dense()
    assert torch.equal(csr.to_dense(), dense)
    assert csr.values().numel() == layer.n_weights
    torch.testing.assert_close(csr, layer.to_sparse_csr())
    x = operand(20, 3)
    (got,) = torch.autograd.grad((csr @ x).square().sum(), layer.weight_values)
    (expected,) = torch.autograd.grad((dense @ x).square().sum(), layer.weight_values)
    torch.testing.assert_close(got, expected)
    with pytest.raises(TypeError, match="not transposed, to be CSR"):
        layer.weight.T.to_sparse_csr()


@every_linear_kind
def test_no_gradient_through_what_is_detached(kind: str) -> None:
    layer, x = make(kind), operand(3, 20)
    for weight in (
        layer.weight.detach(),
        layer.weight.data,
        torch.detach(layer.weight),
        layer.weight.data.T.T,
    ):
        assert not weight.requires_grad
        F.linear(x, weight).sum().backward()
        assert not weight.to_dense().requires_grad
    assert layer.weight_values.grad is None


def test_another_dtype_is_a_copy_with_gradients() -> None:
    layer = SparseLinear(20, 12, sparsity=0.5)
    wide, x = layer.weight.double(), operand(3, 20)
    expected = F.linear(x, layer.weight.to_dense().double())
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(F.linear(x, wide), expected)
    F.linear(x, wide).sum().backward()
    dense = expected.new_ones(3, 12).T @ x.detach()
    live = spread(layer, torch.ones_like(layer.weight_values)).double()
    torch.testing.assert_close(spread(layer, layer.weight_values.grad).double(), dense * live)
    layer.rewrite(torch.arange(1), torch.empty(0, dtype=torch.int64))
    for stale in (lambda: F.linear(x, wide), lambda: wide.T, wide.detach, wide.to_dense):
        with pytest.raises(RuntimeError, match="connections that are gone"):
            stale()


def test_what_is_kept_follows_the_layer() -> None:
    layer, x = make("single"), operand(3, 20)
    kept, data, transposed = layer.weight, layer.weight.data, layer.weight.T
    layer.rewrite(torch.arange(5), torch.empty(0, dtype=torch.int64))
    for y in (F.linear(x, kept), F.linear(x, data), x @ transposed):
        torch.testing.assert_close(y, layer(x) - layer.bias)


@pytest.mark.parametrize("form", ["F.linear", "matmul"])
def test_growth_sees_what_goes_past_the_layer(form: str) -> None:
    torch.manual_seed(0)
    called = SparseLinear(20, 20, sparsity=0.8, dtype=DOUBLE)
    read = copy.deepcopy(called)
    x = operand(6, 20).detach()

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = read

        def forward(self, x: Tensor) -> Tensor:
            if form == "F.linear":
                return F.linear(x, self.layer.weight, self.layer.bias)
            return x @ self.layer.weight.T + self.layer.bias

    for model, layer in ((called, called), (Reads(), read)):
        algorithm = RigL(drop_fraction=0.3, update_freq=1, seed=0)
        model.apply(algorithm)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = layer.positions().clone()
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            algorithm.step()
        assert not torch.equal(layer.positions(), before)
    assert torch.equal(called.positions(), read.positions())


@every_linear_kind
def test_the_hook_sees_the_gradient_of_a_transposed_product(kind: str) -> None:
    layer, seen = make(kind), []
    layer.gradient_hook = lambda operands: seen.append(operands.dy.T @ operands.x)
    x = operand(3, 12)
    (x @ layer.weight).square().sum().backward()
    W = layer.weight.to_dense().detach().requires_grad_()
    (x.detach() @ W).square().sum().backward()
    torch.testing.assert_close(torch.stack(seen).sum(0), W.grad)


def test_a_gradient_from_elsewhere_is_refused() -> None:
    class Multiply(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Any) -> Tensor:
            return F.linear(x, w)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
            return None, torch.ones(12, 20, dtype=DOUBLE)

    layer = make("single")
    y = Multiply.apply(operand(3, 20), layer.weight)
    with pytest.raises(RuntimeError, match="must come from a product that is listed"):
        y.sum().backward()


def test_under_checkpointing_functional_call_and_inference() -> None:
    layer, x = make("single"), operand(3, 20)
    y = checkpoint(lambda x: F.linear(x, layer.weight, layer.bias), x, use_reentrant=False)
    y.sum().backward()
    assert layer.weight_values.grad is not None

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.layer.weight)

    ones = torch.ones_like(layer.weight_values)
    called = torch.func.functional_call(Reads(), {"layer.weight_values": ones}, (x,))
    torch.testing.assert_close(called, F.linear(x, spread(layer, ones)))
    with torch.inference_mode():
        assert torch.equal(F.linear(x, layer.weight, layer.bias), y)


@every_linear_kind
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap(kind: str) -> None:
    layer, x = make(kind), operand(4, 3, 20)
    for compute in (
        lambda x: F.linear(x, layer.weight, layer.bias), lambda x: (x @ layer.weight.T) @ layer.weight
    ):  # fmt: skip
        torch.testing.assert_close(torch.func.vmap(compute)(x), compute(x))


def test_under_autocast_as_the_layer() -> None:
    layer = SparseLinear(20, 12, sparsity=0.5)
    with torch.autocast("cpu"):
        x = torch.randn(3, 20, dtype=torch.bfloat16)
        assert torch.equal(F.linear(x, layer.weight, layer.bias), layer(x))
        (x.requires_grad_() @ layer.weight.T).sum().backward()
    assert layer.weight_values.grad is not None


def test_on_the_device_meta() -> None:
    layer = SparseLinear(20, 12, device="meta")
    assert layer.weight.is_meta
    assert F.linear(torch.empty(3, 20, device="meta"), layer.weight).shape == (3, 12)
    conv = SparseConv2d(4, 6, 3, device="meta")
    assert F.conv2d(torch.empty(2, 4, 5, 5, device="meta"), conv.weight).shape == (2, 6, 3, 3)
