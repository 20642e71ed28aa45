import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparselab.dst.parts.drop import (
    Magnitude,
    RelativeImportance,
    SignedMagnitude,
    Soft,
    lowest,
    lowest_of_network,
)
from sparselab.dst.view import LayerView
from tests.dst.fake import FakeSparse


def slow_lowest(weights, k):
    """Keep in the order (|w| descending, slot ascending), NaN last; drop what is left."""
    size = [-1 if np.isnan(w) else abs(w) for w in weights]
    order = sorted(range(len(weights)), key=lambda slot: (-size[slot], slot))
    return sorted(order[len(weights) - k :])


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, np.nan]), max_size=20), st.data())
def test_lowest_keeps_the_count_and_breaks_ties_by_slot(weights, data):
    k = data.draw(st.integers(0, len(weights)))
    assert lowest(np.abs(np.array(weights, np.float64)), k).tolist() == slow_lowest(weights, k)


def test_all_zero_weights_lose_their_highest_slots():
    assert lowest(np.zeros(6), 2).tolist() == [4, 5]


def test_lowest_refuses_an_impossible_count():
    with pytest.raises(ValueError, match="k must lie in"):
        lowest(np.zeros(3), 4)


def test_magnitude_is_a_copy():
    layer = FakeSparse(4, 4, 0.5)
    before = layer.stored.detach().clone()
    scores = Magnitude()(LayerView(0, 1, 0, layer))
    assert scores.tolist() == before.abs().tolist()
    scores[:] = 7
    assert torch.equal(layer.stored.detach(), before)


def slow_lowest_of_network(layers, k):
    """Everything in one list, weakest first; the best of each layer is not in it."""
    ranked = []
    for i, scores in enumerate(layers):
        order = sorted(range(len(scores)), key=lambda slot: (-np.nan_to_num(scores[slot], nan=-1), slot))
        ranked += [(np.nan_to_num(scores[slot], nan=-1), -i, -slot) for slot in order[1:]]
    gone = sorted(ranked)[:k]
    return [sorted(-slot for _, layer, slot in gone if layer == -i) for i in range(len(layers))]


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, np.nan]), max_size=8), min_size=1, max_size=4),
    st.integers(0, 40),
)
def test_lowest_of_network_ranks_all_layers_together_and_empties_none(layers, k):
    dropped = lowest_of_network([np.array(scores, np.float64) for scores in layers], k)
    assert [slots.tolist() for slots in dropped] == slow_lowest_of_network(layers, k)


def test_signed_magnitude_takes_the_same_fraction_of_both_signs():
    layer = FakeSparse(6, 2, 0.0)
    with torch.no_grad():
        layer.weight_values.copy_(torch.tensor([0.1, 9, -1, 0.2, 8, -2, -3, 0.3, 7, -4, 0.3, 0]))
    score = SignedMagnitude()(LayerView(0, 1, 0, layer))
    rank = [1, 7, -1, 2, 6, -2, -3, 4, 5, -4, 3, 0]
    assert score.tolist() == [r / 7 if r >= 0 else -r / 4 for r in rank]
    # The zero, then 2 of the 7 positive and 1 of the 4 negative weights.
    assert lowest(score, 4).tolist() == [0, 2, 3, 11]
    with torch.no_grad():
        layer.weight_values[1] = torch.nan
    assert lowest(SignedMagnitude()(LayerView(0, 1, 0, layer)), 2).tolist() == [1, 11]


def test_a_network_without_layers_drops_nothing():
    assert lowest_of_network([], 0) == []


def test_relative_importance_is_the_share_of_row_and_column():
    layer = FakeSparse(6, 5, 0.4)
    dense = layer.dense(layer.weight_values).detach().double().numpy()
    size = np.abs(dense)
    expected = [
        size[i, j] / size[i].sum() + size[i, j] / size[:, j].sum()
        for i, j in (divmod(position, 6) for position in layer.live.tolist())
    ]
    np.testing.assert_allclose(RelativeImportance()(LayerView(0, 1, 0, layer)), expected, rtol=1e-12)


def test_relative_importance_of_zeros_is_zero():
    layer = FakeSparse(6, 5, 0.4)
    layer.weight_values.data.zero_()
    assert not RelativeImportance()(LayerView(0, 1, 0, layer)).any()


def weights_of(*numbers):
    layer = FakeSparse(len(numbers), 1, 0.0)
    layer.weight_values.data = torch.tensor(numbers, dtype=torch.float64)
    return layer


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_soft_keeps_in_proportion_to_a_power_of_the_score(temperature):
    layer, n_draws = weights_of(1.0, -2.0, 3.0, 0.5), 4000
    chances = np.abs([1.0, -2.0, 3.0, 0.5]) ** temperature
    chances /= chances.sum()
    kept = np.zeros((4, 4))
    for seed in range(n_draws):
        scores = Soft(temperature=temperature)(LayerView(0, 1, seed, layer))
        kept[tuple(sorted(set(range(4)) - set(lowest(scores, 2).tolist())))] += 1
    for i in range(4):
        for j in range(i + 1, 4):
            p, q = chances[i], chances[j]
            expected = n_draws * p * q * (1 / (1 - p) + 1 / (1 - q))
            assert abs(kept[i, j] - expected) <= 6 * np.sqrt(expected)


def test_soft_draws_depend_on_seed_layer_and_step_only():
    layer = weights_of(*range(1, 9))
    views = [(0, 1, 0), (0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]
    first, same, *others = [Soft()(LayerView(*key, layer)).tolist() for key in views]
    assert first == same
    assert first not in others


def test_soft_takes_zeros_and_gives_nan_up_first():
    layer = weights_of(0.0, 0.0, 1.0, np.nan)
    scores = [Soft(temperature=9)(LayerView(0, 1, seed, layer)) for seed in range(60)]
    assert {tuple(lowest(s, 1).tolist()) for s in scores} == {(3,)}
    assert {tuple(lowest(s, 2).tolist()) for s in scores} == {(0, 3), (1, 3)}


def test_soft_temperature_follows_its_schedule_and_must_not_be_negative():
    layer = weights_of(1.0, 2.0)
    cold, warm = (Soft(temperature=lambda step, t=t: t * step)(LayerView(0, 2, 0, layer)) for t in (0.0, 1.0))
    np.testing.assert_allclose(warm - cold, 2 * np.log([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"temperature must be 0 or above, got -2\.0 at step 2"):
        Soft(temperature=lambda step: -step)(LayerView(0, 2, 0, layer))
