"""SRigL against a slow computation of its definition."""

import doctest
import itertools

import numpy as np
import pytest
import torch

from sparselab.dst import Linear, Magnitude, SRigL, UpdateReport
from sparselab.dst.algorithms import srigl
from sparselab.dst.parts import dense_gradient as gradient
from sparselab.nn import SparseLinear, constant_fan_in_
from tests.dst.fake import FakeSparse
from tests.dst.harness import KINDS, LAYERS

ROWS, COLS = 12, 17
FAN_IN = 4
BUDGET = 53  # five more than FAN_IN * ROWS


def slow_update(before, after, dense_gradient, fraction, budget, gamma):
    """Positions and rows left after one update; weights as {position: weight} before and after the step."""
    rows, cols = dense_gradient.shape
    g = dense_gradient.reshape(-1)
    n_prune = int(fraction * len(after))
    n_keep = len(after) - n_prune
    strong = sorted(before, key=lambda p: (-abs(before[p]), p))[:n_keep]
    steep = sorted(range(rows * cols), key=lambda p: (-abs(g[p]), p))[:n_prune]
    salient = [sum(p // cols == r for p in {*strong, *steep}) for r in range(rows)]
    need = gamma if gamma >= 1 else max(1, int(gamma * (budget // rows)))
    least = budget // cols
    need = min(need, sorted(salient)[::-1][least]) if gamma and least < rows else 0
    active = [r for r in range(rows) if salient[r] >= need]
    fan_in = budget // len(active)
    ranked = sorted(after, key=lambda p: (p // cols not in active, -abs(after[p]), p))[:n_keep]
    live = []
    for r in active:
        kept = [p for p in ranked if p // cols == r][:fan_in]
        free = [p for p in range(r * cols, (r + 1) * cols) if p not in kept]
        live += kept + sorted(free, key=lambda p: (-abs(g[p]), p))[: fan_in - len(kept)]
    return sorted(live), active


def test_the_oracle_by_hand():
    # Two of three weights stay. Row 0 has both of them, row 1 the largest gradient, row 2 nothing: with a
    # need of 1 it goes, and 6 // 2 connections are left to the others.
    weights = {0: 3.0, 1: -2.0, 8: 0.1}
    steep = np.array([[0.0, 1.0, 2.0, 3.0], [9.0, 8.0, 7.0, 6.0], [5.0, 5.0, 5.0, 5.0]])
    assert slow_update(weights, weights, steep, 0.4, 6, 1) == ([0, 1, 3, 4, 5, 6], [0, 1])
    assert slow_update(weights, weights, steep, 0.4, 6, 0) == ([0, 1, 4, 5, 8, 9], [0, 1, 2])
    # Row 0 has more than it may keep, and the smallest of it goes.
    weights = {0: 1.0, 1: -2.0, 2: 3.0}
    assert slow_update(weights, weights, steep, 0.0, 3, 0) == ([2, 4, 8], [0, 1, 2])


def make(kind, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    sparsity = 1 - BUDGET / (ROWS * COLS)
    if kind == "fake":
        layer = FakeSparse(COLS, ROWS, sparsity, dtype=dtype)
    else:
        layer = KINDS[kind](COLS, ROWS, sparsity=sparsity, dtype=dtype, bias=False)
    constant_fan_in_(layer)
    scale_rows(layer, torch.linspace(0.01, 1, ROWS) ** 2)
    return layer


def scale_rows(layer, scales):
    """Make the weights of some outputs large and of others small."""
    slots = torch.arange(layer.nnz)
    weights = layer.per_connection(layer.stored.detach()) * scales.double()[layer.positions() // COLS]
    layer.put(layer.stored.detach(), slots, weights.to(layer.stored.dtype))


def algorithm_for(layer, **settings):
    settings = {"sparsity": 1 - BUDGET / (ROWS * COLS), "update": 1, "exempt_last": False, **settings}
    algorithm = SRigL(**settings)
    layer.apply(algorithm)
    return algorithm


def operands(seed, scales=None, dtype=torch.float64, n_tokens=9):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, COLS, generator=generator, dtype=dtype)
    dy = torch.randn(n_tokens, ROWS, generator=generator, dtype=dtype)
    return x, dy if scales is None else dy * scales.to(dtype)


def backward(layer, x, dy):
    (layer(x) * dy).sum().backward()


def dense_gradient(x, dy):
    return (dy.double().T @ x.double()).numpy()


def weights_of(layer):
    weights = layer.per_connection(layer.stored.detach()).tolist()
    return dict(zip(layer.positions().tolist(), weights, strict=True))


def fan_ins(layer):
    return torch.bincount(layer.positions() // COLS, minlength=ROWS).tolist()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("gamma", [0, 0.3, 0.95, 1, 3, 50])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows_per_block", [5, ROWS])
def test_one_update_is_the_definition(monkeypatch, kind, dtype, gamma, fraction, rows_per_block):
    monkeypatch.setattr(gradient, "_BLOCK_BYTES", rows_per_block * COLS * dtype.itemsize)
    layer = make(kind, dtype)
    algorithm = algorithm_for(layer, gamma_sal=gamma, drop_fraction=fraction)
    x, dy = operands(1, torch.linspace(1, 0.1, ROWS).roll(3), dtype)
    weights = weights_of(layer)
    expected, active = slow_update(weights, weights, dense_gradient(x, dy), fraction, BUDGET, gamma)
    backward(layer, x, dy)
    algorithm.step()
    assert layer.positions().tolist() == expected
    assert algorithm.ablated_rows()[0].tolist() == sorted({*range(ROWS)} - {*active})
    after = weights_of(layer)
    assert all(after[p] == weights.get(p, 0.0) for p in after)


def test_the_cases_above_ablate_none_and_some_and_all_but_the_guarded():
    x, dy = operands(1, torch.linspace(1, 0.1, ROWS).roll(3))
    weights = weights_of(make("fake"))
    left = {
        gamma: len(slow_update(weights, weights, dense_gradient(x, dy), 0.3, BUDGET, gamma)[1])
        for gamma in (0, 1, 3, 50)
    }
    assert left[0] == ROWS > left[1] > left[3] > left[50] >= BUDGET // COLS + 1


@pytest.mark.parametrize("kind", [*LAYERS, "fan-in"])
def test_many_updates_with_an_optimizer(kind):
    layer = make(kind)
    algorithm = algorithm_for(layer, gamma_sal=0.95, update=2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02, momentum=0.9)
    ablated = []
    for step in range(1, 41):
        optimizer.zero_grad()
        scales = torch.linspace(0.05, 1, ROWS).roll(step) ** 2
        x, dy = operands(step, scales)
        backward(layer, x, dy)
        before = weights_of(layer)
        optimizer.step()
        expected, active = slow_update(before, weights_of(layer), dense_gradient(x, dy), 0.3, BUDGET, 0.95)
        if step % 2:
            expected = layer.positions().tolist()
        algorithm.step()
        assert layer.positions().tolist() == expected
        if step % 2 == 0:
            ablated.append(set(algorithm.ablated_rows()[0].tolist()))
            fan_in = BUDGET // len(active)
            assert fan_ins(layer) == [0 if r in ablated[-1] else fan_in for r in range(ROWS)]
    assert any(first - second for first, second in itertools.pairwise(ablated)), "none revived"
    assert any(second - first for first, second in itertools.pairwise(ablated)), "decided once"


def test_a_row_with_too_many_connections_keeps_the_largest():
    layer = make("real")
    algorithm = algorithm_for(layer, gamma_sal=3, drop_fraction=0.3)
    backward(layer, *operands(1))
    algorithm.step()
    fan_in = max(fan_ins(layer))
    assert fan_in > FAN_IN
    weights = weights_of(layer)
    algorithm.gamma_sal = 0
    algorithm.drop_fraction = lambda step: 0.0
    layer.zero_grad()
    backward(layer, *operands(2))
    algorithm.step()
    assert fan_ins(layer) == [FAN_IN] * ROWS
    for row in set(range(ROWS)) - set(algorithm.ablated_rows()[0].tolist()):
        had = [p for p in weights if p // COLS == row]
        if had:
            largest = sorted(had, key=lambda p: (-abs(weights[p]), p))[:FAN_IN]
            assert [p for p in layer.positions().tolist() if p // COLS == row] == sorted(largest)


def test_weights_that_are_zero_are_connections():
    layer = make("real")
    scale_rows(layer, torch.zeros(ROWS))
    positions = layer.positions().tolist()
    algorithm = algorithm_for(layer, gamma_sal=0, drop_fraction=0.25)
    backward(layer, *operands(1))
    algorithm.step()
    assert fan_ins(layer) == [FAN_IN] * ROWS
    kept = positions[: len(positions) - int(0.25 * len(positions))]
    assert set(kept) <= set(layer.positions().tolist())


@pytest.mark.parametrize(("exempt", "ablates"), [(True, [True, False]), (False, [True, True])])
def test_the_last_layer_is_exempt(exempt, ablates):
    model = torch.nn.ModuleList([make("real"), make("real")])
    algorithm = SRigL(update=1, gamma_sal=3, exempt_last=exempt)
    algorithm.attach(model)
    for layer in model:
        backward(layer, *operands(1))
    algorithm.step()
    assert [rows.size > 0 for rows in algorithm.ablated_rows()] == ablates
    assert (fan_ins(model[1]) == [FAN_IN] * ROWS) == exempt


@pytest.mark.parametrize("settings", [{"ablate": False}, {"gamma_sal": 0}])
def test_ablation_can_be_switched_off(settings):
    layer = make("real")
    algorithm = algorithm_for(layer, **{"gamma_sal": 3, **settings})
    backward(layer, *operands(1))
    algorithm.step()
    assert fan_ins(layer) == [FAN_IN] * ROWS
    assert algorithm.last_update[0].grown > 0


@pytest.mark.parametrize("kind", LAYERS)
def test_a_gradient_formed_late_counts_the_weights_it_was_taken_at(kind):
    layer = make(kind)
    algorithm = algorithm_for(layer, gamma_sal=3)
    x, dy = operands(1)
    layer(x)  # without a backward pass, this hides which one is the last
    backward(layer, x, dy)
    before = weights_of(layer)
    turned = layer.per_connection(layer.stored.detach()).flip(0)
    layer.put(layer.stored.detach(), torch.arange(layer.nnz), turned)
    after = weights_of(layer)
    expected, _ = slow_update(before, after, dense_gradient(x, dy), 0.3, BUDGET, 3)
    assert expected != slow_update(after, after, dense_gradient(x, dy), 0.3, BUDGET, 3)[0]
    algorithm.step()
    assert layer.positions().tolist() == expected


def test_the_gradient_is_the_sum_over_micro_batches():
    layer = make("real")
    algorithm = algorithm_for(layer, gamma_sal=3, grad_accumulation=2)
    pairs = [operands(seed) for seed in (1, 2)]
    weights = weights_of(layer)
    total = sum(dense_gradient(*pair) for pair in pairs)
    for pair in pairs:
        backward(layer, *pair)
    algorithm.step()
    assert layer.positions().tolist() == slow_update(weights, weights, total, 0.3, BUDGET, 3)[0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("settings", [{}, {"ablate": False}, {"drop_fraction": 0.0}])
def test_a_gradient_that_is_not_finite_skips_the_layer(bad, settings):
    layer = make("real")
    algorithm = algorithm_for(layer, **settings)
    x, dy = operands(1)
    dy[2, 3] = bad
    backward(layer, x, dy)
    born = layer.positions().clone()
    algorithm.step()
    assert algorithm.last_update == (UpdateReport(skipped="gradient is not finite", nnz=layer.nnz),)
    assert torch.equal(layer.positions(), born)


def test_candidates_never_exceed_the_budget(monkeypatch):
    kept = []
    original = gradient.RowTopK
    monkeypatch.setattr(gradient, "RowTopK", lambda k, *rest: kept.append(k.sum()) or original(k, *rest))
    layer = make("real")
    algorithm = algorithm_for(layer, gamma_sal=50)
    for seed in range(5):
        layer.zero_grad()
        backward(layer, *operands(seed, torch.linspace(0.1, 1, ROWS).roll(seed)))
        algorithm.step()
    assert len(kept) == 5
    assert max(kept) <= BUDGET


def test_the_budget_is_remembered():
    layer = make("real")
    algorithm = algorithm_for(layer, gamma_sal=3, sparsity=None)
    backward(layer, *operands(1))
    algorithm.step()
    assert layer.nnz < FAN_IN * ROWS
    resumed = make("real", seed=1)
    resumed.load_state_dict(layer.state_dict())
    resumed_algorithm = algorithm_for(resumed, gamma_sal=3, sparsity=None)
    resumed_algorithm.load_state_dict(algorithm.state_dict())
    x, dy = operands(2)
    weights = weights_of(layer)
    expected, forgotten = (
        slow_update(weights, weights, dense_gradient(x, dy), 0.3, budget, 0)[0]
        for budget in (FAN_IN * ROWS, layer.nnz)
    )
    assert expected != forgotten
    for each, each_algorithm in ((layer, algorithm), (resumed, resumed_algorithm)):
        each_algorithm.gamma_sal = 0
        each.zero_grad()
        backward(each, x, dy)
        each_algorithm.step()
        assert each.positions().tolist() == expected


def test_a_layer_without_constant_fan_in_is_refused():
    torch.manual_seed(0)
    layer = SparseLinear(COLS, ROWS, sparsity=0.7)
    with pytest.raises(ValueError, match=r"SRigL needs 5 connections for each output.*constant_fan_in_"):
        layer.apply(SRigL())
    constant_fan_in_(layer)
    with pytest.raises(ValueError, match=r"SRigL needs 8 connections for each output.* between 5 and 5"):
        layer.apply(SRigL(sparsity=0.5))
    layer.apply(SRigL(sparsity=0.7))


def test_a_layer_with_fewer_connections_than_outputs_is_refused():
    with pytest.raises(ValueError, match=r"at least one connection for each output.*has 10"):
        SparseLinear(COLS, ROWS, sparsity=1 - 10 / (COLS * ROWS)).apply(SRigL())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"gamma_sal": -0.1}, ValueError, "gamma_sal must be at least 0; got -0.1"),
        ({"gamma_sal": "big"}, TypeError, "gamma_sal"),
        ({"sparsity": Linear(0.5, 0.9, 10)}, TypeError, "sparsity must be a number or None for SRigL"),
        ({"drop": Magnitude()}, TypeError, "drop"),
        ({"scope": "layer"}, TypeError, "scope"),
    ],
)
def test_misuse_is_an_error(settings, error, message):
    with pytest.raises(error, match=message):
        SRigL(**settings)


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(srigl).attempted > 5
    assert doctest.testmod(srigl).failed == 0
