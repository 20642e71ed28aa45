"""torch.compile: one graph, and right results after every kind of change to the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparselab import SparseLinear
from tests.nn.layers.test_linear import check_gradients


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def compiled(module: nn.Module) -> Callable[[Tensor], Tensor]:
    result: Callable[[Tensor], Tensor] = torch.compile(module, backend="aot_eager", fullgraph=True)
    return result


def check(layer: SparseLinear, call: Callable[[Tensor], Tensor]) -> None:
    """The compiled layer agrees with the oracle, gradients included."""
    x = torch.randn(5, layer.in_features, requires_grad=True)
    layer.zero_grad()
    y = call(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    check_gradients(layer, x, y, dy)


def test_compiles_before_it_ever_ran() -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    check(layer, compiled(layer))


def move(layer: SparseLinear, n_drop: int, n_grow: int) -> None:
    free = torch.ones(layer.in_features * layer.out_features, dtype=torch.bool)
    free[layer.positions()] = False
    layer.rewrite(torch.arange(n_drop), free.nonzero().flatten()[-n_grow:] if n_grow else torch.tensor([]))
    with torch.no_grad():
        layer.weight_values.normal_()


def load(layer: SparseLinear, sparsity: float) -> None:
    layer.load_state_dict(SparseLinear(20, 10, sparsity=sparsity).state_dict())


CHANGES: dict[str, Callable[[SparseLinear], Any]] = {
    "rewritten": lambda layer: move(layer, 7, 7),
    "shrunk": lambda layer: move(layer, 7, 0),
    "grown": lambda layer: move(layer, 0, 7),
    "loaded": lambda layer: load(layer, 0.5),
    "loaded from another sparsity": lambda layer: load(layer, 0.8),
    "drawn anew": lambda layer: layer.reset_parameters(),
    "frozen and back": lambda layer: layer.requires_grad_(False).requires_grad_(True),
    "edited in place": lambda layer: layer.indices.copy_(
        torch.cat([torch.arange(n) for n in torch.diff(layer.indptr).tolist()]).to(torch.uint16)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_stays_right(change: str) -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    call = compiled(layer)
    check(layer, call)
    before = layer.positions().clone()
    CHANGES[change](layer)
    assert torch.equal(layer.positions(), before) == (change == "frozen and back")
    check(layer, call)


def test_layers_of_one_graph_keep_their_own_topologies() -> None:
    model = nn.Sequential(SparseLinear(20, 20, sparsity=0.8), SparseLinear(20, 20, sparsity=0.8))
    call = compiled(model)
    x = torch.randn(5, 20)
    torch.testing.assert_close(call(x), model[1].to_dense()(model[0].to_dense()(x)))
    move(model[0], 9, 9)
    torch.testing.assert_close(call(x), model[1].to_dense()(model[0].to_dense()(x)))


@pytest.mark.parametrize("copies", [2, 12])
def test_layers_compiled_one_by_one(copies: int) -> None:
    """As many as exceed the number of times one function is recompiled."""
    layers = [SparseLinear(20, 10, sparsity=0.5) for _ in range(copies)]
    for layer in layers:
        check(layer, torch.compile(layer, backend="aot_eager"))


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda layer, x: torch.func.grad(lambda x: layer(x).tanh().sum())(x),
    "vmap": lambda layer, x: torch.func.vmap(layer)(x),
    "per-sample": lambda layer, x: torch.func.vmap(torch.func.grad(lambda x: layer(x).tanh().sum()))(x),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x + 1,)),
}


@pytest.mark.parametrize("how", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_what_transforms_is_not_compiled_and_right(how: str) -> None:
    """Inside the compiler an operator would drop tangents in silence."""
    layer, x = SparseLinear(20, 10, sparsity=0.5), torch.randn(5, 20)
    call = TRANSFORMS[how]
    torch.testing.assert_close(
        torch.compile(lambda x: call(layer, x), backend="aot_eager")(x), call(layer.to_dense(), x)
    )
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda x: call(layer, x), backend="aot_eager", fullgraph=True)(x)


def test_transforms_of_a_compiled_layer_are_right() -> None:
    layer, x = SparseLinear(20, 10, sparsity=0.5), torch.randn(5, 20)
    call = torch.compile(layer, backend="aot_eager")
    check(layer, call)
    dense = layer.to_dense()
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.vmap):
        torch.testing.assert_close(transform(call)(x), transform(dense)(x))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x + 1)
        got, wanted = (torch.autograd.forward_ad.unpack_dual(each(dual)) for each in (call, dense))
    torch.testing.assert_close(got, wanted)
