"""GSE against its definition: the dense gradient in float64, looked at where the sample is."""

import doctest
import math
import tracemalloc

import numpy as np
import pytest
import torch

from sparselab.dst import GSE, DynamicSparsityAlgorithm, Exchange, SampledGradientGrowth, UpdateReport
from sparselab.dst.algorithms import gse
from sparselab.dst.parts import passes
from sparselab.dst.parts.grow_sampled import _activity, _draw
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.nn import SparseLinear
from sparselab.nn.ops.operands import LinearOperands
from tests.dst.fake import FakeSparse
from tests.dst.harness import LAYERS

ROWS, COLS = 23, 37
SAMPLERS = ["uniform", "grabo", "graest"]


def make(kind, dtype=torch.float64, sparsity=0.8, seed=0):
    torch.manual_seed(seed)
    if kind == "fake":
        return FakeSparse(COLS, ROWS, sparsity, seed=seed, dtype=dtype)
    return SparseLinear(COLS, ROWS, sparsity=sparsity, dtype=dtype)


def operands(seed, dtype=torch.float64, n_tokens=9):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, COLS, generator=generator, dtype=dtype)
    return x, torch.randn(n_tokens, ROWS, generator=generator, dtype=dtype)


def backward(layer, x, dy):
    (layer(x) * dy).sum().backward()


def slow_sample(layer, pairs, sampler, n, seed, index, step):
    """The free positions of the sample, drawn as documented, one by one."""
    rng = np.random.default_rng([seed, index, step])
    rows, columns = np.ones(ROWS), np.ones(COLS)
    if sampler != "uniform":
        rows[:], columns[:] = 0, 0
        for x, dy in pairs:
            x, dy = x.numpy(), dy.numpy()
            if sampler == "graest":
                signs = 2 * rng.integers(0, 2, len(x)) - 1
                columns += signs @ x
                rows += signs @ dy
            else:
                columns += np.abs(x).sum(0)
                rows += np.abs(dy).sum(0)
        rows, columns = np.abs(rows), np.abs(columns)
    live = set(layer.positions().tolist())
    drawn = []
    for weights in (rows, columns):
        if sampler == "uniform":
            drawn.append(rng.integers(0, len(weights), n).tolist())
        else:
            at = rng.random(n) * weights.sum()
            drawn.append([int(np.flatnonzero(np.cumsum(weights) > point)[0]) for point in at])
    return sorted({i * COLS + j for i, j in zip(*drawn, strict=True)} - live)


def slow_update(positions, weights, sample, dense_gradient, fraction):
    """Positions after one update: grow first, then drop as many of the old ones."""
    k = min(math.ceil(fraction * len(positions)), len(sample))
    score = dense_gradient.abs().reshape(-1).tolist()
    grown = sorted(sample, key=lambda p: (-score[p], p))[:k]
    order = sorted(range(len(positions)), key=lambda slot: (-abs(weights[slot]), positions[slot]))
    return sorted([positions[slot] for slot in order[: len(positions) - k]] + grown)


def dense(pairs):
    return sum(dy.double().T @ x.double() for x, dy in pairs)


def test_the_oracle_by_hand():
    G = torch.tensor([[9.0, 5.0], [1.0, 4.0]])
    assert slow_update([0], [0.1], [1, 2], G, 0.5) == [1]
    assert slow_update([0, 2], [0.1, 3.0], [3], G, 1.0) == [2, 3]
    assert slow_update([0, 2], [0.1, 3.0], [], G, 1.0) == [0, 2]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("gamma", [0.05, 1.0, 3.0])
