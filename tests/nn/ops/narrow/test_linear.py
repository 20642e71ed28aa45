"""The operator of narrow weights: what torch compiles, exports, transforms and counts; what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparselab import SparseLinear
from sparselab.nn.ops.narrow.linear import narrow_linear, narrow_operator
from sparselab.nn.ops.narrow.weights import widen
from sparselab.nn.storage.narrow import find_narrow
from tests.kernels.process import run_python
from tests.nn.layers.test_linear import CountOperators
from tests.nn.narrow import KINDS, assert_right, every_dtype, every_kind, weights_of

INT8, BF16, F32 = torch.int8, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def operands(layer: Any, x: Tensor, out: torch.dtype = F32) -> tuple[Any, ...]:
    return x, *find_narrow(layer), layer.bias, *layer.topology_arguments(), out


@every_kind
@every_dtype
def test_the_operator_is_what_torch_asks_of_one(kind: str, dtype: torch.dtype) -> None:
    layer = KINDS[kind](61, 43).freeze(weights=dtype)
    for x, out in ((torch.randn(5, 61), F32), (torch.randn(5, 61).to(BF16), BF16)):
        torch.library.opcheck(narrow_operator, operands(layer, x.requires_grad_(), out))


@every_kind
@every_dtype
def test_compiled(kind: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(KINDS[kind](61, 43).freeze(weights=dtype), nn.ReLU())
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    for tokens in (1, 5, 70):
        x = torch.randn(tokens, 61, requires_grad=True)
        other = x.detach().clone().requires_grad_()
        y, expected = call(x), model(other)
        torch.testing.assert_close(y, expected)
        y.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(x.grad, other.grad)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        assert call(torch.randn(5, 61)).dtype is BF16


def test_compiled_anew_when_it_is_frozen_and_loaded() -> None:
    layer = SparseLinear(61, 43, sparsity=0.5)
    call = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 61)
    for dtype in (None, INT8, BF16, F32, INT8):
        layer.freeze(weights=dtype)
        torch.testing.assert_close(call(x), layer.to_dense()(x))
    layer.load_state_dict(SparseLinear(61, 43, sparsity=0.8).freeze(weights=INT8).state_dict())
    torch.testing.assert_close(call(x), layer.to_dense()(x))


@every_kind
@every_dtype
def test_exported(kind: str, dtype: torch.dtype) -> None:
    layer = KINDS[kind](61, 43).freeze(weights=dtype)
    x, batch = torch.randn(5, 61), torch.export.Dim("batch", min=2)
    program = torch.export.export(nn.Sequential(layer), (x,), dynamic_shapes=({0: batch},))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.sparselab.narrow_linear.default]
    held = {name: tensor.dtype for name, tensor in program.state_dict.items()}
    assert held["0.weight_values"] is dtype
    for tokens in (2, 70):
        x = torch.randn(tokens, 61)
        torch.testing.assert_close(program.module()(x), layer(x))


@every_kind
@every_dtype
def test_transformed(kind: str, dtype: torch.dtype) -> None:
    layer = KINDS[kind](61, 43).freeze(weights=dtype)
    x, W = torch.randn(4, 61), weights_of(layer).float()
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    torch.testing.assert_close(torch.func.jacrev(layer)(x[0]), W, rtol=1e-4, atol=1e-5)
    gradient = torch.func.vmap(torch.func.grad(lambda x: layer(x).sum()))(x)
    torch.testing.assert_close(gradient, W.sum(0).expand(4, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@every_dtype
def test_forward_mode(dtype: torch.dtype) -> None:
    layer = SparseLinear(61, 43).freeze(weights=dtype)
    x, tangent = torch.randn(4, 61), torch.randn(4, 61)
    y, dy = torch.func.jvp(layer, (x,), (tangent,))
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(dy, tangent @ weights_of(layer).float().T, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_and_drawn() -> None:
    model, x = nn.Sequential(SparseLinear(61, 43).freeze(weights=INT8), nn.ReLU()), torch.randn(5, 61)
    traced = torch.jit.trace(model, (x,))
    assert torch.equal(traced(x[:2]), model(x[:2]))
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert torch.equal(graph(x), model(x))


def test_a_mode_sees_the_operator_and_operations_are_counted() -> None:
    layer, x = SparseLinear(61, 43).freeze(weights=INT8), torch.randn(5, 61)
    with CountOperators() as operators:
        layer(x)
    assert operators.called == ["narrow_linear"]
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 5 * layer.nnz


@every_dtype
def test_weights_exist_in_float32_for_the_gradient_alone(dtype: torch.dtype) -> None:
    layer, x = SparseLinear(61, 43).freeze(weights=dtype), torch.randn(5, 61, requires_grad=True)
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        y = layer(x)
    assert kept == [dtype] + [F32] * (dtype is INT8)
    del y
    widened = widen(find_narrow(layer), layer.topology())
    assert widened.data_ptr() != widen(find_narrow(layer), layer.topology()).data_ptr()


@every_dtype
def test_what_hooks_give_back_is_looked_at(dtype: torch.dtype) -> None:
    layer, x = SparseLinear(61, 43).freeze(weights=dtype), torch.randn(5, 61, requires_grad=True)
    for spoil in (lambda t: t[:3], lambda t: t.float(), lambda t: t.double()):

        def unpack(t: Tensor, spoil: Callable[[Tensor], Tensor] = spoil) -> Tensor:
            return spoil(t) if t.dtype is dtype else t

        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = layer(x)
        with pytest.raises((RuntimeError, TypeError), match="values must be"):
            y.sum().backward()


def test_a_change_between_the_passes_is_seen() -> None:
    x = torch.randn(5, 61, requires_grad=True)
    layer = SparseLinear(61, 43).freeze(weights=INT8)
    y = layer(x)
    layer.load_state_dict(SparseLinear(61, 43).freeze(weights=INT8).state_dict())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_operands_that_do_not_fit_are_named() -> None:
    layer, x = SparseLinear(61, 43).freeze(weights=INT8), torch.randn(5, 61)
    x_, values, scales, bias, indptr, indices, sizes, layout, out = operands(layer, x)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"x": torch.randn(5, 60)}, r"x must be torch\.float32 of shape \(tokens, 61\) on cpu, got"),
        ({"x": torch.randn(5, 61).double()}, r"x must be torch\.float32 .*, got torch\.float64"),
        ({"x": torch.randn(61)}, "x must be"),
        ({"values": values[1:]}, r"values must be torch\.int8 of shape"),
        ({"values": values.float()}, r"got torch\.float32 with"),
        ({"scales": None}, r"got torch\.int8 without"),
        ({"values": values.to(BF16)}, r"got torch\.bfloat16 with"),
        ({"scales": scales[1:]}, r"scales must be torch\.float32 of shape \(43\)"),
        ({"scales": scales.double()}, r"scales must be .*, got torch\.float64"),
        ({"bias": bias[1:]}, r"bias must be torch\.float32 of shape \(43\)"),
        ({"bias": bias.detach().to(BF16)}, r"bias must be .*, got torch\.bfloat16"),
        ({"x": torch.randn(5, 61, device="meta")}, "must be on the device of x, meta, got cpu"),
    ]
    for change, message in wrong:
        given = {
            "x": x_, "values": values, "scales": scales, "bias": bias, "indptr": indptr, "indices": indices,
            "sizes": sizes, "layout": layout, "out": out, **change,
        }  # fmt: skip
        with pytest.raises((RuntimeError, TypeError), match=message):
            torch.ops.sparselab.narrow_linear(*given.values())
    freed = values.clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="values must have memory for all of its entries"):
        torch.ops.sparselab.narrow_linear(x, freed, scales, bias, indptr, indices, sizes, layout, out)


@every_kind
@every_dtype
def test_weights_that_lie_otherwise(kind: str, dtype: torch.dtype) -> None:
    layer, x = KINDS[kind](61, 43).freeze(weights=dtype), torch.randn(5, 61)
    expected = [layer(x), layer(torch.cat([x] * 20))]
    for name in ("weight_values", "weight_scales"):
        if (held := layer._buffers.get(name)) is not None:
            layer._buffers[name] = held.repeat_interleave(2, 0)[::2]
            assert not layer._buffers[name].is_contiguous()
    assert torch.equal(layer(x), expected[0])
    assert torch.equal(layer(torch.cat([x] * 20)), expected[1])


def test_layouts_without_such_products_are_computed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SparseLinear(61, 43).freeze(weights=INT8)

    class Plain:
        """What a layout of somebody else has."""

        def product(self, topology: Any, values: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
            return products.product(topology, values, x, bias)

        def input_grad(self, topology: Any, values: Tensor, grad: Tensor) -> Tensor:
            return products.input_grad(topology, values, grad)

    products = layer.topology().products
    monkeypatch.setattr(layer.topology(), "products", Plain())
    x = torch.randn(5, 61, requires_grad=True)
    y = narrow_linear(x, find_narrow(layer), layer.bias, layer, F32)
    assert_right(layer, x, y)
    y.sum().backward()
    torch.testing.assert_close(x.grad, weights_of(layer).sum(0).float().expand(5, -1))


FORKED = """
import os, torch, sparselab
layer = sparselab.SparseLinear(300, 200).freeze(weights=torch.int8)
x = torch.randn(70, 300)
y = layer(x), layer(x[:1])
child = os.fork()
if not child:
    os._exit(not (torch.equal(layer(x), y[0]) and torch.equal(layer(x[:1]), y[1])))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_in_a_forked_process() -> None:
    assert run_python("-W", "ignore", "-c", FORKED).split() == ["0"]


def test_several_threads_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    layers = [SparseLinear(300, 200).freeze(weights=INT8 if k % 2 else BF16) for k in range(4)]
    inputs = [torch.randn(tokens, 300) for tokens in (1, 9, 70)]
    expected = [[layer(x) for x in inputs] for layer in layers]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(lambda layer: [copy.copy(layer(x)) for x in inputs], layers)
            for ours, theirs in zip(found, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
