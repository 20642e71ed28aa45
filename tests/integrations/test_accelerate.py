"""Accelerate prepares model and optimizer; an algorithm is attached to both as to those of torch."""

import copy

import pytest
import torch

from sparselab import RigL, SparseLinear
from sparselab.nn import find_sparse
from tests.dst.harness import assert_same_state

accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

STEPS = 6


def made():
    torch.manual_seed(0)
    return torch.nn.Sequential(SparseLinear(32, 48, sparsity=0.8), torch.nn.Tanh(), torch.nn.Linear(48, 4))


def batch(step):
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(step))


def train(model, optimizer, backward):
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model(batch(step)).square().mean())
        optimizer.step()


@pytest.mark.parametrize("by_hand", [False, True], ids=["attached to both", "stepped by hand"])
def test_as_without_accelerate(by_hand):
    plain, algorithm = made(), RigL(update_freq=2)
    prepared = copy.deepcopy(plain)
    raw = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    algorithm.attach(plain, raw)
    train(plain, raw, torch.Tensor.backward)

    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(prepared, torch.optim.AdamW(prepared.parameters(), lr=1e-2))
    assert type(optimizer) is not torch.optim.AdamW
    other = RigL(update_freq=2)
    if by_hand:
        other.attach(model)
        optimizer.optimizer.register_step_post_hook(lambda *_: other.step())
    else:
        other.attach(model, optimizer)
    born = model[0].positions().clone()
    train(model, optimizer, accelerator.backward)
    assert other.steps_done == STEPS
    assert not torch.equal(model[0].positions(), born)
    assert_same_state(plain, raw, accelerator.unwrap_model(model), optimizer.optimizer)


def test_another_model_s_optimizer_is_refused_and_nothing_is_attached():
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(made(), torch.optim.SGD(made().parameters(), lr=0.1))
    algorithm = RigL()
    with pytest.raises(ValueError, match="optimizer must hold the weights of the sparse layers"):
        algorithm.attach(model, optimizer)
    assert algorithm.layers == ()


def test_accumulated_gradients_are_of_one_step():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(*_with_optimizer())
    algorithm = RigL(update_freq=1)
    algorithm.attach(model, optimizer)
    for step in range(STEPS):
        with accelerator.accumulate(model):
            accelerator.backward(model(batch(step)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert algorithm.steps_done == STEPS // 2
    assert all(report.grown for report in algorithm.last_update)
    assert len(list(find_sparse(model))) == 1


def _with_optimizer():
    model = made()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)
