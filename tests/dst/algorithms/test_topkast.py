"""Top-KAST against all weights, dense, in float64 NumPy."""

import copy

import numpy as np
import pytest
import torch

from sparselab.dst import TopKAST
from sparselab.kernels.arrays import n_connections
from sparselab.nn import MaskedLinear, SparseLinear
from tests.dst.fake import FakeSparse
from tests.dst.harness import LAYERS, OPTIMIZERS, build, by_position, sparse_layers, train

ROWS, COLS = 23, 37


def make(kind, sparsity=0.7, dtype=torch.float64):
    torch.manual_seed(0)
    if kind == "fake":
        return FakeSparse(COLS, ROWS, sparsity, dtype=dtype)
    return (SparseLinear if kind == "real" else MaskedLinear)(
        COLS, ROWS, False, sparsity=sparsity, dtype=dtype
    )


def operands(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, COLS, generator=generator, dtype=torch.float64)
    return x, torch.randn(5, ROWS, generator=generator, dtype=torch.float64)


def dense(layer, entries):
    matrix = np.zeros(ROWS * COLS, entries.numpy().dtype)
    matrix[layer.positions().numpy()] = layer.per_connection(entries).numpy()
    return matrix.reshape(ROWS, COLS)


def largest(theta, k):
    """A mask of the k largest magnitudes."""
    order = np.argsort(-np.abs(theta).reshape(-1), kind="stable")
    mask = np.zeros(theta.size, bool)
    mask[order[:k]] = True
    return mask.reshape(theta.shape)


@pytest.mark.parametrize("kind", LAYERS)
def test_it_trains_as_all_weights_would(kind):
    layer = make(kind)
    n_forward, n_backward = n_connections((ROWS, COLS), 0.9), layer.nnz
    layer.apply(algorithm := TopKAST(0.7, forward_sparsity=0.9, update_freq=3, exploration=0))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    theta = None
    B = dense(layer, torch.ones_like(layer.stored)) != 0
    A = largest(dense(layer, layer.stored.detach()), n_forward)
    entered = 0
    for step in range(1, 31):
        inside = dense(layer, layer.stored.detach())
        assert np.array_equal(dense(layer, layer.forward_mask), A)
        x, dy = operands(step)
        x.requires_grad_()
        optimizer.zero_grad()
        y = layer(x)
        loss = algorithm.exploration_loss()
        expected_loss = (inside[A] ** 2).sum() + (inside[B & ~A] ** 2).sum() * ROWS * COLS / n_forward
        assert np.isclose(loss.item(), expected_loss, rtol=1e-12)
        ((y * dy).sum() + 0.1 * loss).backward()
        optimizer.step()
        X, dY = x.detach().numpy(), dy.numpy()
        assert np.allclose(y.detach().numpy(), X @ (inside * A).T, rtol=1e-12)
        assert np.allclose(x.grad.numpy(), dY @ (inside * A), rtol=1e-12)
        gradient = dY.T @ X + 0.2 * inside * np.where(A, 1.0, ROWS * COLS / n_forward)
        after = dense(layer, layer.stored.detach())
        assert np.allclose(after[B], (inside - 0.05 * gradient)[B], rtol=1e-12, atol=1e-14)
        algorithm.step()
        if step % 3:
            continue
        if theta is None:
            # Nothing has left B before the first refresh: the rest are the weights it starts with.
            rng = np.random.default_rng([0, 0, 0, 2])
            theta = (2 * rng.random(ROWS * COLS, np.float32) - 1) * np.float32(1 / np.sqrt(COLS))
            theta = theta.astype(np.float64).reshape(ROWS, COLS)
        theta[B] = after[B]
        old, B = B, largest(theta, n_backward)
        A = largest(theta, n_forward)
        entered += int((B & ~old).sum())
        assert np.array_equal(dense(layer, torch.ones_like(layer.stored)) != 0, B)
        assert np.array_equal(dense(layer, layer.stored.detach())[B], theta[B])
        assert algorithm.last_update[0].grown == (B & ~old).sum()
    assert entered > 50
    assert (theta[~B] != 0).all()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("passes", [1, 3])
def test_its_exploration_is_that_of_the_loss(kind, passes):
    """Added once to each step of the optimizer, over however many backward passes its gradient is a sum."""
    layers, runs = [], []
    for exploration in (0.03, 0):
        layer = make(kind)
        layer.apply(algorithm := TopKAST(0.7, forward_sparsity=0.9, update_freq=3, exploration=exploration))
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
        other = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        for step in range(1, 8):
            optimizer.zero_grad()
            for part in range(passes):
                x, dy = operands(10 * step + part)
                (layer(x) * dy).sum().backward()
            if not exploration:
                (0.03 * algorithm.exploration_loss()).backward()
            optimizer.step()
            other.step()
            algorithm.step()
        layers.append(layer)
        runs.append((algorithm, optimizer))
    torch.testing.assert_close(layers[0].stored, layers[1].stored, rtol=1e-9, atol=1e-11)
    algorithm, optimizer = runs[0]
    for attached in (True, False):
        before = layers[0].stored.grad.clone()
        optimizer.step()
        assert torch.equal(layers[0].stored.grad, before) != attached
        algorithm.detach()


