"""Bad input is refused with the argument's name, what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

from sparselab import BlockSparseLinear, FanInLinear, SparseLinear
from sparselab.nn.ops import linear as functional


@pytest.mark.parametrize("shape", [(), (9,), (3, 11), (2, 10, 3)])
def test_wrong_input_shape_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"input must have shape \(\.\.\., in_features=10\), got"):
        SparseLinear(10, 5)(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_wrong_input_dtype_is_named(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=f"torch.float32, got {dtype}"):
        SparseLinear(10, 5)(torch.zeros(2, 10, dtype=dtype))


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_an_unsupported_layer_dtype_is_named() -> None:
    with pytest.raises(TypeError, match=r"values must be .*torch.float16, got torch.complex64"):
        SparseLinear(10, 5).to(torch.complex64)(torch.zeros(2, 10, dtype=torch.complex64))
    with pytest.raises(TypeError, match="dtype must be"):
        SparseLinear(10, 5, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((2.0, 3), {}, TypeError, "in_features must be an integer, got 2.0"),
        ((2, True), {}, TypeError, "out_features must be an integer, got True"),
        ((-1, 3), {}, ValueError, "in_features must be at least 0, got -1"),
        ((2, 3), {"sparsity": float("nan")}, ValueError, "sparsity must be a finite number in"),
        ((2, 3), {"sparsity": float("inf")}, ValueError, "sparsity must be a finite number in"),
        ((2, 3), {"sparsity": -0.1}, ValueError, "got -0.1"),
        ((2, 3), {"sparsity": 1.5}, ValueError, "got 1.5"),
        ((2, 3), {"sparsity": "0.9"}, TypeError, "sparsity must be a number in"),
        ((2, 3), {"sparsity": True}, TypeError, "sparsity must be a number in"),
        ((2, 3), {"density": 1.5}, ValueError, "density must be a finite number in"),
        (
            (2, 3),
            {"sparsity": 0.9, "density": 0.1},
            ValueError,
            "only one of sparsity or density must be given",
        ),
        (
            (100, 256, 0.8),
            {},
            TypeError,
            r"bias must be .*, got 0.8; for a sparsity write SparseLinear\(100, 256, sparsity=0.8\)",
        ),
        ((100, 256, None), {}, TypeError, "bias must be True or False, got None$"),
    ],
)
def test_bad_arguments_are_named(
    arguments: tuple[Any, ...], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SparseLinear(*arguments, **settings)


@pytest.mark.parametrize(("layer", "x"), [("cpu", "meta"), ("meta", "cpu")])
def test_devices_must_be_the_same(layer: str, x: str) -> None:
    with pytest.raises(RuntimeError, match=f"input must be on the layer's device, {layer}, got {x}"):
        SparseLinear(10, 5, device=layer)(torch.zeros(2, 10, device=x))


def test_a_device_without_kernels_is_named() -> None:
    layer = SparseLinear(10, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(NotImplementedError, match="the input must be there, got cuda:0"):
            layer(torch.zeros(2, 10, device="cuda"))
        layer.weight_values = torch.nn.Parameter(torch.zeros(layer.nnz, device="cuda"))
        with pytest.raises(NotImplementedError, match="the layer must be there, got cuda:0"):
            layer(torch.zeros(2, 10))


def test_an_operator_without_an_implementation_for_the_device_is_refused() -> None:
    layer = SparseLinear(10, 5)
    arguments = layer.weight_values, layer.bias, *layer.topology_arguments()
    with pytest.raises((NotImplementedError, RuntimeError)):
        functional.linear_operator(torch.zeros(2, 10).to_mkldnn(), *arguments)


WRONG_PARTS = {
    "few values": (
        {"weight_values": torch.zeros(4, 1, 1)},
        r"values must be torch.float32 of shape \(5, 1, 1\), got .* \(4, 1, 1\)",
    ),
    "more values": (
        {"weight_values": torch.zeros(6, 1, 1)},
        r"values must be torch.float32 of shape \(5, 1, 1\), got .* \(6, 1, 1\)",
    ),
    "flat bias": ({"bias": torch.zeros(1)}, r"bias must be torch.float32 of shape \(5,\), got .* \(1,\)"),
    "bias dtype": ({"bias": torch.zeros(5).double()}, "bias must be torch.float32 .* got torch.float64"),
    "column": (
        {"indices": torch.full((5,), 10).to(torch.uint16)},
        r"indices must be columns of 0\.\.9, got 10",
    ),
    "negative column": (
        {"indices": torch.full((5,), -1)},
        r"indices must (have dtype uint16|be columns of 0\.\.9), got",
    ),
    "rows": (
        {"indptr": torch.tensor([0, 5, 1, 2, 3, 5])},
        "indptr must start at 0 or above and never decrease",
    ),
    "offset": ({"indptr": torch.tensor([1, 1, 2, 3, 4, 5])}, "indptr must start at 0, got 1"),
    "end": ({"indptr": torch.tensor([0, 1, 2, 3, 4, 10**9])}, "indices must have shape"),
    "float indptr": ({"indptr": torch.zeros(6)}, "indptr must be a dense tensor of integers"),
    "no indptr": ({"indptr": torch.empty(0, dtype=torch.int64)}, r"indptr must be int64 of shape \(6,\)"),
}


@pytest.mark.parametrize("what", WRONG_PARTS)
@pytest.mark.parametrize("warm", [False, True])
def test_parts_that_do_not_fit_are_refused_before_a_kernel_runs(what: str, warm: bool) -> None:
    layer = SparseLinear(10, 5, sparsity=0.9)
    x = torch.randn(3, 10)
    if warm:
        layer(x)
    parts, message = WRONG_PARTS[what]
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        torch.func.functional_call(layer, parts, (x,))
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


def test_a_column_edited_out_of_range_is_refused() -> None:
    layer = SparseLinear(10, 5, sparsity=0.5)
    layer(torch.randn(3, 10))
    layer.indices[-1] = 9999
    with pytest.raises(ValueError, match=r"indices must be columns of 0\.\.9, got 9999"):
        layer(torch.randn(3, 10))


def test_a_layer_without_topology_yet_is_refused() -> None:
    layer = SparseLinear(10, 5, sparsity=0.5, device="meta").to_empty(device="cpu")
    layer.indptr.fill_(2**40)
    with pytest.raises(ValueError, match="indptr must start at 0, got 1099511627776"):
        layer(torch.randn(3, 10))
    layer.reset_parameters()
    assert layer(torch.randn(3, 10)).isfinite().all()


def test_from_dense_names_a_wrong_layer() -> None:
    with pytest.raises(TypeError, match=r"linear must be a torch.nn.Linear, got Conv2d"):
        SparseLinear.from_dense(torch.nn.Conv2d(1, 1, 1), 0.5)


@pytest.mark.parametrize("kind", [SparseLinear, FanInLinear, BlockSparseLinear])
def test_the_state_of_a_dense_layer_is_told_from_a_damaged_one(kind: Any) -> None:
    model = nn.Sequential(nn.ReLU(), kind(8, 8))
    before = model[1].positions()
    with pytest.raises(RuntimeError, match=r"1\.weight is that of a dense layer.*sparsify"):
        model.load_state_dict(nn.Sequential(nn.ReLU(), nn.Linear(8, 8)).state_dict())
    assert torch.equal(model[1].positions(), before)


@pytest.mark.parametrize(
    "use",
    [
        lambda layer: setattr(nn.Linear(8, 8), "weight", layer.weight),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    ],
)
def test_sharing_and_pruning_by_torch_name_what_to_use(use: Any) -> None:
    with pytest.raises(TypeError, match=r"TiedLinear\(layer\).*sparselab\.prune"):
        use(SparseLinear(8, 8))
