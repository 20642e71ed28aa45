"""Products that are kept as programs: what they compute, when there are none, and that none can be stale."""

from __future__ import annotations

import copy
import itertools
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparselab import BlockSparseLinear, SparseLinear
from sparselab.kernels.cpu.csr.skinny_dw import MOST_SAMPLED_TOKENS
from sparselab.kernels.cpu.runtime import launch as _launch
from sparselab.nn.ops.cpu.programs.base import _MOST_PROGRAMS, Programs
from tests.oracle import assert_close, product
from tests.shared import half

#: Outputs and inputs of one connection, or None for single ones.
LAYOUTS = (None, (4, 4), (16, 16), (4, 1), (32, 32), (1, 4), (3, 5))
SIZES = ((64, 96), (35, 70))
TOKENS = (1, 2, 5, 17, 33, 65, 150)


def make(kind: tuple[int, int] | None, shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> Any:
    rows, columns = shape
    torch.manual_seed(0)
    if kind is None:
        return SparseLinear(columns, rows, bias, sparsity=0.8, dtype=dtype)
    return BlockSparseLinear(columns, rows, bias, block_shape=kind, sparsity=0.5, dtype=dtype)


def programs_of(layer: Any) -> Programs:
    """What the layer keeps."""
    kept = layer.storage.topology(layer).kept
    found = getattr(kept, "programs", kept)
    assert isinstance(found, Programs)
    return found


def tokens(n: int, features: int, dtype: torch.dtype, turned: bool) -> Tensor:
    """Random tokens, which lie feature by feature if turned."""
    drawn = torch.randn(features, n, dtype=dtype).t() if turned else torch.randn(n, features, dtype=dtype)
    assert drawn.shape == (n, features)
    return drawn


def dense(layer: Any) -> np.ndarray[Any, Any]:
    weight: np.ndarray[Any, Any] = layer.to_dense().weight.detach().double().numpy()
    return weight


def gradient_of(layer: Any) -> np.ndarray[Any, Any]:
    """The gradient of the weights as a dense matrix."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight_values.copy_(layer.weight_values.grad)
    return dense(twin)


@pytest.mark.any_width
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_programs_compute_what_dense_layers_do(
    kind: tuple[int, int] | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_launch, "_MIN_WORK", 1 << 14)
    for shape, n, bias, turned in half(SIZES, TOKENS, (True, False), (False, True)):
        layer = make(kind, shape, bias, dtype)
        with torch.no_grad():  # live everywhere: a gradient has no way to tell where connections are
            layer.weight_values.uniform_(0.5, 1.0)
        live = dense(layer) != 0
        x = tokens(n, shape[1], dtype, turned).requires_grad_()
        dy = tokens(n, shape[0], dtype, turned)
        y = layer(x)
        y.backward(dy)
        assert x.grad is not None
        W, X, DY = dense(layer), x.detach().double().numpy(), dy.double().numpy()
        name = str(dtype).removeprefix("torch.")
        offsets = layer.bias.detach().double().numpy() if bias else None
        assert_close(y.detach().numpy().T, product(W, X.T, live=live, bias=offsets), name)
        assert_close(x.grad.numpy().T, product(W.T, DY.T, live=live.T), name)
        exact = product(DY.T, X)
        found = gradient_of(layer)
        assert np.all(found[~live] == 0)
        assert_close(np.where(live, found, exact.value).astype(name), exact, name)
        if bias:
            assert_close(layer.bias.grad.numpy()[:, None], product(DY.T, np.ones((n, 1))), name)
        # A bias that must be spread over panels, and inputs of few tokens that do not lie side by side.
        is_slow = (bias and kind in ((1, 4), (3, 5))) or (
            kind is None and turned and n <= MOST_SAMPLED_TOKENS
        )
        assert is_slow or None not in programs_of(layer)._known.values()


@pytest.mark.any_width
@pytest.mark.parametrize("kind", LAYOUTS[:5])
def test_one_by_one_and_at_once_are_the_same_bits_on_any_number_of_threads(
    kind: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_launch, "_MIN_WORK", 1 << 12)
    layer = make(kind, (64, 96), True, torch.float32)
    before = torch.get_num_threads()
    try:
        for n in (3, 17, 150):
            x, dy = torch.randn(n, 96), torch.randn(n, 64)
            found = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with torch.no_grad():
                    topology = layer.storage.topology(layer)
                    products, values = topology.products, layer.weight_values
                    y = layer(x)
                    at_once = products.gradients(topology, values, dy, x, True)
                    dx = products.input_grad(topology, values, dy)
                    dvalues, dbias = products.values_grad(topology, dy, x, True)
                    slow = products.product(topology, values, x, layer.bias, out=torch.float32)
                found.append((y, *at_once))
                assert all(map(torch.equal, (y, *at_once), (slow, dx, dvalues, dbias)))
            assert all(map(torch.equal, *found))
            keys = [key for key, program in programs_of(layer)._known.items() if program and key[0] == n]
            assert {key[1] for key in keys} == {1, min(2, _launch.worker_count())}
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", [None, (4, 4)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_passes(kind: tuple[int, int] | None, bad: float) -> None:
    layer = make(kind, (64, 96), True, torch.float32)
    twin = layer.to_dense()
    x, dy = torch.randn(40, 96), torch.randn(40, 64)
    x[3, 5] = dy[7, 11] = bad
    found = []
    for each in (layer, twin):
        leaf = x.clone().requires_grad_()
        y = each(leaf)
        y.backward(dy)
        found.append((y.detach(), leaf.grad, each.bias.grad))
    for mine, theirs in zip(*found, strict=True):
        is_mine, is_theirs = mine.isfinite(), theirs.isfinite()
        # A dense layer multiplies zeros with what is not finite, too.
        assert not (is_theirs & ~is_mine).any()
        assert torch.allclose(mine[is_theirs], theirs[is_theirs], atol=1e-4)
    assert not found[0][0][3].isfinite().all()
    assert not found[0][1][7].isfinite().all()
    assert not found[0][2][11].isfinite()


@pytest.mark.parametrize("kind", [None, (4, 4)])
def test_other_connections_have_other_programs(kind: tuple[int, int] | None) -> None:
    layer = make(kind, (64, 96), True, torch.float32)
    x = torch.randn(8, 96)
    layer(x).sum().backward()
    first = programs_of(layer)
    positions = set(range(layer.grid[0] * layer.grid[1])) - set(layer.positions().tolist())
    layer.rewrite(torch.arange(4), torch.tensor(sorted(positions)[:6]))
    with torch.no_grad():
        layer.weight_values.normal_()
        assert torch.allclose(layer(x), layer.to_dense()(x), atol=1e-5)
    assert programs_of(layer) is not first


def test_copies_and_pickles_have_programs_of_their_own() -> None:
    layer, x = make(None, (64, 96), True, torch.float32), torch.randn(8, 96)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.weight_values.zero_()
    assert torch.equal(layer(x), expected)
    assert torch.equal(twin(x), twin.bias.expand(8, -1))


@pytest.mark.parametrize("kind", [None, (4, 4)])
def test_python_threads_may_train_one_layer(kind: tuple[int, int] | None) -> None:
    layer = make(kind, (64, 96), True, torch.float32)
    batches = [(torch.randn(n, 96), torch.randn(n, 64)) for n in (3, 20, 40, 70)]

    def gradients(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        return y.detach(), *torch.autograd.grad(y, (leaf, layer.weight_values, layer.bias), dy)

    expected = [gradients(*batch) for batch in batches]
    fresh = copy.deepcopy(layer)  # whose programs are made by all threads at once
    layer = fresh
    wrong = []

    def often(k: int) -> None:
        for _ in range(60):
            if not all(map(torch.equal, gradients(*batches[k]), expected[k])):
                wrong.append(k)

    threads = [threading.Thread(target=often, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_only_so_many_programs_are_kept() -> None:
    layer = make(None, (8, 8), True, torch.float32)
    with torch.no_grad():
        for n in range(1, 2 * _MOST_PROGRAMS):
            layer(torch.randn(n, 8))
    assert len(programs_of(layer)._known) <= _MOST_PROGRAMS


def test_programs_of_backward_passes_go_with_their_plans() -> None:
    for kind in (None, (4, 4)):
        layer = make(kind, (64, 96), True, torch.float32)
        layer(torch.randn(8, 96)).sum().backward()
        topology = layer.storage.topology(layer)
        held = topology.plan_bytes
        topology.keep_forward()
        assert {key[4] for key in programs_of(layer)._known} == {None}
        assert topology.plan_bytes < held or kind is not None


@pytest.mark.parametrize("kind", [None, (4, 4)])
def test_layers_without_work_have_no_programs(kind: tuple[int, int] | None) -> None:
    for shape, n in itertools.product(((0, 8), (8, 0), (8, 8)), (0, 4)):
        layer = make(kind, (8, 8), True, torch.float32) if shape == (8, 8) else None
        if layer is None:
            layer = SparseLinear(shape[1], shape[0], sparsity=0.5)
        x = torch.randn(n, shape[1], requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == (n, shape[0])
        assert x.grad is not None
        assert x.grad.shape == x.shape


def test_layers_of_one_size_do_not_mix_up() -> None:
    first, second = (nn.Sequential(make(None, (64, 64), True, torch.float32)) for _ in range(2))
    with torch.no_grad():
        second[0].weight_values.mul_(2)
    x = torch.randn(5, 64)
    assert torch.allclose(second(x) - second[0].bias, 2 * (first(x) - first[0].bias), atol=1e-5)
