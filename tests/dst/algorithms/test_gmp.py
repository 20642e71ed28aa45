"""GMP, GraNet and MEST against plain sorting in float64."""

import numpy as np
import pytest
import torch

from sparselab.dst import GMP, MEST, ConstantSchedule, GraNet, LinearSchedule, PolynomialSchedule
from sparselab.kernels.arrays import n_connections
from sparselab.nn import SparseLinear
from tests.dst.fake import FakeSparse
from tests.dst.harness import LAYERS, backward, build, by_position, sparse_layers


def network(*sparsities, size=12, scale=()):
    layers = [FakeSparse(size, size, s, seed=i, dtype=torch.float64) for i, s in enumerate(sparsities)]
    for layer, factor in zip(layers, scale, strict=False):
        layer.weight_values.data.mul_(factor)
    return torch.nn.ModuleList(layers)


def weights_of(layer):
    weights = layer.per_connection(layer.stored.detach()).double().numpy()
    return dict(zip(layer.positions().tolist(), weights.tolist(), strict=True))


def largest(scores, k):
    """The k best keys of a dict; of equal ones the first."""
    return set(sorted(scores, key=lambda key: (-abs(scores[key]), key))[:k])


def test_the_oracle_by_hand():
    assert largest({4: -3.0, 1: 2.0, 2: 2.0, 9: 0.5}, 2) == {4, 1}


@pytest.mark.parametrize("kind", LAYERS)
def test_gmp_keeps_the_largest_of_each_layer(kind):
    model = build(kind, torch.float64, sparsity=0.0)
    layers = sparse_layers(model)
    schedule = PolynomialSchedule(0.0, 0.9, 10)
    model.apply(algorithm := GMP(schedule, update_freq=2))
    for step in range(1, 15):
        expected = [set(weights_of(layer)) for layer in layers]
        if step % 2 == 0:
            expected = [
                largest(weights_of(layer), n_connections(layer.shape, schedule(step))) for layer in layers
            ]
        algorithm.step()
        assert [set(weights_of(layer)) for layer in layers] == expected
    assert all(abs(layer.sparsity - 0.9) < 0.01 for layer in layers)


def test_gmp_keeps_the_largest_of_the_network():
    model = network(0.0, 0.5, scale=(0.7, 1.0))
    together = {(i, p): w for i, layer in enumerate(model) for p, w in weights_of(layer).items()}
    model.apply(algorithm := GMP(PolynomialSchedule(0.0, 0.9, 1), update_freq=1, scope="network"))
    algorithm.step()
    left = {(i, p) for i, layer in enumerate(model) for p in weights_of(layer)}
    assert left == largest(together, n_connections((1, 288), 0.9))
    assert [layer.nnz for layer in model] != [14, 14]


@pytest.mark.parametrize("scope", ["layer", "network"])
def test_gmp_never_grows_and_never_empties_a_layer(scope):
    model = network(0.9, 0.9)
    model.apply(algorithm := GMP(LinearSchedule(0.5, 1.0, 2), update_freq=1, scope=scope))
    algorithm.step()
    assert [layer.nnz for layer in model] == [14, 14]
    algorithm.step()
    assert [layer.nnz for layer in model] == [1, 1]
    assert all(report.grown == 0 for report in algorithm.last_update)


@pytest.mark.parametrize("make", [GMP, GraNet])
@pytest.mark.parametrize("constant", [0.9, ConstantSchedule(0.9)])
def test_a_constant_sparsity_is_refused(make, constant):
    with pytest.raises(ValueError, match=r"sparsity must be a schedule that changes.*constant 0\.9"):
        make(constant)


def slow_granet(layers, gradients, total, fraction):
    """Positions of each layer after an update that first prunes the network to `total`."""
    together = {(i, p): w for i, layer in enumerate(layers) for p, w in weights_of(layer).items()}
    kept = largest(together, total)
    after = []
    for i, (layer, gradient) in enumerate(zip(layers, gradients, strict=True)):
        left = {p: w for p, w in weights_of(layer).items() if (i, p) in kept}
        n_new = int(fraction * len(left))
        stay = largest(left, len(left) - n_new)
        free = {p: g for p, g in enumerate(gradient.reshape(-1).tolist()) if p not in stay}
        after.append(stay | largest(free, n_new))
    return after


