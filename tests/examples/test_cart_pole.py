"""The pole falls as it should."""

import numpy as np
import pytest
from cart_pole import CartPole


@pytest.mark.parametrize("action", [0, 1])
def test_a_cart_that_is_pushed_one_way_only_loses_its_pole(action):
    world = CartPole(np.random.default_rng(0))
    world.reset()
    over = False
    while not over:
        state, fell, over = world.step(action)
    assert fell
    assert world.n_steps < 15
    assert np.sign(state[2]) == (-1 if action else 1)  # it falls the other way


def test_an_episode_ends_without_a_fall():
    world = CartPole(np.random.default_rng(0))
    state = world.reset()
    for n in range(1, 201):  # a controller that is good enough
        state, fell, over = world.step(int(state[2] + 0.5 * state[3] + 0.05 * state[0] + 0.1 * state[1] > 0))
        assert not fell
        assert over == (n == 200)