def test_grows_the_largest_gradients_of_the_sample(kind, sampler, gamma):
    layer = make(kind)
    layer.apply(
        algorithm := GSE(None, drop_fraction=0.3, update_freq=2, seed=5, gamma=gamma, sampler=sampler)
    )
    for step in range(1, 5):
        layer.zero_grad()
        x, dy = operands(step)
        backward(layer, x, dy)
        expected = layer.positions().tolist()
        if step % 2 == 0:
            n_sample = math.ceil(gamma * layer.nnz)
            sample = slow_sample(layer, [(x, dy)], sampler, n_sample, 5, 0, step)
            expected = slow_update(
                expected, layer.weight_values.flatten().tolist(), sample, dense([(x, dy)]), 0.3
            )
            n_grown = min(math.ceil(0.3 * layer.nnz), len(sample))
        algorithm.step()
        assert layer.positions().tolist() == expected
    report = algorithm.last_update[0]
    assert (report.dropped, report.grown, report.regrown) == (n_grown, n_grown, 0)
    assert (n_grown < math.ceil(0.3 * layer.nnz)) == (gamma == 0.05)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_gradient_is_the_sum_over_micro_batches(sampler):
    layer = make("real")
    layer.apply(
        algorithm := GSE(None, drop_fraction=0.3, update_freq=1, sampler=sampler, grad_accumulation=3)
    )
    pairs = [operands(seed, n_tokens=seed + 2) for seed in range(3)]
    for x, dy in pairs:
        backward(layer, x, dy)
    sample = slow_sample(layer, pairs, sampler, layer.nnz, 0, 0, 1)
    born, weights = layer.positions().tolist(), layer.weight_values.flatten().tolist()
    expected = slow_update(born, weights, sample, dense(pairs), 0.3)
    assert expected != slow_update(born, weights, sample, dense(pairs[-1:]), 0.3)
    algorithm.step()
    assert layer.positions().tolist() == expected


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5])
def test_a_layer_of_half_its_connections_is_ranked_whole(sparsity):
    layer = make("fake", sparsity=sparsity)
    if layer.nnz * 2 < ROWS * COLS:
        layer.rewrite(torch.empty(0, dtype=torch.int64), _first_free(layer))
    layer.apply(algorithm := GSE(None, drop_fraction=0.3, update_freq=1))
    pair = operands(0)
    backward(layer, *pair)
    free = sorted(set(range(ROWS * COLS)) - set(layer.live.tolist()))
    expected = slow_update(
        layer.live.tolist(), layer.weight_values.flatten().tolist(), free, dense([pair]), 0.3
    )
    algorithm.step()
    assert layer.live.tolist() == expected


def _first_free(layer):
    free = set(range(ROWS * COLS)) - set(layer.live.tolist())
    return torch.tensor([min(free)])


def test_no_dense_gradient_is_formed(monkeypatch):
    monkeypatch.setattr(passes, "summarise", None)
    layer = make("real")
    layer.apply(algorithm := GSE(update_freq=1))
    backward(layer, *operands(0))
    algorithm.step()
    assert algorithm.last_update[0].grown > 0


def test_memory_does_not_grow_with_the_size_of_the_matrix():
    torch.manual_seed(0)
    rows, cols = 3000, 4000
    layer = SparseLinear(cols, rows, sparsity=0.999)
    layer.apply(algorithm := GSE(update_freq=1, sampler="grabo"))
    x, dy = torch.randn(2, cols), torch.randn(2, rows)
    backward(layer, x, dy)
    algorithm.step()  # compiles, which takes memory of its own
    layer.zero_grad()
    tracemalloc.start()
    backward(layer, x, dy)
    algorithm.step()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert algorithm.last_update[0].grown > 0
    assert peak < rows * cols / 4


