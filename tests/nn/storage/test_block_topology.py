"""The topology of BlockSparseLinear: from patterns and dense layers, rewritten, saved and loaded."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn

import sparselab
from sparselab import BlockSparseLinear
from tests.nn.blocks import SIZES, array, every_block


def test_from_dense_keeps_the_blocks_of_largest_norm() -> None:
    dense = nn.Linear(8, 6).eval().requires_grad_(False)
    with torch.no_grad():
        dense.weight.fill_(1.0)
        dense.weight[0, 7] = -9.0
        dense.weight[4:, 4:] = 2.0
        dense.weight[:4, :4] = 1.5
    layer = BlockSparseLinear.from_dense(dense, 0.5, block_shape=(4, 4))
    assert layer.positions().tolist() == [0, 1]
    expected = torch.zeros(6, 8)
    expected[:4] = dense.weight[:4]
    assert torch.equal(layer.to_dense().weight, expected)
    assert torch.equal(layer.bias, dense.bias)  # type: ignore[arg-type]
    assert (layer.training, layer.weight_values.requires_grad) == (False, False)
    assert BlockSparseLinear.from_dense(dense, 0.0, block_shape=(4, 4)).to_dense().weight.equal(dense.weight)
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear, got Conv2d"):
        BlockSparseLinear.from_dense(nn.Conv2d(1, 1, 1), 0.5)  # type: ignore[arg-type]


@every_block
def test_patterns_of_every_form_give_their_blocks(block_shape: tuple[int, int]) -> None:
    old = BlockSparseLinear(*SIZES, sparsity=0.6, block_shape=block_shape)
    weight = old.to_dense().weight.detach()
    live = old.to_sparse_csr()
    live = torch.sparse_csr_tensor(
        live.crow_indices(), live.col_indices(), torch.ones(len(live.values()), dtype=torch.bool), live.shape,
        check_invariants=True,
    )  # fmt: skip
    for pattern in (old.to_scipy(), old.to_sparse_csr()):
        new = BlockSparseLinear.from_pattern(pattern, block_shape=block_shape)
        assert torch.equal(new.positions(), old.positions())
        assert torch.equal(new.weight_values, old.weight_values)
    grid = np.zeros(old.grid, np.bool_)
    grid.reshape(-1)[old.positions()] = True
    patterns = [live, array(live.to_dense()), live.to_dense()]
    for pattern, shape in [*((each, None) for each in patterns), (grid, old.shape)]:
        new = BlockSparseLinear.from_pattern(pattern, block_shape=block_shape, shape=shape)
        assert torch.equal(new.positions(), old.positions())
        other = BlockSparseLinear(*SIZES, sparsity=0.9, block_shape=block_shape)
        other.set_topology(pattern)
        assert torch.equal(other.positions(), old.positions())
    old.set_topology(old.to_scipy())
    assert torch.equal(old.to_dense().weight, weight)


def test_a_bsr_matrix_brings_its_blocks_along() -> None:
    data = np.arange(1.0, 17).reshape(2, 2, 4)
    matrix = scipy.sparse.bsr_array((data, [1, 0], [0, 1, 2, 2]), shape=(6, 8))
    layer = BlockSparseLinear.from_pattern(matrix, dtype=torch.float64)
    assert (layer.block_shape, layer.indptr.tolist(), layer.indices.tolist()) == (
        (2, 4),
        [0, 1, 2, 2],
        [1, 0],
    )
    np.testing.assert_array_equal(array(layer.weight_values), data)
    back = layer.to_scipy()
    assert back.format == "bsr"
    np.testing.assert_array_equal(back.toarray(), matrix.toarray())
    assert layer.set_topology(np.ones((3, 2), np.bool_)) is None
    assert layer.nnz == 6


def test_patterns_that_do_not_fit_change_nothing() -> None:
    layer = BlockSparseLinear(8, 8, sparsity=0.5, block_shape=(4, 4))
    before = copy.deepcopy(layer.state_dict())
    ragged = np.zeros((8, 8), np.bool_)
    ragged[:4, :3] = True
    for pattern, error in (
        (ragged, r"pattern must consist of whole blocks of shape \(4, 4\)"),
        (np.ones((3, 3), np.bool_), r"shape of the layer, \(8, 8\), .* its grid, \(2, 2\); got \(3, 3\)"),
        (scipy.sparse.csr_array(np.eye(2)), r"got \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=error):
            layer.set_topology(pattern)
    for name, entries in layer.state_dict().items():
        assert torch.equal(entries, before[name])
    with pytest.raises(ValueError, match="got one on the device meta"):
        BlockSparseLinear(8, 8, device="meta").set_topology(ragged)


@every_block
def test_rewriting_moves_values_gradient_and_mask(block_shape: tuple[int, int]) -> None:
    layer = BlockSparseLinear(*SIZES, sparsity=0.4, block_shape=block_shape)
    layer(torch.randn(4, 70)).sum().backward()
    layer.forward_mask = torch.rand_like(layer.weight_values) < 0.5
    assert layer.weight_values.grad is not None
    before = [
        each.detach().clone() for each in (layer.weight_values, layer.weight_values.grad, layer.forward_mask)
    ]
    old, parameter = layer.positions(), layer.weight_values
    free = torch.tensor([p for p in range(layer.grid[0] * layer.grid[1]) if p not in old][:1])
    for grow in (free, free[:0]):
        source = layer.rewrite(torch.tensor([0]), grow)
        now = [layer.weight_values, layer.weight_values.grad, layer.forward_mask]
        for new, earlier in zip(now, before, strict=True):
            assert new is not None
            assert torch.equal(new[source >= 0], earlier[source[source >= 0]])
            assert not new[source < 0].any()
        before = [each.detach().clone() for each in now if each is not None]
        assert layer.weight_values is parameter
        layer.zero_grad(set_to_none=False)
        before[1].zero_()
    layer(torch.randn(4, 70)).sum().backward()
    with pytest.raises(TypeError, match="got bfloat16"):
        layer.bfloat16().rewrite(torch.tensor([0]), free[:0])


def test_entries_move_in_place_if_there_are_as_many() -> None:
    layer = BlockSparseLinear(16, 16, sparsity=0.5, block_shape=(4, 4))
    entries = torch.randn_like(layer.weight_values)
    layer.put(entries, torch.tensor([2]), torch.full((1, 4, 4), 7.0))
    assert (layer.per_connection(entries)[2] == 7).all()
    old = entries.clone()
    source = torch.tensor([1, 0, -1, 3, 4, 5, 6, 7])
    assert layer.moved(entries, source) is entries
    assert torch.equal(entries[0], old[1])
    assert not entries[2].any()
    assert layer.moved(entries, source[:3]).shape == (3, 4, 4)


@every_block
def test_a_state_loads_into_any_topology(block_shape: tuple[int, int], tmp_path: Path) -> None:
    saved = BlockSparseLinear(*SIZES, sparsity=0.3, block_shape=block_shape)
    x = torch.randn(5, 70)
    torch.save(saved.state_dict(), tmp_path / "state.pt")
    sparselab.save_model(saved, tmp_path / "state.safetensors")
    for load in (
        lambda layer: layer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True)),
        lambda layer: sparselab.load_model(layer, tmp_path / "state.safetensors"),
    ):
        layer = BlockSparseLinear(*SIZES, sparsity=0.8, block_shape=block_shape)
        layer(x)
        load(layer)
        assert torch.equal(layer(x), saved(x))
    for copied in (copy.deepcopy(saved), pickle.loads(pickle.dumps(saved))):
        assert torch.equal(copied(x), saved(x))
        copied(x).sum().backward()


def test_a_wrong_state_is_refused_and_named() -> None:
    good = BlockSparseLinear(10, 8, sparsity=0.5, block_shape=(4, 4)).state_dict()
    edge = good["weight_values"].clone()
    edge[:, :, 3] = 1
    for changed, message in (
        (
            {"weight_values": good["weight_values"][:, :2]},
            r"weight_values must be .* \(3, 4, 4\), got .* \(3, 2, 4\)",
        ),
        ({"weight_values": good["weight_values"][0]}, "weight_values must be floating point of shape"),
        (
            {"weight_values": edge, "indices": torch.tensor([0, 1, 2])[:3]},
            "0 where blocks reach beyond W|ascending",
        ),
        ({"indptr": good["indptr"] + 1}, "must start at 0"),
        ({"indptr": good["indptr"][:-1]}, r"indptr must be int64 of shape \(3,\)"),
        ({"indices": torch.full((3,), 3)}, r"columns of 0\.\.2, got 3"),
        ({"indices": torch.zeros(3)}, "indices must be uint16, int32 or int64"),
        ({"weight_values": None}, "must be loaded together, got no weight_values"),
    ):
        state = {name: entry for name, entry in {**good, **changed}.items() if entry is not None}
        layer = BlockSparseLinear(10, 8, sparsity=0.5, block_shape=(4, 4))
        before = layer.weight_values.clone()
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state)
        assert torch.equal(layer.weight_values, before)
