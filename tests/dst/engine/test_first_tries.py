"""What newcomers tried first: each is right, or refused with the fix."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from sparselab import SET, FanInLinear, RigL, SparseLinear, SRigL


@pytest.mark.parametrize(("width", "sparsity"), [(64, 0.8), (784, 0.8), (128, 0.9), (100, 0.9)])
def test_rows_that_were_rounded_one_by_one_have_the_sparsity_they_were_made_with(width, sparsity):
    for algorithm in (SRigL(sparsity), RigL(sparsity, scope="row"), SET(sparsity, scope="row")):
        layer = FanInLinear(width, 64, sparsity=sparsity)
        layer.apply(algorithm)
        assert algorithm.layers == (layer,)
    with pytest.raises(ValueError, match="SRigL needs"):
        FanInLinear(width, 64, sparsity=sparsity - 0.2).apply(SRigL(sparsity))


def test_a_step_counted_before_the_optimizer_s_own_is_rewired_by_the_gradient_that_is_there():
    torch.manual_seed(0)
    layer = SparseLinear(64, 32, sparsity=0.8)
    layer.apply(algorithm := RigL(update_freq=3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    grown = []
    for _ in range(9):
        optimizer.zero_grad()
        layer(torch.randn(8, 64)).square().sum().backward()
        algorithm.step()
        grown.append(0 if algorithm.last_update is None else algorithm.last_update[0].grown)
        optimizer.step()
    assert grown[2] == grown[5] == grown[8] == int(0.3 * layer.nnz)


def test_an_algorithm_can_be_copied_before_it_is_attached():
    twin = copy.deepcopy(RigL(0.8, update_freq=7))
    assert twin.update_freq == 7


@pytest.mark.parametrize("generator_first", [False, True])
def test_one_algorithm_rewires_both_networks_of_a_gan(generator_first):
    torch.manual_seed(0)
    nets = [SparseLinear(16, 16, sparsity=0.5), SparseLinear(16, 16, sparsity=0.5)]
    algorithm = RigL(update_freq=2)
    for net in nets:
        net.apply(algorithm)
    made, judge = (torch.optim.SGD(net.parameters(), lr=0.01) for net in nets)

    def train_generator():
        made.zero_grad()
        nets[1](nets[0](torch.randn(4, 16))).square().sum().backward()
        made.step()

    def train_judge():
        judge.zero_grad()
        nets[1](torch.randn(4, 16)).sum().backward()
        nets[1](nets[0](torch.randn(4, 16))).abs().sum().backward()
        judge.step()

    for step in range(1, 7):
        for train in (train_generator, train_judge)[:: 1 if generator_first else -1]:
            train()
        algorithm.step()
        if step % 2 == 0:
            assert [report.skipped for report in algorithm.last_update] == ["", ""]


def test_the_state_of_an_optimizer_follows_in_a_copy_of_all_three():
    torch.manual_seed(0)
    layer = SparseLinear(32, 16, sparsity=0.8)
    layer.apply(algorithm := SET(update_freq=1, drop_fraction=0.5))
    optimizer = torch.optim.Adam(layer.parameters())
    layer, algorithm, optimizer = copy.deepcopy((layer, algorithm, optimizer))
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(4, 32)).square().sum().backward()
        optimizer.step()
        moments = optimizer.state[layer.weight_values]["exp_avg"].flatten()
        before = dict(zip(layer.positions().tolist(), moments.tolist(), strict=True))
        algorithm.step()
        moments = optimizer.state[layer.weight_values]["exp_avg"].flatten().tolist()
        for position, moment in zip(layer.positions().tolist(), moments, strict=True):
            assert moment in (before.get(position), 0)


def test_what_is_no_tensor_is_refused_by_name():
    with pytest.raises(TypeError, match=r"input must be a torch\.Tensor, got ndarray"):
        SparseLinear(4, 4)(np.zeros((2, 4), np.float32))