@pytest.mark.parametrize("n_threads", [1, 2])
def test_the_sample_does_not_depend_on_the_threads(n_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    rng = np.random.default_rng(0)
    x, dy = (
        torch.from_numpy(rng.standard_normal((300, COLS))),
        torch.from_numpy(rng.standard_normal((300, ROWS))),
    )
    rows, columns = _activity([LinearOperands(x, dy)], (ROWS, COLS), "graest", np.random.default_rng(1))
    torch.set_num_threads(before)
    signs = 2.0 * np.random.default_rng(1).integers(0, 2, 300) - 1
    np.testing.assert_allclose(columns, np.abs(signs @ x.numpy()), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(rows, np.abs(signs @ dy.numpy()), rtol=1e-10, atol=1e-12)


def test_a_sample_is_drawn_in_proportion_to_row_times_column():
    rows, columns = np.array([1.0, 0.0, 3.0]), np.array([2.0, 1.0, 0.0, 1.0])
    live = RowTopology.from_positions((3, 4), np.array([0]))
    counts = np.zeros(12)
    rng, n_draws = np.random.default_rng(0), 8000
    for _ in range(n_draws):
        counts[_draw(rng, live, 1, rows, columns)] += 1
    expected = n_draws * np.outer(rows, columns).reshape(-1) / 16
    expected[0] = 0
    assert np.all(np.abs(counts - expected) <= 6 * np.sqrt(expected))


def test_without_activity_the_sample_is_uniform():
    live = RowTopology.from_positions((3, 4), np.empty(0, np.int64))
    drawn = _draw(np.random.default_rng(0), live, 500, np.zeros(3), np.zeros(4))
    assert drawn.tolist() == list(range(12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampled_gradient_is_the_dense_one_at_the_sample(dtype):
    pairs = [operands(seed, dtype) for seed in range(2)]
    positions = np.arange(3, ROWS * COLS, 17)
    found = sum(LinearOperands(*pair).sampled(positions) for pair in pairs)
    np.testing.assert_allclose(
        found, dense(pairs).reshape(-1)[positions], rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_skips_its_layer_only(sampler, bad):
    model = torch.nn.ModuleList([make("real"), make("real")])
    model.apply(algorithm := GSE(update_freq=1, sampler=sampler))
    born = [layer.positions().clone() for layer in model]
    x, dy = operands(0)
    backward(model[1], x, dy)
    dy = dy.clone()
    dy[2, 20] = bad
    backward(model[0], x, dy)
    algorithm.step()
    assert algorithm.last_update[0] == UpdateReport(skipped="gradient is not finite", nnz=model[0].nnz)
    assert torch.equal(model[0].positions(), born[0])
    assert not torch.equal(model[1].positions(), born[1])


def test_a_gradient_that_overflows_is_not_finite():
    layer = make("real", torch.float32)
    layer.apply(algorithm := GSE(update_freq=1))
    x, dy = operands(0, torch.float32)
    backward(layer, x * 1e30, dy * 1e30)
    algorithm.step()
    assert algorithm.last_update[0].skipped == "gradient is not finite"


def test_the_network_ranks_samples_together():
    model = torch.nn.ModuleList([make("fake"), make("fake", seed=1)])
    model.apply(algorithm := GSE(None, drop_fraction=0.3, update_freq=1, scope="network"))
    pairs = [operands(seed) for seed in range(2)]
    pairs[0] = pairs[0][0] * 1.5, pairs[0][1]
    for layer, pair in zip(model, pairs, strict=True):
        backward(layer, *pair)
    candidates, old = [], []
    for index, (layer, pair) in enumerate(zip(model, pairs, strict=True)):
        scores = dense([pair]).abs().reshape(-1)
        sample = slow_sample(layer, [pair], "uniform", layer.nnz, 0, index, 1)
        candidates += [(float(scores[p]), index, p) for p in sample]
        old += [
            (abs(w), index, p)
            for w, p in zip(layer.weight_values.flatten().tolist(), layer.live.tolist(), strict=True)
        ]
    k = math.ceil(0.3 * len(old))
    after = sorted(old)[k:] + sorted(candidates)[-k:]
    algorithm.step()
    for index, layer in enumerate(model):
        assert layer.live.tolist() == sorted(p for _, i, p in after if i == index)
    first, second = algorithm.last_update
    assert first.grown != first.dropped
    assert first.grown + second.grown == first.dropped + second.dropped == k


def test_a_dropped_connection_does_not_grow_back_at_once():
    layer = make("fake")
    layer.apply(algorithm := GSE(None, drop_fraction=1.0, update_freq=1, gamma=20))
    born = set(layer.live.tolist())
    backward(layer, *operands(0))
    algorithm.step()
    assert not born & set(layer.live.tolist())


def test_the_sample_part_goes_with_other_parts():
    layer = make("fake")
    layer.apply(
        algorithm := DynamicSparsityAlgorithm(
            Exchange(None, 0.3), update_freq=1, grow=SampledGradientGrowth(0.01)
        )
    )
    nnz = layer.nnz
    backward(layer, *operands(0))
    algorithm.step()
    report = algorithm.last_update[0]
    assert report.dropped == report.grown <= math.ceil(0.01 * nnz)
    assert layer.nnz == nnz


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GSE(gamma=0), ValueError, "gamma must be positive, got 0"),
        (lambda: GSE(gamma="1"), TypeError, "gamma must be a number, got '1'"),
        (lambda: GSE(sampler="best"), ValueError, "sampler must be one of .*, got 'best'"),
        (lambda: GSE(scope="row"), ValueError, "scope must be one of .*, got 'row'"),
        (lambda: GSE(grad_accumulation=0), ValueError, "grad_accumulation must be at least 1, got 0"),
    ],
)
def test_misuse_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_resumed_run_has_the_same_settings():
    settings = ({}, {"gamma": 2}, {"sampler": "grabo"}, {"scope": "network"})
    states = [GSE(**chosen).state_dict()["config"] for chosen in settings]
    assert all(states.count(state) == 1 for state in states)


def test_the_example_in_the_docstring_runs():
    results = doctest.testmod(gse)
    assert results.attempted > 6
    assert results.failed == 0
