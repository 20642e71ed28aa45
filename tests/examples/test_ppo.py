"""The agents run, the masked one as the sparse one, and advantages are what the definition says."""

import pytest
import torch
from arms import ARMS
from options import changed
from ppo import QUICK, ActorCritic, Config, Player, advantages, main, make_model, objective, train

from tests.examples.twins import assert_compared, assert_twins, float64


def test_the_quick_run_compares_all_agents(capsys):
    results = main(["--quick", "--set", "width=64"])
    assert_compared(results, capsys.readouterr().out)
    assert all(each.scores[0] > 5 for each in results)


def test_the_masked_agent_lives_as_the_sparse_one():
    cfg = changed(QUICK, ["width=32"])
    with float64():
        masked, sparse = (train(name, cfg) for name in ("masked, RigL", "sparse, RigL"))
        assert_twins(masked, sparse, make_model(ARMS["sparse, RigL"], cfg))
    assert masked.scores == sparse.scores


def test_advantages_are_sums_of_discounted_errors():
    cfg = Config(gamma=0.9, lam=0.5)
    torch.manual_seed(0)
    values, following = torch.randn(2, 5, 1)
    fell, over = torch.zeros(2, 5, 1)
    fell[1], over[1], over[3] = 1, 1, 1  # a fall after the second step, the limit after the fourth
    errors = 1 + 0.9 * following - values
    errors[1] = 1 - values[1]
    expected = [errors[0] + 0.45 * errors[1], errors[1], errors[2] + 0.45 * errors[3], errors[3], errors[4]]
    torch.testing.assert_close(advantages(values, following, fell, over, cfg), torch.stack(expected))


@pytest.mark.parametrize(("advantage", "moved"), [(1.0, 0.5), (1.0, 1.5), (-1.0, 0.5), (-1.0, 1.5)])
def test_a_ratio_that_has_gone_far_enough_has_no_gradient(advantage, moved):
    model = ActorCritic(8)
    states, actions = torch.randn(2, 4), torch.tensor([[0], [0]])
    old = model.policy(states).log_softmax(1)[:, 0].detach()
    old[0] -= torch.tensor(moved).log()  # the first ratio is `moved`, the other 1
    old.requires_grad_()
    objective(
        model, (states, actions, old, torch.tensor([advantage, 0.0]), torch.zeros(2)), Config()
    ).backward()
    assert (old.grad == 0).tolist() == [(advantage > 0) == (moved > 1), False]


def test_a_player_goes_on_after_an_episode():
    cfg = Config(worlds=3)
    player = Player(cfg)
    seen = player.play(ActorCritic(8).policy, 64)
    assert seen.states.shape == seen.following.shape == (64, 3, 4)
    same = (seen.states[1:] == seen.following[:-1]).all(-1)
    assert torch.equal(~same, seen.over[:-1].bool())
    assert len(player.lengths) == seen.over.sum() > 0