@pytest.mark.parametrize("kind", LAYERS)
def test_granet_prunes_the_network_and_regenerates_each_layer(kind):
    model = build(kind, torch.float64, sparsity=0.5)
    first, _, second, _ = model
    seen = {}
    for layer in (first, second):
        layer.register_forward_hook(lambda m, args, y: (seen.update({m: [args[0]]}), y.retain_grad())[1])
        layer.register_forward_hook(lambda m, args, y: seen[m].append(y))
    schedule = PolynomialSchedule(0.5, 0.9, 6)
    model.apply(algorithm := GraNet(schedule, drop_fraction=0.3, update_freq=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(1, 13):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        gradients = [y.grad.T @ x.detach() for x, y in (seen[first], seen[second])]
        seen.clear()
        total = n_connections((1, 930), schedule(step))
        expected = [set(weights_of(layer)) for layer in (first, second)]
        if step % 2 == 0:
            expected = slow_granet((first, second), gradients, total, 0.3)
        algorithm.step()
        assert [set(weights_of(layer)) for layer in (first, second)] == expected
    assert sum(report.grown for report in algorithm.last_update) > 20
    assert sum(report.nnz for report in algorithm.last_update) == 93


def test_granet_changes_a_layer_once_and_what_grows_back_keeps_its_weight(monkeypatch):
    model = build("real", sparsity=0.0)
    model.apply(algorithm := GraNet(LinearSchedule(0.0, 0.2, 1), drop_fraction=0.5, update_freq=1))
    optimizer = torch.optim.AdamW(model.parameters())
    backward(model, 1)
    optimizer.step()
    rewrites = []
    original = SparseLinear.rewrite
    monkeypatch.setattr(
        SparseLinear, "rewrite", lambda layer, *args: rewrites.append(layer) or original(layer, *args)
    )
    layers = sparse_layers(model)
    before = [by_position(layer, optimizer) for layer in layers]
    algorithm.step()
    assert rewrites == layers
    assert sum(report.regrown for report in algorithm.last_update) > 100
    for layer, old in zip(layers, before, strict=True):
        for name, entries in by_position(layer, optimizer).items():
            assert all(number == old[name][position] for position, number in entries.items())


def test_granet_leaves_a_layer_without_gradient_out_of_the_total():
    model = network(0.5, 0.5)
    model.apply(algorithm := GraNet(LinearSchedule(0.5, 0.9, 1), drop_fraction=0.0, update_freq=1))
    model[0](torch.randn(3, 12, dtype=torch.float64)).sum().backward()
    algorithm.step()
    assert [report.skipped for report in algorithm.last_update] == ["", "no gradient"]
    assert [layer.nnz for layer in model] == [n_connections((1, 144), 0.9), 72]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("lam", [0.0, 20.0])
@pytest.mark.parametrize("soft_bound", [True, False], ids=["EM&S", "EM"])
def test_mest_keeps_the_best_scores_and_grows_at_random(kind, lam, soft_bound):
    model = build(kind, torch.float64)
    layers = sparse_layers(model)
    delta = LinearSchedule(0.1, 0.0, 8)
    model.apply(algorithm := MEST(0.8, delta=delta, update_freq=2, soft_bound=soft_bound, lam=lam))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(1, 11):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        before = [weights_of(layer) for layer in layers]
        gradients = [by_position(layer, optimizer)["gradient"] for layer in layers]
        algorithm.step()
        if step % 2:
            continue
        low, high = (0.8, 0.8 - delta(step)) if soft_bound else (0.8 + delta(step), 0.8)
        for layer, old, gradient, report in zip(
            layers, before, gradients, algorithm.last_update, strict=True
        ):
            kept = n_connections(layer.shape, low)
            scores = {p: abs(w) + lam * abs(gradient[p]) for p, w in old.items()}
            new = weights_of(layer)
            assert layer.nnz == n_connections(layer.shape, high)
            assert largest(scores, min(kept, len(old))) <= new.keys()
            assert all(new[p] == old.get(p, 0.0) for p in new)
            assert report.grown == layer.nnz - min(kept, len(old))
    if lam:
        assert largest(scores, 20) != largest(old, 20)


def test_mest_without_a_sparsity_keeps_each_layers_own():
    model = network(0.5, 0.75)
    model.apply(algorithm := MEST(None, delta=0.25, update_freq=1, soft_bound=False))
    algorithm.step()
    assert [(r.dropped, r.grown, r.nnz) for r in algorithm.last_update] == [(36, 36, 72), (35, 35, 36)]


def test_mest_needs_a_finite_gradient_only_if_it_asks_for_one():
    for lam, skipped in ((0.0, ["", ""]), (0.1, ["no gradient", "gradient is not finite"])):
        model = network(0.5, 0.5)
        model[1].weight_values.grad = torch.full_like(model[1].weight_values, torch.nan)
        model.apply(algorithm := MEST(0.5, delta=0.1, update_freq=1, soft_bound=False, lam=lam))
        algorithm.step()
        assert [report.skipped for report in algorithm.last_update] == skipped


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (lambda: MEST(None, delta=0.1), ValueError, "sparsity must be a number for a soft bound"),
        (lambda: MEST(LinearSchedule(0, 0.9, 9), delta=0.1), TypeError, "what changes is delta"),
        (lambda: MEST(0.8, delta=0.9), ValueError, r"delta must lie in \[0, 0\.8\]"),
        (lambda: MEST(0.8, delta=0.3, soft_bound=False), ValueError, r"delta must lie in \[0, 0\.2\]"),
        (lambda: MEST(0.8, delta=-0.1), ValueError, "delta must lie"),
        (lambda: MEST(0.8, delta=0.1, lam=-1), ValueError, "lam must be at least 0"),
        (
            lambda: network(0.5).apply(MEST(0.8, delta=0.1, soft_bound=False)),
            ValueError,
            "means 29 connections",
        ),
    ],
)
def test_misuse_of_mest(wrong, error, says):
    with pytest.raises(error, match=says):
        wrong()


def test_a_delta_out_of_range_is_named_with_its_step_before_anything_changes():
    model = network(0.5)
    model.apply(algorithm := MEST(0.5, delta=LinearSchedule(0.0, 0.8, 2), update_freq=1))
    algorithm.step()
    with pytest.raises(ValueError, match="at step 2"):
        algorithm.step()
    assert model[0].nnz == n_connections((12, 12), 0.1)


def test_ties_keep_exact_counts():
    model = network(0.0, 0.0)
    for layer in model:
        layer.weight_values.data.fill_(0.5)
    model.apply(algorithm := GMP(LinearSchedule(0.0, 0.5, 1), update_freq=1, scope="network"))
    algorithm.step()
    assert np.array_equal(model[0].positions(), np.arange(143))
    assert model[1].positions().tolist() == [0]
