"""What algorithms see: finding sparse layers, and watching their gradients however autograd runs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparselab import SparseLinear
from sparselab.nn import topology
from sparselab.nn.topology import SparseTopology, find_sparse, is_sparse
from tests.nn.test_rewrite import Watcher


def test_a_sparse_layer_has_everything_an_algorithm_may_use() -> None:
    assert is_sparse(SparseLinear(6, 4))
    members = {name for name in dir(SparseTopology) if not name.startswith("_")}
    members |= set(SparseTopology.__annotations__)
    layer = SparseLinear(6, 4)
    assert members == set(topology._MEMBERS)
    assert all(hasattr(layer, name) for name in members)


def test_a_module_that_lacks_one_part_is_not_sparse() -> None:
    class Almost(SparseLinear):
        @property
        def nnz(self) -> int:
            raise AttributeError

    layer = SparseLinear(6, 4)
    layer.__class__ = Almost
    assert not is_sparse(layer)
    assert not is_sparse(nn.Linear(6, 4))


def test_nobody_asks_by_isinstance() -> None:
    """Since Python 3.12 isinstance with a protocol misses the parameters of a module."""
    with pytest.raises(TypeError, match="runtime_checkable"):
        isinstance(SparseLinear(6, 4), SparseTopology)


def test_find_sparse_names_each_layer_once() -> None:
    shared = SparseLinear(6, 6)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6), shared), "b": shared, "c": SparseLinear(6, 2)})
    assert list(find_sparse(model)) == [("a.1", shared), ("c", model["c"])]
    assert list(find_sparse(shared)) == [("", shared)]
    assert list(find_sparse(nn.Linear(2, 2))) == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_watcher_sees_a_checkpointed_layer_once_per_backward_pass(reentrant: bool) -> None:
    layer, watcher = SparseLinear(6, 4), Watcher()
    layer.gradient_watcher = watcher
    x = torch.randn(3, 6, requires_grad=True)
    checkpoint(lambda x: layer(x.sin()).cos(), x, use_reentrant=reentrant).sum().backward()
    ((seen_x, seen_dy),) = watcher.seen
    assert torch.equal(seen_x, x.detach().sin())
    torch.testing.assert_close(seen_dy, -layer(x.sin()).sin().detach())


# Torch's own, when it compiles the part after a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_watcher_sees_a_compiled_layer() -> None:
    torch.compiler.reset()
    layer, watcher = SparseLinear(6, 4), Watcher()
    compiled = torch.compile(nn.Sequential(nn.Linear(6, 6), layer), backend="aot_eager")
    compiled(torch.randn(3, 6)).sum().backward()
    layer.gradient_watcher = watcher
    compiled(torch.randn(3, 6)).sum().backward()
    assert (watcher.forwards, len(watcher.seen)) == (1, 1)
    layer.gradient_watcher = None
    compiled(torch.randn(3, 6)).sum().backward()
    assert (watcher.forwards, len(watcher.seen)) == (1, 1)


def test_a_watcher_sees_the_dense_gradient_of_all_tokens() -> None:
    layer, watcher = SparseLinear(6, 4, sparsity=0.5), Watcher()
    layer.gradient_watcher = watcher
    dense = layer.to_dense()
    x = torch.randn(2, 3, 6)
    layer(x).square().sum().backward()
    dense(x).square().sum().backward()
    ((seen_x, seen_dy),) = watcher.seen
    assert not seen_x.requires_grad
    assert not seen_dy.requires_grad
    torch.testing.assert_close(seen_dy.T @ seen_x, dense.weight.grad)


def test_a_watcher_that_fails_stops_the_backward_pass_and_nothing_else() -> None:
    class Failing(Watcher):
        def backward_seen(self, x: torch.Tensor, dy: torch.Tensor) -> None:
            raise ValueError("seen enough")

    layer = SparseLinear(6, 4)
    layer.gradient_watcher = Failing()
    with pytest.raises(ValueError, match="seen enough"):
        layer(torch.randn(3, 6)).sum().backward()
    layer.gradient_watcher = None
    layer(torch.randn(3, 6)).sum().backward()
    assert layer.values.grad is not None


def test_a_watcher_does_not_watch_the_layer_beside() -> None:
    first, second, watcher = SparseLinear(6, 6), SparseLinear(6, 4), Watcher()
    first.gradient_watcher = watcher
    second(first(torch.randn(3, 6))).sum().backward()
    assert [dy.shape for _, dy in watcher.seen] == [(3, 6)]


def test_copies_are_not_watched() -> None:
    layer = SparseLinear(6, 4)
    layer.gradient_watcher = Watcher()
    for twin in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.gradient_watcher is None
    assert layer.gradient_watcher is not None
