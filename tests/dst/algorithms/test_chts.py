"""CHTs against its definition: score every position, in float64, entry by entry."""

import doctest
from collections import Counter

import numpy as np
import pytest
import torch

from sparselab.dst import (
    CHTs,
    CHTss,
    LinearSchedule,
    Magnitude,
    PathGrowth,
    RelativeImportance,
    SigmoidSchedule,
)
from sparselab.dst.algorithms import chts
from sparselab.dst.parts.grow_paths import draw_by_paths
from sparselab.dst.view import LayerUpdate, LayerView
from sparselab.kernels import PaddedCSR
from sparselab.kernels.arrays import n_connections
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.nn import SparseLinear
from tests.dst.fake import FakeSparse


def slow_ch2_l3n(live):
    """CH2-L3n at every free position, by both sums of the definition."""
    return _by_rows(live) + _by_rows(live.T).T


def _by_rows(live):
    scores = np.zeros(live.shape)
    for i, j in zip(*np.nonzero(~live), strict=True):
        for row in np.flatnonzero(live[:, j]):
            shared = int((live[row] & live[i]).sum())
            if shared:
                scores[i, j] += (shared + 1) / (int(live[row].sum()) - shared)
    return scores


def test_the_scores_by_hand():
    # Position (0, 2): rows 1 and 2 give 2 / 2 and 3 / 1. Column 0 shares row 2 with column 2 and has no link
    # beside those to rows 0 and 2: 2 / 1. Column 1 shares rows 1 and 2 with it: 3 / 1.
    live = np.array([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 0]], bool)
    assert slow_ch2_l3n(live)[0].tolist() == [0, 0, 1 + 3 + 2 + 3, 1 + 1]


def test_scores_as_products_of_the_released_program():
    # The same by matrices: two-hop counts M M^T and M^T M, weighed and walked on once more.
    live = np.random.default_rng(0).random((9, 13)) < 0.3
    M = live.astype(float)

    def one_side(M):
        counts = M @ M.T
        elsewhere = np.maximum((M.sum(1) - counts) * (counts > 0), 1) - 1
        return ((counts + 1) * (counts > 0) / (elsewhere + 1)) @ M

    products = (one_side(M) + one_side(M.T).T) * ~live
    np.testing.assert_allclose(products, slow_ch2_l3n(live))


def as_layer(live):
    layer = FakeSparse(live.shape[1], live.shape[0], 0.5)
    layer.live = torch.from_numpy(np.flatnonzero(live))
    layer.weight_values.data = torch.ones(layer.live.numel())
    return layer


def test_positions_are_drawn_in_proportion_to_their_score():
    live = np.random.default_rng(1).random((6, 7)) < 0.4
    W = PaddedCSR.from_dense(live.astype(np.float32))
    chances = slow_ch2_l3n(live).reshape(-1)
    chances /= chances.sum()
    n_draws = 3000
    rng = np.random.default_rng(0)
    counts = Counter(int(draw_by_paths(rng, W.topology, 1)[0]) for _ in range(n_draws))
    expected = n_draws * chances
    found = np.array([counts[position] for position in range(live.size)])
    assert np.all(found[chances == 0] == 0)
    # Six standard deviations of a count.
    assert np.all(np.abs(found - expected) <= 6 * np.sqrt(expected) + 1e-9)
    # Were all free positions with a path alike, that would be seen.
    flat = np.where(chances > 0, n_draws / np.count_nonzero(chances), 0)
    assert np.any(np.abs(found - flat) > 6 * np.sqrt(flat))


def test_pairs_are_drawn_one_after_the_other_without_replacement():
    live = np.array([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 0]], bool)
    W = PaddedCSR.from_dense(live.astype(np.float32))
    p = slow_ch2_l3n(live).reshape(-1)
    p /= p.sum()
    n_draws = 3000
    rng = np.random.default_rng(0)
    counts = Counter(tuple(draw_by_paths(rng, W.topology, 2).tolist()) for _ in range(n_draws))
    for i in range(live.size):
        for j in range(i + 1, live.size):
            expected = n_draws * (p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]))
            assert abs(counts[i, j] - expected) <= 6 * np.sqrt(expected) + 1e-9


