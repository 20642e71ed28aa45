"""The judges of the algorithm tests, each shown a wrong answer."""

import pytest
import torch

from tests.dst.fake import FakeSparse
from tests.dst.harness import OPTIMIZERS, assert_followed, assert_same_state, assert_topology, backward, build


def test_assert_followed_sees_a_moment_left_behind():
    before = {"value": {1: 0.5, 4: 0.25}}
    assert_followed(before, {"value": {4: 0.25, 9: 0.0}})
    with pytest.raises(AssertionError, match="position 4"):
        assert_followed(before, {"value": {4: 0.5, 9: 0.0}})
    with pytest.raises(AssertionError, match="position 9"):
        assert_followed(before, {"value": {4: 0.25, 9: 0.5}})


@pytest.mark.parametrize("positions", [[0, 0, 1], [1, 0, 2], [0, 1, 4], [-1, 0, 1], [0, 1]])
def test_assert_topology_sees_bad_positions(positions):
    layer = FakeSparse(2, 2, 0.25)
    assert_topology(layer, 3)
    layer.live = torch.tensor(positions)
    with pytest.raises(AssertionError):
        assert_topology(layer, 3)


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_assert_same_state_sees_one_entry(where):
    runs = []
    for _ in range(2):
        model = build("fake")
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        backward(model, 1)
        optimizer.step()
        runs += [model, optimizer]
    assert_same_state(*runs)
    with torch.no_grad():
        values = runs[0][0].weight_values
        (values if where == "weight" else runs[1].state[values]["exp_avg"])[2] += 1
    with pytest.raises(AssertionError, match="differs"):
        assert_same_state(*runs)


def test_the_fake_layer_has_the_gradient_of_a_dense_one():
    layer = FakeSparse(5, 4, 0.5, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, values: _call(layer, x, values), (x, layer.weight_values))


def _call(layer, x, values):
    return torch.func.functional_call(layer, {"weight_values": values}, (x,))
