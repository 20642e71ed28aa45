"""SparseLinear against a dense float64 layer: outputs, every gradient, and life inside torch."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparselab import SparseLinear
from sparselab.nn import functional
from tests.oracle import assert_close, product

SIZES = (1, 7, 8, 9, 33, 64, 129)
LEADING = ((), (1,), (7,), (65,), (0,), (3, 5), (2, 1, 4), (2, 0, 3))


def dense_weight(layer: SparseLinear) -> Tensor:
    return layer.to_dense().weight.detach()


def live_mask(layer: SparseLinear) -> np.ndarray[Any, Any]:
    mask = np.zeros(layer.shape, np.bool_)
    mask.reshape(-1)[layer.positions().numpy()] = True
    return mask


def check_gradients(layer: SparseLinear, x: Tensor, y: Tensor, dy: Tensor) -> None:
    """Compare output and gradients, already computed, with the oracle."""
    W, live, dtype = dense_weight(layer).numpy(), live_mask(layer), layer.values.detach().numpy().dtype
    tokens, upstream = x.detach().reshape(-1, layer.in_features), dy.reshape(-1, layer.out_features)
    bias = None if layer.bias is None else layer.bias.detach().numpy()
    assert y.shape == (*x.shape[:-1], layer.out_features)
    rows = y.detach().reshape(-1, layer.out_features)
    assert_close(rows.numpy().T, product(W, tokens.numpy().T, live=live, bias=bias), dtype)
    assert x.grad is not None
    assert x.grad.shape == x.shape
    dx = x.grad.reshape(-1, layer.in_features).numpy().T
    assert_close(dx, product(W.T, upstream.numpy().T, live=live.T), dtype)
    dw = product(upstream.numpy().T, tokens.numpy())
    at = layer.positions().numpy()
    shape = layer.shape
    exact = [np.broadcast_to(part, shape).reshape(-1)[at] for part in dw]
    assert layer.values.grad is not None
    assert_close(layer.values.grad.numpy(), type(dw)(*exact), dtype)
    if layer.bias is not None:
        assert layer.bias.grad is not None
        ones = np.ones((1, len(tokens)))
        sums = product(ones, upstream.numpy())
        assert_close(layer.bias.grad.numpy()[None], sums, dtype)


@given(
    inputs=st.sampled_from(SIZES),
    outputs=st.sampled_from(SIZES),
    leading=st.sampled_from(LEADING),
    sparsity=st.sampled_from((0.0, 0.5, 0.9, 0.99, 1.0)),
    bias=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    seed=st.integers(0, 2**31),
)
def test_output_and_every_gradient_equal_the_dense_layer(
    inputs: int,
    outputs: int,
    leading: tuple[int, ...],
    sparsity: float,
    bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    layer = SparseLinear(inputs, outputs, bias, sparsity, dtype=dtype)
    x = torch.randn(*leading, inputs, dtype=dtype, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    check_gradients(layer, x, y, dy)


def test_the_gradient_check_refuses_wrong_answers() -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    x = torch.randn(6, 20, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    check_gradients(layer, x, y, dy)
    for parameter in (x, layer.values, layer.bias):
        right = parameter.grad.clone()
        parameter.grad.view(-1)[3] += 1e-3
        with pytest.raises(AssertionError):
            check_gradients(layer, x, y, dy)
        parameter.grad = right
    with pytest.raises(AssertionError):
        check_gradients(layer, x, y + 1e-3, dy)


LAYOUTS = {
    "transposed": lambda: torch.randn(40, 6).T,
    "expanded": lambda: torch.randn(1, 40).expand(6, 40),
    "every second": lambda: torch.randn(12, 80)[::2, ::2],
    "offset": lambda: torch.randn(500)[3:243].view(6, 40),
    "inner dimensions swapped": lambda: torch.randn(2, 40, 3).transpose(1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_layouts(layout: str) -> None:
    layer = SparseLinear(40, 12, sparsity=0.6)
    x = LAYOUTS[layout]().requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    check_gradients(layer, x, y, dy)


@pytest.mark.parametrize(
    "reduce",
    [torch.sum, lambda y: y.T.reshape(-1)[::3].sum(), lambda y: (y.T @ torch.randn(6, 2)).sum()],
    ids=["expanded", "strided", "transposed"],
)
def test_upstream_gradient_layouts(reduce: Any) -> None:
    layer = SparseLinear(40, 12, sparsity=0.6)
    x = torch.randn(6, 40, requires_grad=True)
    y = layer(x)
    y.retain_grad()
    reduce(y).backward()
    check_gradients(layer, x, y, y.grad)


def test_gradcheck() -> None:
    layer = SparseLinear(9, 7, sparsity=0.4, dtype=torch.float64)
    x = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(layer, {"values": values, "bias": bias}, (x,))
        return result

    assert torch.autograd.gradcheck(call, (x, layer.values, layer.bias))


class CountOperators(TorchDispatchMode):
    """Names of this package's operators, in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sparselab":
            self.called.append(func._schema.name.removeprefix("sparselab::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("x_needs", "values_need", "expected"),
    [
        (True, True, ["linear", "linear_input_grad", "linear_values_grad"]),
        (False, True, ["linear", "linear_values_grad"]),
        (True, False, ["linear", "linear_input_grad"]),
        (False, False, ["linear"]),
    ],
)
def test_only_the_gradients_asked_for_are_computed(
    x_needs: bool, values_need: bool, expected: list[str]
) -> None:
    layer = SparseLinear(20, 10)
    layer.values.requires_grad_(values_need)
    with CountOperators() as operators:
        layer(torch.randn(4, 20, requires_grad=x_needs)).sum().backward()
    assert operators.called == expected
    assert (layer.values.grad is not None) == values_need


def test_no_grad_makes_no_gradient_plans() -> None:
    layer = SparseLinear(20, 10)
    with torch.no_grad():
        assert layer(torch.randn(4, 20, requires_grad=True)).requires_grad is False
    inference_only = layer.plan_bytes()
    layer(torch.randn(4, 20, requires_grad=True)).sum().backward()
    assert 0 < inference_only < layer.plan_bytes()


def test_opcheck() -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    x, dy = torch.randn(4, 20, requires_grad=True), torch.randn(4, 10)
    values = layer.values.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    topology = layer.indptr, layer.indices
    for number in (layer._plans.number, 0):
        torch.library.opcheck(functional.linear, (x, values, bias, *topology, number))
        torch.library.opcheck(functional.linear, (x, values, None, *topology, number))
        torch.library.opcheck(functional.linear_input_grad, (dy, values.detach(), *topology, 20, number))
        torch.library.opcheck(functional.linear_values_grad, (dy, x.detach(), *topology, number))


def test_compiles_into_one_graph() -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    model = nn.Sequential(layer, nn.ReLU(), SparseLinear(10, 5))
    x = torch.randn(4, 20, requires_grad=True)
    model(x).square().sum().backward()
    expected = [x.grad.clone(), *(p.grad.clone() for p in model.parameters())]
    x.grad = None
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    for actual, wanted in zip([x.grad, *(p.grad for p in model.parameters())], expected, strict=True):
        assert torch.equal(actual, wanted)


def test_trains_after_inference_mode() -> None:
    layer = SparseLinear(20, 10)
    x = torch.randn(4, 20)
    with torch.inference_mode():
        y = layer(x)
        assert y.is_inference()
    trained = layer(x)
    trained.sum().backward()
    assert torch.equal(trained, y.clone())
    assert layer.values.grad is not None


def test_autocast_computes_in_the_layer_s_dtype() -> None:
    layer = SparseLinear(20, 10)
    x = torch.randn(4, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.bfloat16())
    assert y.dtype == torch.float32
    assert torch.equal(y, layer(x.bfloat16().float()))


def test_functional_call_uses_what_it_is_given() -> None:
    layer, other = SparseLinear(20, 10, sparsity=0.5), SparseLinear(20, 10, sparsity=0.8)
    x = torch.randn(4, 20)
    layer(x)
    zeros = torch.zeros_like(layer.values)
    assert torch.equal(torch.func.functional_call(layer, {"values": zeros}, (x,)), layer.bias.expand(4, 10))
    everything = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert torch.equal(torch.func.functional_call(layer, everything, (x,)), other(x))
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))