@pytest.mark.parametrize("kind", LAYERS)
def test_without_a_master_a_sample_competes(kind):
    layer = make(kind)
    layer.apply(algorithm := TopKAST(forward_sparsity=0.9, update_freq=1, master_bytes=0, drop_fraction=0.5))
    old = dense(layer, layer.stored.detach())
    n_backward = layer.nnz
    algorithm.step()
    new = dense(layer, layer.stored.detach())
    entered, left = (new != 0) & (old == 0), (new == 0) & (old != 0)
    assert layer.nnz == n_backward
    assert 0 < entered.sum() == left.sum() == algorithm.last_update[0].grown < 0.5 * n_backward
    assert np.abs(new[entered]).max() <= 1 / np.sqrt(COLS)
    # Whatever entered or stayed is larger than whatever left.
    assert np.abs(new[new != 0]).min() > np.abs(old[left]).max()
    assert np.array_equal(dense(layer, layer.forward_mask), largest(new, n_connections((ROWS, COLS), 0.9)))
    assert algorithm.state_dict()["parts"]["selection"] == {}


def test_a_master_of_lower_precision_counts_against_the_budget():
    layer = make("real", dtype=torch.float32)
    layer.apply(
        algorithm := TopKAST(
            forward_sparsity=0.9, update_freq=1, master_dtype=torch.bfloat16, master_bytes=2 * ROWS * COLS
        )
    )
    algorithm.step()
    (master,) = algorithm.state_dict()["parts"]["selection"].values()
    assert master.dtype == torch.bfloat16
    assert master.shape == (ROWS * COLS,)
    assert (master[layer.positions()] == 0).all()
    assert master.count_nonzero() == ROWS * COLS - layer.nnz
    twin = make("real", dtype=torch.float32)
    twin.apply(other := TopKAST(forward_sparsity=0.9, update_freq=1, master_bytes=2 * ROWS * COLS))
    other.step()
    assert other.state_dict()["parts"]["selection"] == {}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_finish_drops_what_is_not_in_use(kind, optimizer_name):
    model = build(kind)
    model.apply(algorithm := TopKAST(0.8, forward_sparsity=0.9, update_freq=3))
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    train(model, optimizer, algorithm, 1, 7)
    x = torch.randn(4, 20)
    with torch.no_grad():
        y = model(x)
    layers = sparse_layers(model)
    in_use = [layer.positions()[layer.per_connection(layer.forward_mask)] for layer in layers]
    before = [by_position(layer, optimizer) for layer in layers]
    algorithm.finish()
    torch.testing.assert_close(model(x), y)
    for layer, positions, old in zip(layers, in_use, before, strict=True):
        assert layer.forward_mask is None
        assert torch.equal(layer.positions(), positions)
        for name, entries in by_position(layer, optimizer).items():
            assert all(number == old[name][position] for position, number in entries.items())
    train(model, optimizer, algorithm, 8, 9)
    assert [report.skipped for report in algorithm.last_update] == ["finished", "finished"]
    assert all(torch.equal(layer.positions(), p) for layer, p in zip(layers, in_use, strict=True))
    algorithm.finish()


@pytest.mark.parametrize("kind", ["real", "masked"])
def test_the_mask_is_part_of_the_model(kind):
    layer = make(kind)
    layer.apply(TopKAST(forward_sparsity=0.9))
    x, _ = operands(0)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    torch.testing.assert_close(layer.to_dense()(x), y)
    twin = layer.to_sparse() if kind == "masked" else MaskedLinear.from_sparse(layer)
    torch.testing.assert_close(twin(x), y)
    fresh = make(kind, 0.5)
    plain = copy.deepcopy(fresh.state_dict())
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), y)
    with torch.no_grad():
        assert torch.equal(fresh(x), y)
    fresh.apply(TopKAST(forward_sparsity=0.9))
    assert torch.equal(fresh.forward_mask, layer.forward_mask), "attaching chose another"
    fresh.load_state_dict(plain)
    assert fresh.forward_mask is None
    layer.reset_parameters()
    assert layer.forward_mask is None


def test_a_mask_of_another_size_is_refused():
    layer = make("real")
    layer.apply(TopKAST(forward_sparsity=0.9))
    state = {**layer.state_dict(), "forward_mask": torch.ones(3, dtype=torch.bool)}
    with pytest.raises(RuntimeError, match="size mismatch for forward_mask"):
        make("real").load_state_dict(state)


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (lambda: TopKAST(forward_sparsity=1.5), ValueError, "sparsity"),
        (lambda: TopKAST(exploration=-1.0), ValueError, "exploration must be at least 0, got -1.0"),
        (
            lambda: TopKAST(0.9, forward_sparsity=0.8),
            ValueError,
            "forward_sparsity must lie between sparsity and 1",
        ),
        (
            lambda: TopKAST(forward_sparsity=0.9, master_bytes=-1),
            ValueError,
            "master_bytes must be at least 0",
        ),
        (
            lambda: TopKAST(forward_sparsity=0.9, master_dtype=torch.int32),
            ValueError,
            "master_dtype must be a floating dtype",
        ),
        (lambda: TopKAST(forward_sparsity=0.9).exploration_loss(), RuntimeError, "needs layers"),
        (
            lambda: make("real", 0.95).apply(TopKAST(forward_sparsity=0.9)),
            ValueError,
            "means 85 connections in use.*has 43",
        ),
        (
            lambda: make("real", 0.8).apply(TopKAST(0.7, forward_sparsity=0.9)),
            ValueError,
            "means 255 connections",
        ),
    ],
)
def test_misuse(wrong, error, says):
    with pytest.raises(error, match=says):
        wrong()