@pytest.mark.parametrize("n_grow", [0, 1, 10, 25])
def test_what_has_no_path_is_drawn_at_random_once_the_others_are_used_up(n_grow):
    # Only (0, 1) and (1, 0) have a path; whatever more is asked for has none.
    live = np.zeros((6, 5), bool)
    live[[0, 1, 2, 2], [0, 1, 0, 1]] = True
    assert np.count_nonzero(slow_ch2_l3n(live)) == 2
    grown = PathGrowth().choose(
        LayerUpdate(LayerView(0, 1, 0, as_layer(live)), np.empty(0, np.int64), n_grow)
    )
    assert grown.size == np.unique(grown).size == n_grow
    assert not np.any(live.reshape(-1)[grown])
    if n_grow > 1:
        assert {1, 5} <= set(grown.tolist())


def test_without_any_path_growth_is_random():
    layer = as_layer(np.zeros((4, 5), bool))
    grown = PathGrowth().choose(LayerUpdate(LayerView(0, 1, 0, layer), np.empty(0, np.int64), 20))
    assert grown.tolist() == list(range(20))


def test_growth_sees_the_kept_connections_only():
    live = np.zeros((3, 3), bool)
    live[[0, 0, 1], [0, 1, 0]] = True
    # With slot 0 gone, nothing has a path, and position 0 may grow.
    update = LayerUpdate(LayerView(0, 1, 0, as_layer(live)), np.array([0]), 7)
    assert PathGrowth().choose(update).tolist() == [0, 2, 4, 5, 6, 7, 8]
    assert (
        draw_by_paths(np.random.default_rng(0), RowTopology.from_positions((3, 3), update.kept), 7).size == 0
    )


@pytest.mark.parametrize("make", [FakeSparse, lambda i, o, s: SparseLinear(i, o, sparsity=s)])
def test_an_update_keeps_the_counts_and_needs_no_gradient(make):
    torch.manual_seed(0)
    layer = make(30, 20, 0.8)
    layer.apply(algorithm := CHTs(temperature=3.0, update_freq=1))
    born = layer.positions().clone()
    algorithm.step()
    report = algorithm.last_update[0]
    assert (report.dropped, report.grown, report.nnz) == (36, 36, 120)
    assert not torch.equal(layer.positions(), born)


def test_a_hot_removal_is_certain():
    # At a high enough temperature the soft rule is that of the smallest weights.
    layer = FakeSparse(30, 20, 0.8)
    layer.apply(algorithm := CHTs(temperature=1e6, update_freq=1))
    weights = layer.weight_values.detach().abs()
    weakest = set(layer.live[weights.argsort()[:36]].tolist())
    kept = set(layer.live.tolist()) - weakest
    algorithm.step()
    assert kept <= set(layer.live.tolist())


def test_a_schedule_prunes_the_least_important_first():
    layer = FakeSparse(30, 20, 0.5)
    layer.apply(
        algorithm := CHTs(LinearSchedule(0.5, 0.7, 1), drop_fraction=0.0, update_freq=1, prune=Magnitude())
    )
    weights = layer.weight_values.detach().abs()
    strongest = sorted(layer.live[weights.argsort()[-180:]].tolist())
    algorithm.step()
    assert layer.live.tolist() == strongest


def test_pruning_comes_before_the_soft_removal():
    layer = FakeSparse(30, 20, 0.5)
    layer.apply(
        algorithm := CHTs(
            LinearSchedule(0.5, 0.7, 1), drop_fraction=0.5, update_freq=1, temperature=0.0, prune=Magnitude()
        )
    )
    weights = layer.weight_values.detach().abs()
    strongest = set(layer.live[weights.argsort()[-180:]].tolist())
    (drop,) = algorithm.selection.drop(algorithm.context([LayerView(0, 1, 0, layer)]))
    kept = np.delete(layer.live.numpy(), drop).tolist()
    assert len(kept) == 90
    assert strongest > set(kept)


