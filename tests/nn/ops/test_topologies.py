"""The topology of two tensors is found again, is never another's, and never stale."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor

from sparselab import BlockSparseLinear, SparseLinear
from sparselab.nn.ops import topologies
from sparselab.nn.ops.topologies import find_topology, hold_topology

SIZES = (4, 6, 1, 1)


def tensors(columns: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[Tensor, Tensor]:
    return torch.arange(5), torch.tensor(columns, dtype=torch.uint16)


def positions(pair: tuple[Tensor, Tensor]) -> list[int]:
    return [int(p) for p in find_topology(*pair, SIZES, "csr").own.positions()]


def test_the_same_tensors_have_one_topology() -> None:
    pair = tensors()
    first = find_topology(*pair, SIZES, "csr")
    assert find_topology(*pair, SIZES, "csr") is first
    assert find_topology(*(tensor.detach() for tensor in pair), list(SIZES), "csr") is first
    assert hold_topology(*pair, SIZES, "csr") is first
    assert find_topology(*pair, (4, 9, 1, 1), "csr") is not first
    assert find_topology(*tensors(), SIZES, "csr") is not first
    assert find_topology(*pair, SIZES, "bsr") is not first


def test_a_layer_and_an_operator_share_one() -> None:
    layer = SparseLinear(6, 4)
    assert find_topology(*layer.topology_arguments()) is layer.topology()
    kept = weakref.ref(layer.topology())
    del layer
    gc.collect()
    assert kept() is None


CHANGES = {
    "in place": lambda pair: pair[1].copy_(torch.tensor([5, 1, 2, 3], dtype=torch.uint16)),
    "through a view": lambda pair: pair[1][:1].copy_(torch.tensor([5], dtype=torch.uint16)),
    "data replaced": lambda pair: setattr(pair[1], "data", torch.tensor([5, 1, 2, 3], dtype=torch.uint16)),
    "set_": lambda pair: pair[1].set_(torch.tensor([5, 1, 2, 3], dtype=torch.uint16)),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_change_is_noticed(how: str) -> None:
    pair = tensors()
    held = hold_topology(*pair, SIZES, "csr")
    assert positions(pair) == [0, 7, 14, 21]
    CHANGES[how](pair)
    assert positions(pair) == [5, 7, 14, 21]
    assert not held.is_of(*pair)


def test_data_put_back_is_not_taken_for_unchanged_memory() -> None:
    pair = tensors()
    first, old = find_topology(*pair, SIZES, "csr"), pair[1].data
    pair[1].data = torch.tensor([5, 1, 2, 3], dtype=torch.uint16)
    assert positions(pair) == [5, 7, 14, 21]
    pair[1].data = old
    assert find_topology(*pair, SIZES, "csr").is_of(*pair)
    assert positions(pair) == [0, 7, 14, 21]
    assert first is not None


def test_an_address_that_was_freed_belongs_to_nobody_else() -> None:
    """As long as a topology is known its memory is held; then another one may have the address."""
    for k in range(300):
        columns = (k % 3, 1, 2, 3)
        pair = tensors(columns)
        assert positions(pair)[0] == k % 3
        if k % 2:
            hold_topology(*tensors((5, 1, 2, 3)), SIZES, "csr")  # let go at once
    assert len(topologies._recent) <= topologies._MOST_RECENT


def test_tensors_of_inference_mode_are_compared() -> None:
    with torch.inference_mode():
        pair = tensors()
        first = find_topology(*pair, SIZES, "csr")
        assert find_topology(*pair, SIZES, "csr") is first
        pair[1][0] = 5
        assert positions(pair) == [5, 7, 14, 21]
        layer = SparseLinear(20, 10, sparsity=0.5)
        x = torch.randn(3, 20)
        torch.testing.assert_close(layer(x), layer.to_dense()(x))
        layer.reset_parameters()
        torch.testing.assert_close(layer(x), layer.to_dense()(x))


def test_memory_of_a_topology_cannot_be_resized() -> None:
    pair = tensors()
    find_topology(*pair, SIZES, "csr")
    with pytest.raises(RuntimeError, match="not resizable"):
        pair[1].resize_(100)


def test_shared_memory_is_another_place() -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    x = torch.randn(3, 20)
    expected = layer(x)
    layer.share_memory()
    assert torch.equal(layer(x), expected)


def test_an_exported_program_keeps_its_own_and_meets_no_layer() -> None:
    """Once a number named the layer: those of a program made elsewhere named another one here."""
    torch.manual_seed(0)
    blocks = BlockSparseLinear(20, 10, sparsity=0.5, block_shape=(4, 4))
    layer, x = SparseLinear(20, 10, sparsity=0.5), torch.randn(40, 20)
    program = torch.export.export(layer, (x,))
    expected = layer(x).detach()
    call = program.module()
    del layer
    blocks(x)
    assert torch.equal(call(x), expected)
    before = list(topologies._recent.values())[-1]
    assert torch.equal(call(x), expected)
    assert list(topologies._recent.values())[-1] is before, "the plans were made anew"


def test_a_deep_copy_has_a_topology_of_its_own() -> None:
    layer = SparseLinear(20, 10, sparsity=0.5)
    layer(torch.randn(3, 20))
    twin = copy.deepcopy(layer)
    assert twin.topology() is not layer.topology()
    layer.rewrite(torch.arange(3), torch.empty(0, dtype=torch.int64))
    x = torch.randn(3, 20)
    torch.testing.assert_close(twin(x), twin.to_dense()(x))


def test_tied_layers_share_one_topology_and_both_hooks_see_it() -> None:
    layer, other = SparseLinear(20, 10, sparsity=0.5), SparseLinear(20, 10, sparsity=0.5)
    for name in ("weight_values", "bias", "indptr", "indices"):
        setattr(other, name, getattr(layer, name))
    seen: list[object] = []
    layer.gradient_hook = lambda operands: seen.append(("first", operands.n_tokens))
    other.gradient_hook = lambda operands: seen.append(("second", operands.n_tokens))
    assert layer.topology() is other.topology()
    layer(torch.randn(3, 20)).sum().backward()
    assert seen == [("first", 3), ("second", 3)]
