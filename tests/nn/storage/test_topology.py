"""What algorithms see: finding sparse layers, and watching their gradients however autograd runs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparselab import MaskedLinear, SparseLinear
from sparselab.nn.layers.base import find_sparse, is_sparse
from sparselab.nn.ops.operands import GradientOperands
from sparselab.nn.storage.entries import move_slots
from tests.nn.storage.test_rewrite import Seen

LAYERS = [SparseLinear, MaskedLinear]


@pytest.mark.parametrize("kind", LAYERS)
def test_entries_follow_their_connection(kind: Any) -> None:
    layer = kind(6, 4, sparsity=0.5)
    entries = torch.zeros_like(layer.stored)
    entries[layer.stored != 0] = torch.arange(12.0)
    assert layer.per_connection(entries).tolist() == list(range(12))
    layer.put(entries, torch.tensor([3, 7]), torch.tensor([30.0, 70.0]))
    assert layer.per_connection(entries).tolist() == [0, 1, 2, 30, 4, 5, 6, 70, 8, 9, 10, 11]
    layer.put(entries, torch.tensor([3, 7]), torch.tensor([3.0, 7.0]))
    free = sorted(set(range(24)) - set(layer.positions().tolist()))
    source = layer.rewrite(torch.tensor([0, 5]), torch.tensor([free[1], free[7]]))
    moved = layer.moved(entries, source)
    assert moved is entries
    expected = [float(slot) if slot >= 0 else 0.0 for slot in source.tolist()]
    assert layer.per_connection(moved).tolist() == expected
    assert expected.count(0.0) == 2
    source = layer.rewrite(torch.tensor([1]), torch.empty(0, dtype=torch.int64))
    assert layer.per_connection(layer.moved(moved, source)).tolist() == expected[:1] + expected[2:]


@pytest.mark.parametrize(
    "entries",
    [
        torch.tensor([1, torch.nan, 3]),
        torch.tensor([1, 2, 3], dtype=torch.bfloat16),
        torch.tensor([1, 2j, torch.nan]),
        torch.arange(6.0)[::2],
        torch.tensor([True, False, True]),
    ],
    ids=["NaN", "bfloat16", "complex", "strided", "bool"],
)
def test_slots_of_every_kind_move(entries: torch.Tensor) -> None:
    old = entries.clone()
    longer = move_slots(entries, torch.tensor([2, -1, 1, -1, 0]))
    expected = torch.stack([old[2], old.new_zeros(()), old[1], old.new_zeros(()), old[0]])
    torch.testing.assert_close(longer, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(entries, old, rtol=0, atol=0, equal_nan=True)
    assert move_slots(entries, torch.tensor([-1, 0, 2])) is entries
    expected = torch.stack([old.new_zeros(()), old[0], old[2]])
    torch.testing.assert_close(entries, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("source", [[3, 0, 1], [-2, 0, 1]])
def test_a_source_that_is_no_slot_is_refused(source: list[int]) -> None:
    entries = torch.arange(3.0)
    with pytest.raises(IndexError, match=r"source must hold -1 or slots of 0\.\.2"):
        move_slots(entries, torch.tensor(source))
    assert entries.tolist() == [0, 1, 2]


def test_the_contract_is_a_class() -> None:
    assert is_sparse(SparseLinear(6, 4))
    assert is_sparse(MaskedLinear(6, 4))
    assert not is_sparse(nn.Linear(6, 4))


def test_find_sparse_names_each_layer_once() -> None:
    shared = SparseLinear(6, 6)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6), shared), "b": shared, "c": SparseLinear(6, 2)})
    assert list(find_sparse(model)) == [("a.1", shared), ("c", model["c"])]
    assert list(find_sparse(shared)) == [("", shared)]
    assert list(find_sparse(nn.Linear(2, 2))) == []


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_hook_sees_a_checkpointed_layer_once_per_backward_pass(kind: Any, reentrant: bool) -> None:
    layer, seen = kind(6, 4), Seen()
    layer.gradient_hook = seen
    x = torch.randn(3, 6, requires_grad=True)
    checkpoint(lambda x: layer(x.sin()).cos(), x, use_reentrant=reentrant).sum().backward()
    ((seen_x, seen_dy),) = seen.operands
    assert torch.equal(seen_x, x.detach().sin())
    torch.testing.assert_close(seen_dy, -layer(x.sin()).sin().detach())


def test_a_hook_sees_a_compiled_layer_without_a_graph_break() -> None:
    torch.compiler.reset()
    layer, seen = SparseLinear(6, 4), Seen()
    compiled = torch.compile(nn.Sequential(nn.Linear(6, 6), layer), backend="aot_eager", fullgraph=True)
    compiled(torch.randn(3, 6)).sum().backward()
    layer.gradient_hook = seen
    compiled(torch.randn(3, 6)).sum().backward()
    assert len(seen.operands) == 1
    layer.gradient_hook = None
    compiled(torch.randn(3, 6)).sum().backward()
    assert len(seen.operands) == 1


def test_a_hook_sees_the_dense_gradient_of_all_tokens() -> None:
    layer, seen = SparseLinear(6, 4, sparsity=0.5), Seen()
    layer.gradient_hook = seen
    dense = layer.to_dense()
    x = torch.randn(2, 3, 6)
    layer(x).square().sum().backward()
    dense(x).square().sum().backward()
    ((seen_x, seen_dy),) = seen.operands
    assert not seen_x.requires_grad
    assert not seen_dy.requires_grad
    torch.testing.assert_close(seen_dy.T @ seen_x, dense.weight.grad)


def test_a_hook_sees_what_saved_tensors_became() -> None:
    layer, seen = SparseLinear(6, 4, sparsity=0.5), Seen()
    layer.gradient_hook = seen
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        layer(torch.randn(3, 6)).sum().backward()
    assert len(seen.operands) == 1


def test_a_hook_that_fails_stops_the_backward_pass_and_nothing_else() -> None:
    def fail(operands: GradientOperands) -> None:
        raise ValueError("seen enough")

    layer = SparseLinear(6, 4)
    layer.gradient_hook = fail
    with pytest.raises(ValueError, match="seen enough"):
        layer(torch.randn(3, 6)).sum().backward()
    layer.gradient_hook = None
    layer(torch.randn(3, 6)).sum().backward()
    assert layer.weight_values.grad is not None


def test_a_hook_does_not_see_the_layer_beside() -> None:
    first, second, seen = SparseLinear(6, 6), SparseLinear(6, 4), Seen()
    first.gradient_hook = seen
    second(first(torch.randn(3, 6))).sum().backward()
    assert [dy.shape for _, dy in seen.operands] == [(3, 6)]


def test_copies_have_no_hook() -> None:
    layer = SparseLinear(6, 4)
    layer.gradient_hook = Seen()
    layer(torch.randn(3, 6))
    for twin in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.gradient_hook is None
        assert twin.plan_bytes() == 0
    assert layer.gradient_hook is not None