def chained(drop_fraction=0.3, **settings):
    torch.manual_seed(0)
    model = torch.nn.Sequential(FakeSparse(12, 9, 0.9), torch.nn.ReLU(), FakeSparse(9, 11, 0.9, seed=1))
    algorithm = CHTs(None, drop_fraction=drop_fraction, update_freq=1, chains=[("0", "2")], **settings)
    algorithm.attach(model)
    return model, algorithm


def slow_chain(first, second):
    """Both matrices of booleans after one round over the units between them."""
    first, second = first.copy(), second.copy()
    for unit in range(len(first)):
        if not second[:, unit].any():
            first[unit] = False
    for unit in range(len(first)):
        if not first[unit].any():
            second[:, unit] = False
    return first, second


def as_dense(layer):
    live = np.zeros(layer.shape, bool)
    live.reshape(-1)[layer.live.numpy()] = True
    return live


def test_units_without_a_connection_on_one_side_lose_those_on_the_other():
    model, algorithm = chained(0.0)
    before = as_dense(model[0]), as_dense(model[2])
    expected = slow_chain(*before)
    assert any(np.any(old != new) for old, new in zip(before, expected, strict=True))
    views = [LayerView(i, 1, 0, layer) for i, layer in enumerate((model[0], model[2]))]
    drops = algorithm.selection.drop(algorithm.context(views))
    for view, drop, old, new in zip(views, drops, before, expected, strict=True):
        kept = np.delete(view.layer.live.numpy(), drop)
        assert kept.tolist() == np.flatnonzero(new).tolist()
        assert drop.size == old.sum() - new.sum()
    algorithm.step()
    assert [report.nnz for report in algorithm.last_update] == [old.sum() for old in before]


def test_a_chain_with_a_frozen_layer_is_left_alone():
    model, algorithm = chained(0.0)
    model[2].weight_values.requires_grad_(False)
    born = model[0].live.clone()
    algorithm.step()
    assert torch.equal(model[0].live, born)


@pytest.mark.parametrize(
    ("chains", "message"),
    [
        ([("0", "1")], r"chains must name attached layers \('0', '2'\), got \['1'\]"),
        ([("2", "0")], "'2' with 11 outputs and '0' with 12 inputs"),
    ],
)
def test_chains_that_do_not_fit_are_refused_before_anything_changes(chains, message):
    model, algorithm = chained()
    algorithm.selection.chains = chains
    born = model[0].live.clone()
    with pytest.raises(ValueError, match=message):
        algorithm.step()
    assert torch.equal(model[0].live, born)
    assert algorithm.steps_done == 0


def test_chtss_follows_its_sigmoid():
    layer = FakeSparse(30, 20, 0.5)
    layer.apply(algorithm := CHTss(0.95, sparsity_stop=10, update_freq=2))
    for step in range(1, 15):
        algorithm.step()
        if step % 2 == 0:
            assert layer.nnz == n_connections((20, 30), SigmoidSchedule(0.5, 0.95, 10)(step))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CHTs(temperature=-1), ValueError, "temperature must be 0 or above, got -1.0 at step 0"),
        (lambda: CHTs(temperature="hot"), TypeError, "temperature must be a number"),
        (lambda: CHTss(1.5, sparsity_stop=10), ValueError, r"sparsity must lie in \[0, 1\], got 1.5"),
        (lambda: CHTss(0.9, sparsity_stop=10, init=-1), ValueError, r"init must lie in \[0, 1\], got -1"),
        (lambda: CHTss(0.9, sparsity_stop=0), ValueError, "stop must be a step after step 0, got 0"),
    ],
)
def test_misuse_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_resumed_run_has_the_same_settings():
    states = [
        CHTs(**settings).state_dict()["config"]
        for settings in ({}, {"temperature": 2}, {"score": RelativeImportance()}, {"chains": [("a", "b")]})
    ]
    assert all(states.count(state) == 1 for state in states)


def test_the_examples_in_the_docstrings_run():
    results = doctest.testmod(chts)
    assert results.attempted > 8
    assert results.failed == 0
