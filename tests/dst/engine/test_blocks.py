"""Algorithms on layers whose connections are blocks of weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sparselab.dst import GMP, SET, MagnitudeAndGradient, RelativeImportance, RigL, SignedMagnitude
from sparselab.dst.parts.dense_gradient import block_norms, summarise
from sparselab.dst.parts.grown import FanInUniform, Normal
from sparselab.nn import BlockSparseLinear
from sparselab.nn.layers.base import as_matrix
from sparselab.nn.ops.operands import LinearOperands
from sparselab.nn.storage.entries import slot_scores
from tests.dst.contract_rows import COMMON, ROWS

SHAPE, BLOCK = (10, 18), (3, 4)


def layer_of(**settings):
    torch.manual_seed(0)
    return BlockSparseLinear(SHAPE[1], SHAPE[0], block_shape=BLOCK, dtype=torch.float64, **settings)


def slow_norms(matrix):
    """Norm of every block, by slicing."""
    rows, columns = (range(0, n, size) for n, size in zip(matrix.shape, BLOCK, strict=True))
    return np.array(
        [[np.linalg.norm(matrix[r : r + BLOCK[0], c : c + BLOCK[1]]) for c in columns] for r in rows]
    )


def spread(blocks):
    """Whether each weight of W lies in one of the blocks (grid of bool)."""
    return np.kron(blocks, np.ones(BLOCK, bool))[: SHAPE[0], : SHAPE[1]].astype(bool)


def test_norms_of_blocks():
    matrix = torch.randn(SHAPE, dtype=torch.float64)
    np.testing.assert_allclose(block_norms(matrix, BLOCK).numpy(), slow_norms(matrix.numpy()), rtol=1e-12)
    huge = torch.full((3, 4), 1e30, dtype=torch.float32)
    assert block_norms(huge, BLOCK).isfinite().all()
    assert np.isfinite(slot_scores(huge[None])).all()
    huge[1, 2] = torch.nan
    assert block_norms(huge, BLOCK).isnan().all()


def test_the_summary_of_a_gradient_ranks_blocks(monkeypatch):
    monkeypatch.setattr("sparselab.dst.parts.dense_gradient._BLOCK_BYTES", 500)  # one row of blocks at a time
    layer = layer_of(sparsity=0.7)
    x, dy = (torch.randn(30, n, dtype=torch.float64) for n in SHAPE[::-1])
    found = summarise([LinearOperands(x, dy)], as_matrix(layer), SHAPE, 4, torch.float64, BLOCK)
    norms = slow_norms((dy.T @ x).numpy()).reshape(-1)
    live = layer.positions().numpy()
    np.testing.assert_allclose(found.live_scores, norms[live], rtol=1e-12)
    free = np.setdiff1d(np.arange(norms.size), live)
    best = np.sort(free[np.argsort(-norms[free])[:4]])
    np.testing.assert_array_equal(found.free_positions, best)


@pytest.mark.parametrize("gradient", [True, False])
def test_training_with_rigl_is_that_of_a_dense_layer_with_a_mask_of_blocks(gradient):
    """A plain dense simulation, of RigL and of pruning alone (GMP), by momentum SGD in float64."""
    layer = layer_of(sparsity=0.6)
    algorithm = (
        RigL(drop_fraction=0.3, **COMMON) if gradient else GMP(ROWS["gmp"].make().sparsity, update_freq=7)
    )
    if not gradient:
        layer = layer_of(sparsity=0.0)
    nn.Sequential(layer).apply(algorithm)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02, momentum=0.9)
    W, b = layer.to_dense().weight.detach().clone(), layer.bias.detach().clone()
    mask = np.zeros(layer.grid, bool)
    mask.flat[layer.positions().numpy()] = True
    moments = [torch.zeros_like(W), torch.zeros_like(b)]
    moved = 0
    for step in range(1, 43):
        x = torch.randn(20, SHAPE[1], dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        target = torch.sin(3 * x[:, : SHAPE[0]])
        optimizer.zero_grad()
        (layer(x) - target).square().sum().backward()
        optimizer.step()
        algorithm.step()

        inside = torch.from_numpy(spread(mask))
        dy = 2 * (x @ W.T + b - target)
        G = dy.T @ x
        for parameter, moment, grad in (
            (W, moments[0], torch.where(inside, G, 0)),
            (b, moments[1], dy.sum(0)),
        ):
            moment.mul_(0.9).add_(grad)
            parameter.sub_(0.02 * moment)
        if step % 7 == 0:
            before = mask.copy()
            scores = np.where(mask, slow_norms(W.numpy()), -1).reshape(-1)
            live = int(mask.sum())
            if gradient:
                kept = np.argsort(-scores, kind="stable")[: live - int(0.3 * live)]
            else:
                kept = np.argsort(-scores, kind="stable")[: round((1 - algorithm.sparsity(step)) * mask.size)]
            mask = np.zeros(mask.size, bool)
            mask[kept] = True
            if gradient:
                free = np.where(mask, -1, slow_norms(G.numpy()).reshape(-1))
                mask[np.argsort(-free, kind="stable")[: live - len(kept)]] = True
            mask = mask.reshape(before.shape)
            moved += int((mask & ~before).sum()) + int((before & ~mask).sum())
            gone = ~torch.from_numpy(spread(mask & before))
            W[gone] = 0
            moments[0][gone] = 0
        np.testing.assert_array_equal(np.sort(np.flatnonzero(mask)), layer.positions().numpy())
        torch.testing.assert_close(layer.to_dense().weight.detach(), W, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(layer.bias.detach(), b, rtol=1e-9, atol=1e-11)
    assert moved > 0


@pytest.mark.parametrize("value", [0.5, Normal(0.1), FanInUniform()])
def test_grown_blocks_start_as_asked_and_are_0_outside(value):
    layer = layer_of(sparsity=0.5)
    algorithm = SET(drop_fraction=0.5, update_freq=1, grown_value=value, grown_state="mean")
    nn.Sequential(layer).apply(algorithm)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(5, SHAPE[1], dtype=torch.float64)).sum().backward()
    optimizer.step()
    before = set(layer.positions().tolist())
    algorithm.step()
    grown = torch.tensor([p not in before for p in layer.positions().tolist()])
    assert grown.any()
    outside = layer.cut(torch.ones(SHAPE))[layer.positions()] == 0
    for entries in (layer.weight_values.detach(), optimizer.state[layer.weight_values]["momentum_buffer"]):
        assert (entries[outside] == 0).all()
        assert (entries[grown][~outside[grown]] != 0).all()
    weights = layer.weight_values.detach()[grown][~outside[grown]]
    if value == 0.5:
        assert (weights == 0.5).all()
    else:
        assert len(weights.unique()) == len(weights)
        assert weights.abs().max() <= 1


def test_scores_of_weights_and_gradients_are_norms():
    layer = layer_of(sparsity=0.5)
    algorithm = SET(drop_fraction=0.5, update_freq=1, drop=MagnitudeAndGradient(2.0))
    nn.Sequential(layer).apply(algorithm)
    layer(torch.randn(5, SHAPE[1], dtype=torch.float64)).square().sum().backward()
    (view,) = algorithm.views(1)
    norms = [
        part.flatten(1).norm(dim=1).numpy()
        for part in (layer.weight_values.detach(), layer.weight_values.grad)
    ]
    np.testing.assert_allclose(algorithm.drop(view), norms[0] + 2 * norms[1], rtol=1e-12)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.of_blocks])
def test_what_looks_at_single_weights_refuses_blocks(name):
    model = nn.Sequential(layer_of(sparsity=ROWS[name].start))
    with pytest.raises(TypeError, match=r"cannot rewire a layer of blocks of \(3, 4\) weights"):
        model.apply(ROWS[name].make())


@pytest.mark.parametrize("part", [SignedMagnitude(), RelativeImportance()])
def test_a_part_that_looks_at_single_weights_is_named(part):
    with pytest.raises(TypeError, match=f"{type(part).__name__}.* looks at single weights"):
        nn.Sequential(layer_of()).apply(SET(drop=part))
