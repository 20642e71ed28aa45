"""The agents run, the masked one as the sparse one, and the memory holds what it should."""

import numpy as np
import torch
from arms import ARMS
from dqn import QUICK, Memory, main, train
from options import changed


def test_the_quick_run_compares_all_agents(capsys):
    results = main(["--quick", "--set", "steps=200", "--set", "width=64", "--set", "batch=16"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ARMS)
    dense, masked, rigl, _ = results
    assert masked.weights == rigl.weights < 0.2 * dense.weights
    assert all(each.mean_return > 5 for each in results)


def test_the_masked_agent_lives_as_the_sparse_one():
    cfg = changed(QUICK, ["width=32", "steps=250", "batch=16", "update_freq=20"])
    torch.set_default_dtype(torch.float64)
    try:
        masked, sparse = (train(name, cfg) for name in ("masked, RigL", "sparse, RigL"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert masked[1:4] == sparse[1:4]


def test_the_memory_forgets_the_oldest():
    memory = Memory(3, np.random.default_rng(0))
    for n in range(5):
        memory.add(np.full(4, n, np.float32), n % 2, np.full(4, n + 1, np.float32), n == 4)
    states, actions, following, fell = memory.draw(100)
    assert set(states[:, 0].tolist()) == {2.0, 3.0, 4.0}
    assert torch.equal(following, states + 1)
    assert torch.equal(actions, states[:, 0].long() % 2)
    assert torch.equal(fell, (states[:, 0] == 4).float())
