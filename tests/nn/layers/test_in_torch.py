"""SparseLinear among torch's own machinery: operators, compilation, copies, threads, devices."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparselab import (
    BlockSparseLinear,
    FanInLinear,
    MaskedLinear,
    RigL,
    SparseConv2d,
    SparseLinear,
    SparseMultiheadAttention,
)
from sparselab.nn.ops import linear as functional
from sparselab.nn.ops.conv import conv2d


def test_opcheck() -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    x, dy = torch.randn(4, 20, requires_grad=True), torch.randn(4, 10)
    values = layer.weight_values.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    topology = layer.topology_arguments()
    torch.library.opcheck(functional.linear_operator, (x, values, bias, *topology))
    torch.library.opcheck(functional.linear_operator, (x, values, None, *topology))
    dy.requires_grad_()
    torch.library.opcheck(functional.linear_input_grad, (dy, values, *topology))
    for with_bias in (False, True):
        torch.library.opcheck(functional.linear_values_grad, (dy, x, *topology, with_bias))


def test_opcheck_of_convolutions() -> None:
    layer = SparseConv2d(4, 6, 3, padding=1, sparsity=0.5)
    x, dy = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(2, 6, 5, 5, requires_grad=True)
    values = layer.weight_values.detach().clone().requires_grad_()
    rest = *layer.topology_arguments(), layer.geometry.numbers
    torch.library.opcheck(conv2d.conv2d_operator, (x, values, None, *rest))
    torch.library.opcheck(conv2d.conv2d_input_grad, (dy, values, *rest, 5, 5))
    torch.library.opcheck(conv2d.conv2d_values_grad, (dy, x, *rest))


def test_the_operators_are_differentiable_by_themselves() -> None:
    layer = SparseLinear(5, 4, sparsity=0.5, dtype=torch.float64)
    given = (torch.randn(3, n, dtype=torch.float64, requires_grad=True) for n in (5, 4))
    values = layer.weight_values.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    topology = layer.topology_arguments()
    (x, dy), check = given, torch.autograd.gradgradcheck
    assert check(lambda *each: functional.linear_operator(*each, *topology), (x, values, bias))
    assert check(lambda *each: functional.linear_input_grad(*each, *topology), (dy, values))
    assert check(lambda *each: functional.linear_values_grad(*each, *topology, True), (dy, x))
    sums = functional.linear_values_grad(dy, x, *topology, True)[1]
    assert torch.equal(torch.autograd.grad(sums.sum(), dy)[0], torch.ones_like(dy))


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
    assert layer.weight_values.grad is not None


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["single", "fan-in", "blocks", "conv", "attention"])
def test_autocast_gives_what_the_masked_twin_gives(
    kind: str, given: torch.dtype, autocast: torch.dtype
) -> None:
    """The same dtype; the numbers are nearer to those without autocast, as weights are not rounded."""
    layer: Any = {
        "single": lambda: SparseLinear(20, 10, sparsity=0.5),
        "fan-in": lambda: FanInLinear(20, 10, sparsity=0.5),
        "blocks": lambda: BlockSparseLinear(20, 10, sparsity=0.5, block_shape=(4, 4)),
        "conv": lambda: SparseConv2d(3, 4, 3, sparsity=0.5),
        "attention": lambda: SparseMultiheadAttention(20, 4, sparsity=0.5),
    }[kind]()
    dense = layer.to_dense()
    x = (torch.randn(2, 3, 6, 6) if kind == "conv" else torch.randn(4, 2, 20)).to(given)

    def call(module: Any, x: Tensor) -> Tensor:
        return module(x, x, x)[0] if kind == "attention" else module(x)

    plain = call(layer, x.float())
    with torch.autocast("cpu", dtype=autocast):
        y, expected = call(layer, x), call(dense, x)
    assert y.dtype == expected.dtype == autocast
    torch.testing.assert_close(y, expected, rtol=0.03, atol=0.03)
    if kind != "attention":
        assert torch.equal(y, plain.to(autocast))


def test_autocast_leaves_double_precision_alone() -> None:
    layer, x = SparseLinear(20, 10, dtype=torch.float64), torch.randn(4, 20, dtype=torch.float64)
    with torch.autocast("cpu"):
        y, expected = layer(x), layer.to_dense()(x)
    assert y.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(y, expected)


def test_autocast_trains_as_the_masked_twin() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SparseLinear(20, 30, sparsity=0.5), nn.ReLU(), SparseLinear(30, 1, sparsity=0.5))
    twin = nn.Sequential(MaskedLinear.from_sparse(model[0]), nn.ReLU(), MaskedLinear.from_sparse(model[2]))
    x, losses = torch.randn(64, 20), []
    for each in (model, twin):
        optimizer = torch.optim.Adam(each.parameters(), lr=0.01)
        each.apply(algorithm := RigL(update_freq=10))
        for _ in range(100):
            optimizer.zero_grad()
            with torch.autocast("cpu"):
                loss = (each(x) - x[:, :1].sin()).float().square().mean()
            loss.backward()
            optimizer.step()
            algorithm.step()
        losses.append(loss.item())
    assert losses[0] < 0.05
    assert abs(losses[0] - losses[1]) < 0.02


def test_functional_call_uses_what_it_is_given() -> None:
    layer, other = SparseLinear(20, 10, sparsity=0.5), SparseLinear(20, 10, sparsity=0.8)
    x = torch.randn(4, 20)
    layer(x)
    zeros = torch.zeros_like(layer.weight_values)
    assert torch.equal(
        torch.func.functional_call(layer, {"weight_values": zeros}, (x,)), layer.bias.expand(4, 10)
    )
    everything = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert torch.equal(torch.func.functional_call(layer, everything, (x,)), other(x))
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))


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
    torch.testing.assert_close(layer.weight_values.grad.flatten(), wanted, rtol=1e-12, atol=1e-12)


def test_dtype_changes_reach_the_kernel() -> None:
    layer = SparseLinear(20, 10)
    x = torch.randn(4, 20)
    before = layer(x)
    layer.double().float()
    with torch.no_grad():
        layer.weight_values.mul_(2)
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
        twin.weight_values.zero_()
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
    assert layer.weight_values.is_meta
    assert layer(torch.empty(3, 1 << 17, device="meta")).shape == (3, 1 << 16)