def test_double_backward_is_refused() -> None:
    layer = SparseLinear(5, 4)
    x = torch.randn(2, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


def test_torch_keeps_its_thread_count() -> None:
    code = (
        "import torch; torch.set_num_threads(1); import sparselab; layer = sparselab.SparseLinear(300, 300); "
        "layer(torch.randn(100, 300)); assert torch.get_num_threads() == 1; print('kept')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "kept"


def test_two_python_threads_at_once() -> None:
    layer = SparseLinear(200, 150)
    inputs = [torch.randn(130, 200) for _ in range(2)]
    expected = [layer(x).detach() for x in inputs]
    wrong: list[int] = []

    def work(which: int) -> None:
        for _ in range(20):
            if not torch.equal(layer(inputs[which]).detach(), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_layer_used_twice_sums_its_gradients() -> None:
    layer = SparseLinear(10, 10, sparsity=0.5, dtype=torch.float64)
    dense = layer.to_dense()
    x = torch.randn(4, 10, dtype=torch.float64)
    layer(layer(x).tanh()).sum().backward()
    dense(dense(x).tanh()).sum().backward()
    wanted = dense.weight.grad.reshape(-1)[layer.positions()]
    torch.testing.assert_close(layer.values.grad, wanted, rtol=1e-12, atol=1e-12)


def test_dtype_changes_reach_the_kernel() -> None:
    layer = SparseLinear(20, 10)
    x = torch.randn(4, 20)
    before = layer(x)
    layer.double().float()
    with torch.no_grad():
        layer.values.mul_(2)
        layer.bias.mul_(2)
    assert torch.equal(layer(x), 2 * before)
    assert layer.double()(x.double()).dtype == torch.float64


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "EMA": lambda layer: torch.optim.swa_utils.AveragedModel(layer).module,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("inputs", [20, 70_000])
def test_copies_compute_the_same_and_share_nothing(how: str, inputs: int) -> None:
    layer = SparseLinear(inputs, 10, sparsity=0.999)
    x = torch.randn(4, inputs)
    before = layer(x)
    twin = COPIES[how](layer)
    assert twin.indices.dtype == layer.indices.dtype
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin.values.zero_()
    assert torch.equal(layer(x), before)


def test_whole_module_through_torch_save(tmp_path: Any) -> None:
    layer = SparseLinear(20, 10)
    torch.save(layer, tmp_path / "layer.pt")
    twin = torch.load(tmp_path / "layer.pt", weights_only=False)
    x = torch.randn(4, 20)
    assert torch.equal(twin(x), layer(x))


def test_an_edited_topology_is_noticed() -> None:
    layer = SparseLinear(4, 1, sparsity=0.75, bias=False)
    x = torch.eye(4)
    layer(x)
    for column in range(4):
        layer.indices.copy_(torch.tensor([column], dtype=torch.uint16))
        assert layer(x).nonzero()[0].tolist() == [column, 0]


def test_a_topology_changed_between_forward_and_backward_is_refused() -> None:
    layer = SparseLinear(20, 10)
    loss = layer(torch.randn(4, 20)).sum()
    layer.rewrite(torch.tensor([0]), layer.positions()[:1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_meta_device_gives_shapes() -> None:
    layer = SparseLinear(1 << 17, 1 << 16, sparsity=0.999, device="meta")
    assert layer.values.is_meta
    assert layer(torch.empty(3, 1 << 17, device="meta")).shape == (3, 1 << 16)


@pytest.mark.parametrize("shape", [(), (9,), (3, 11), (2, 10, 3)])
def test_wrong_input_shape_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"input must have shape \(\.\.\., in_features=10\), got"):
        SparseLinear(10, 5)(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_wrong_input_dtype_is_named(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=f"torch.float32, got {dtype}"):
        SparseLinear(10, 5)(torch.zeros(2, 10, dtype=dtype))


def test_an_unsupported_layer_dtype_is_named() -> None:
    with pytest.raises(TypeError, match=r"values must be torch.float32 or torch.float64, got torch.bfloat16"):
        SparseLinear(10, 5).to(torch.bfloat16)(torch.zeros(2, 10, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="dtype must be"):
        SparseLinear(10, 5, dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((2.0, 3), TypeError, "in_features must be an integer, got 2.0"),
        ((2, True), TypeError, "out_features must be an integer, got True"),
        ((-1, 3), ValueError, "in_features must be at least 0, got -1"),
        ((2, 3, True, float("nan")), ValueError, "sparsity must be a finite number in"),
        ((2, 3, True, float("inf")), ValueError, "sparsity must be a finite number in"),
        ((2, 3, True, -0.1), ValueError, "got -0.1"),
        ((2, 3, True, 1.5), ValueError, "got 1.5"),
        ((2, 3, True, "0.9"), TypeError, "sparsity must be a number in"),
        ((2, 3, True, True), TypeError, "sparsity must be a number in"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SparseLinear(*arguments)


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 3), (3, 0), (0, 0)])
def test_empty_sizes(inputs: int, outputs: int) -> None:
    layer = SparseLinear(inputs, outputs)
    x = torch.randn(2, inputs, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (2, outputs)
    assert x.grad.shape == x.shape


def test_the_same_seed_draws_the_same_layer() -> None:
    layers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        layers.append(SparseLinear(50, 40))
    assert torch.equal(layers[0].positions(), layers[1].positions())
    assert torch.equal(layers[0].values, layers[1].values)
    assert not torch.equal(layers[0].positions(), layers[2].positions())


def test_weights_fill_the_range_of_their_row_s_fan_in() -> None:
    layer = SparseLinear(400, 300, sparsity=0.9)
    fan_in = torch.diff(layer.indptr).clamp(min=1)
    scaled = layer.values.detach() * torch.repeat_interleave(fan_in, torch.diff(layer.indptr)).sqrt()
    assert scaled.abs().max() <= 1
    assert scaled.abs().max() > 0.99
    # The mean of n uniform draws has standard deviation 1 / sqrt(3 n); six of them are never exceeded here.
    assert abs(scaled.mean()) < 6 / (3 * layer.nnz) ** 0.5
    assert (layer.bias.detach() * fan_in.sqrt()).abs().max() <= 1
