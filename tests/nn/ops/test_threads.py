"""Torch's threads beside the kernels', several Python threads, a fork, a spawned process."""

from __future__ import annotations

import copy
import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.queues import Queue
from typing import Any

import numba
import pytest
import torch
from torch import Tensor, nn

from sparselab import SparseLinear
from tests.kernels.process import run_python


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients, the gradients not accumulated anywhere."""
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


def in_threads(work: list[Callable[[], None]]) -> None:
    """Run all at once; the first error of any thread fails the test."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(work))

    def run(each: Callable[[], None]) -> None:
        try:
            start.wait()
            each()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(each,)) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_an_error_in_a_thread_is_seen() -> None:
    def fail() -> None:
        raise ValueError("seen")

    with pytest.raises(ValueError, match="seen"):
        in_threads([lambda: None, fail])


def build() -> nn.Module:
    return nn.Sequential(SparseLinear(150, 200), nn.Tanh(), nn.Linear(200, 90), SparseLinear(90, 40))


@pytest.mark.parametrize("shared", [False, True])
def test_torch_and_kernels_interleaved_from_two_threads(shared: bool) -> None:
    models = [build()] * 2 if shared else [build(), build()]
    inputs = [torch.randn(130, 150) for _ in models]
    expected = [step(model, x) for model, x in zip(models, inputs, strict=True)]

    def work(which: int) -> Callable[[], None]:
        def repeat() -> None:
            for _ in range(15):
                for got, wanted in zip(step(models[which], inputs[which]), expected[which], strict=True):
                    torch.testing.assert_close(got, wanted)

        return repeat

    in_threads([work(0), work(1)])


def test_two_threads_may_give_one_storage_different_topologies() -> None:
    layer = SparseLinear(150, 200, sparsity=0.8)
    others = [SparseLinear(150, 200, sparsity=sparsity) for sparsity in (0.5, 0.95)]
    x = torch.randn(20, 150)

    def work(other: SparseLinear) -> Callable[[], None]:
        parts = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        twin = copy.deepcopy(layer)  # functional_call swaps attributes, so the module itself is not shared
        twin.storage = layer.storage
        expected = other(x)

        def repeat() -> None:
            for _ in range(30):
                assert torch.equal(torch.func.functional_call(twin, parts, (x,)), expected)

        return repeat

    in_threads([work(other) for other in others])


@pytest.mark.parametrize("threads", [1, 2, 500])
def test_kernels_use_as_many_threads_as_torch(threads: int) -> None:
    before = torch.get_num_threads()
    layer = SparseLinear(30, 20)
    used: list[int] = []

    def work() -> None:
        torch.set_num_threads(threads)
        layer(torch.randn(4, 30))
        used.extend([numba.get_num_threads(), torch.get_num_threads()])

    try:
        in_threads([work])
    finally:
        torch.set_num_threads(before)
    assert used == [min(threads, numba.config.NUMBA_NUM_THREADS), threads]


FIRST_USE = """
import threading, torch
torch.set_num_threads(1)
from sparselab import SparseLinear
from sparselab.kernels.cpu.runtime import launch as _launch
_launch._MIN_WORK = 1
layer = SparseLinear(300, 300)
def work():
    x = torch.randn(100, 300, requires_grad=True)
    layer(x).sum().backward()
    print(torch.get_num_threads())
thread = threading.Thread(target=work)
{start}
print(torch.get_num_threads())
"""


DRAWN = """
import torch
torch.set_num_threads(1)
from sparselab import FanInLinear, SparseLinear
SparseLinear(24, 40)
torch.get_num_threads()  # from now on torch does not set it anew
FanInLinear(24, 16, sparsity=0.5)
print(torch.get_num_threads())
"""


def test_drawing_connections_leaves_torch_s_thread_count() -> None:
    assert run_python("-c", DRAWN, OMP_NUM_THREADS="1").split() == ["1"]


@pytest.mark.parametrize("start", ["thread.start(); thread.join()", "work()"])
def test_the_first_use_leaves_torch_s_thread_count(start: str) -> None:
    assert run_python("-c", FIRST_USE.format(start=start)).split() == ["1", "1"]


FORKS = """
import copy, os, signal, numpy as np, torch
from torch import nn
from sparselab import *
from sparselab.nn.ops import topologies

def fork(work):
    child = os.fork()
    if child == 0:
        signal.alarm(100)  # a child that waits for ever ends the test, too
        os._exit(0 if work() else 3)
    return child

def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

layer = SparseLinear(300, 300)
x = torch.randn(200, 300)
expected = layer(x).detach()
dy = torch.ones(200, 300)
layer(x).backward(dy)
expected_grad, layer.weight_values.grad = layer.weight_values.grad, None

def go_on():  # with as many threads as torch says, and the programs that the parent made
    y = layer(x)
    y.backward(dy)
    # Not by torch.equal, which would wait for torch's threads.
    found = y.detach().numpy(), layer.weight_values.grad.numpy()
    return all(map(np.array_equal, found, (expected.numpy(), expected_grad.numpy())))

def train():
    torch.set_num_threads(1)
    y = layer(x)
    y.sum().backward()
    return torch.equal(y, expected) and layer.weight_values.grad is not None

def make():
    torch.manual_seed(0)
    layers = [SparseLinear(20, 12), FanInLinear(20, 12), MaskedLinear(20, 12), SparseConv2d(3, 4, 3)]
    layers += [BlockSparseLinear(20, 12, sparsity=0.5, block_shape=(4, 4)), SparseMultiheadAttention(32, 4)]
    layers += [kind.from_pattern(np.tri(12, 12, dtype=bool)) for kind in (SparseLinear, MaskedLinear)]
    layers.append(SparseLinear.from_pattern(SparseLinear(20, 12).to_scipy()))
    layers.append(SparseLinear.from_pattern(SparseLinear(20, 12).to_sparse_csr()))
    model = sparsify(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20)), {"*": 0.8})
    model[0].reset_parameters()
    model[2].set_topology(np.tri(20, 30, dtype=bool))
    for layer in layers:
        layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    return [*layers, condense(model)]

print("go on", status(fork(go_on)))
print("train", status(fork(train)))
make()
print("make", status(fork(make)))
new = SparseLinear(20, 12)
with topologies._lock:  # as another thread may have it
    child = fork(lambda: new(torch.randn(3, 20)) is not None)
print("locked", status(child))
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this system")
def test_a_forked_child_trains_makes_layers_and_needs_no_lock_that_another_thread_held() -> None:
    told = run_python("-W", "ignore", "-c", FORKS).splitlines()
    assert told == ["go on 0", "train 0", "make 0", "locked 0"]


def train_in_child(layer: SparseLinear, x: Tensor, results: Queue[Any]) -> None:
    results.put(layer(x).detach().numpy())
    with torch.no_grad():
        layer.weight_values.mul_(2)
        layer.bias.mul_(2)
    results.put(None)


def test_a_spawned_process_trains_the_shared_layer() -> None:
    """As in Hogwild: the child gets the layer itself, and what it writes the parent's kernels read."""
    layer = SparseLinear(60, 40, sparsity=0.7).share_memory()
    x = torch.randn(5, 60)
    before = layer(x).detach()
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=train_in_child, args=(layer, x, results))
    child.start()
    try:
        assert (torch.from_numpy(results.get(timeout=120)) == before).all()
        assert results.get(timeout=120) is None
    finally:
        child.join(timeout=60)
    assert child.exitcode == 0
    assert torch.equal(layer(x), 2 * before)
    assert multiprocessing.active_children() == []
