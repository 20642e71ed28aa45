"""RigL in loops of every kind trains as one that reads the dense `.grad` of a masked layer at the step."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from sparselab import MaskedLinear, RigL, SparseLinear
from tests.hazards.textbook import rigl_update
from tests.shared import n_steps

IN, OUT, SPARSITY, EVERY, FRACTION = 14, 10, 0.7, 3, 0.3


class DenseRigL:
    """The definition: W lies dense in one leaf, 0 where there is no connection, so that its `.grad` is G."""

    def __init__(self, layer):
        self.weight = nn.Parameter(layer.to_dense().weight.detach().clone())
        self.mask = torch.zeros(OUT, IN, dtype=torch.bool)
        self.mask.view(-1)[layer.positions()] = True
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.optimizer = torch.optim.SGD([self.weight, self.bias], lr=0.05)
        self.steps = 0
        self.stepped = True

    def __call__(self, x):
        return nn.functional.linear(x, self.weight, self.bias)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def optimizer_step(self):
        self.dense = None if self.weight.grad is None else self.weight.grad.clone()
        if self.weight.grad is not None:
            self.weight.grad[~self.mask] = 0
        self.optimizer.step()
        if self.dense is not None:
            self.weight.grad = self.dense.clone()

    def algorithm_step(self):
        self.steps += 1
        if self.steps % EVERY == 0 and self.dense is not None:
            rigl_update(self.weight, self.mask, self.dense, FRACTION)

    def positions(self):
        return self.mask.view(-1).nonzero().flatten()


class Sparse:
    """The same four calls on a layer of this package."""

    def __init__(self, layer):
        self.layer = layer
        self.optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
        self.algorithm = RigL(update_freq=EVERY, drop_fraction=FRACTION)
        layer.apply(self.algorithm)

    def __call__(self, x):
        return self.layer(x)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def optimizer_step(self):
        self.optimizer.step()

    def algorithm_step(self):
        self.algorithm.step()

    def positions(self):
        return self.layer.positions()


def batch(step, part=0):
    generator = torch.Generator().manual_seed(100 * step + part)
    x = torch.randn(6, IN, generator=generator, dtype=torch.float64)
    return x, torch.randn(6, OUT, generator=generator, dtype=torch.float64)


def loss_of(net, step, part=0, x=None):
    given, target = batch(step, part)
    return (net(given if x is None else x) - target).square().mean()


def plain(net, step):
    net.zero_grad()
    loss_of(net, step).backward()
    net.optimizer_step()
    net.algorithm_step()


def zeroed_in_place(net, step):
    net.zero_grad(set_to_none=False)
    loss_of(net, step).backward()
    net.optimizer_step()
    net.algorithm_step()


def generator_and_discriminator(net, step):
    """The generator's backward pass runs through the layer, whose gradient is then cleared."""
    noise = batch(step, 1)[0].requires_grad_()
    net(noise.tanh()).square().mean().backward()
    net.zero_grad()
    for part in (2, 3):
        loss_of(net, step, part).backward()
    net.optimizer_step()
    net.algorithm_step()


def skipped_steps(net, step):
    """As a GradScaler does after an overflow: the gradient is thrown away, and the step comes later."""
    net.zero_grad()
    loss_of(net, step, 1).backward()
    if step % 2:
        net.zero_grad()
        loss_of(net, step, 2).backward()
    net.optimizer_step()
    net.algorithm_step()


def adversarial(net, step):
    x = batch(step)[0].requires_grad_()
    (slope,) = torch.autograd.grad(loss_of(net, step, x=x), x)
    net.zero_grad()
    loss_of(net, step, x=(x + 0.1 * slope.sign()).detach()).backward()
    net.optimizer_step()
    net.algorithm_step()


def layer_drop(net, step):
    """Two micro-batches, of which some do not use the layer."""
    net.zero_grad()
    for part in (0, 1):
        if (step + part) % 4:
            loss_of(net, step, part).backward()
    net.optimizer_step()
    net.algorithm_step()


def two_losses(net, step):
    net.zero_grad()
    y = net(batch(step)[0])
    y.square().mean().backward(retain_graph=True)
    (y - batch(step)[1]).abs().mean().backward()
    net.optimizer_step()
    net.algorithm_step()


def many_closures(net, step):
    """As LBFGS and SAM do: the gradient is computed again and again before a step."""
    for part in range(3):
        net.zero_grad()
        loss_of(net, step, part).backward()
    net.optimizer_step()
    net.algorithm_step()


def evaluations(net, step):
    """Forward passes with gradients on, and gradients that go nowhere near `.grad`."""
    net.zero_grad()
    for part in range(3):
        kept = loss_of(net, step, part)
    torch.autograd.grad(kept, [p for p in parameters(net) if p.requires_grad])
    loss_of(net, step, 5).backward()
    loss_of(net, step, 6)
    net.optimizer_step()
    net.algorithm_step()


def reentrant(net, step):
    net.zero_grad()
    x = batch(step)[0].requires_grad_()
    y = checkpoint(lambda x: net(x.sin()), x, use_reentrant=True) + net(x)
    (y - batch(step)[1]).square().mean().backward()
    net.optimizer_step()
    net.algorithm_step()


def not_reentrant(net, step):
    net.zero_grad()
    y = checkpoint(lambda x: net(x.sin()), batch(step)[0], use_reentrant=False) + net(batch(step, 1)[0])
    (y - batch(step)[1]).square().mean().backward()
    net.optimizer_step()
    net.algorithm_step()


def clipped_micro_batches(net, step):
    net.zero_grad()
    for part in (0, 1):
        loss_of(net, step, part).backward()
        nn.utils.clip_grad_norm_(parameters(net), 1e6)
    net.optimizer_step()
    net.algorithm_step()


def penalised(net, step):
    """Part of the gradient comes from the weights themselves, and none of that is G."""
    net.zero_grad()
    loss_of(net, step).backward()
    sum(p.square().sum() for p in parameters(net)[1:]).backward()
    net.optimizer_step()
    net.algorithm_step()


def parameters(net):
    return net.optimizer.param_groups[0]["params"]


LOOPS = [
    plain, zeroed_in_place, generator_and_discriminator, skipped_steps, adversarial, layer_drop, two_losses,
    many_closures, evaluations, reentrant, not_reentrant, clipped_micro_batches, penalised,
]  # fmt: skip


@pytest.mark.parametrize("kind", [SparseLinear, MaskedLinear])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_every_loop_moves_connections_as_the_dense_gradient_says(loop, kind):
    torch.manual_seed(0)
    layer = kind(IN, OUT, sparsity=SPARSITY, dtype=torch.float64)
    ours, dense = Sparse(layer), DenseRigL(layer)
    born = layer.positions().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(n_steps(36, 240)):
            loop(ours, step)
            loop(dense, step)
            assert ours.positions().tolist() == dense.positions().tolist(), f"at step {step}"
            if step % 10 == 9:
                torch.testing.assert_close(
                    layer.to_dense().weight.detach(), dense.weight.detach(), rtol=1e-9, atol=1e-12
                )
    assert not torch.equal(layer.positions(), born)


def test_the_comparison_sees_a_gradient_that_is_left_out():
    torch.manual_seed(0)
    layer = SparseLinear(IN, OUT, sparsity=SPARSITY, dtype=torch.float64)
    ours, dense = Sparse(layer), DenseRigL(layer)
    same = []
    for step in range(36):
        two_losses(ours, step)
        plain(dense, step)
        same.append(ours.positions().tolist() == dense.positions().tolist())
    assert not all(same)


def test_nothing_is_held_of_passes_that_do_not_count():
    import weakref

    layer = SparseLinear(IN, OUT, sparsity=SPARSITY, dtype=torch.float64)
    layer.apply(algorithm := RigL(update_freq=1))
    references = []
    for step in range(5):
        hidden = batch(step)[0].requires_grad_().sin()
        references.append(weakref.ref(hidden))
        torch.autograd.grad(layer(hidden).sum(), layer.weight_values)
        del hidden
    assert not any(reference() is not None for reference in references)
    algorithm.step()
    assert algorithm.last_update[0].skipped == "no gradient"


@pytest.mark.parametrize("told", [False, True])
def test_the_first_update_holds_nothing_until_the_step_if_it_is_told_of_one_pass(told):
    torch.manual_seed(0)
    layer = SparseLinear(IN, OUT, sparsity=SPARSITY, dtype=torch.float64)
    layer.apply(algorithm := RigL(update_freq=1, drop_fraction=FRACTION))
    if told:
        algorithm.expect_passes(1)
    x, target = batch(0)
    hidden = x.requires_grad_().sin()
    memory = StorageWeakRef(hidden.untyped_storage())
    (layer(hidden) - target).square().mean().backward()
    del hidden
    assert memory.expired() == told
    algorithm.step()
    assert algorithm.last_update[0].grown > 0


def test_a_gradient_older_than_the_step_is_not_guessed():
    layer = SparseLinear(IN, OUT, sparsity=SPARSITY, dtype=torch.float64)
    loss_of(layer, 0).backward()
    layer.apply(algorithm := RigL(update_freq=1))
    loss_of(layer, 1).backward()
    algorithm.step()
    assert algorithm.last_update[0].skipped == "part of the gradient is older than the step"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_compiled_layer_is_updated_without_a_graph_break():
    torch.compiler.reset()
    torch.manual_seed(0)
    layers = [SparseLinear(IN, OUT, sparsity=SPARSITY, dtype=torch.float64)]
    layers.append(SparseLinear._from_layer(layers[0]))
    nets = [Sparse(layer) for layer in layers]
    compiled = torch.compile(layers[0], backend="aot_eager", fullgraph=True)
    nets[0].layer = compiled
    for step in range(8):
        for net in nets:
            plain(net, step)
        assert torch.equal(*(layer.positions() for layer in layers))
        assert torch.equal(*(layer.weight_values for layer in layers))
    assert nets[0].algorithm.last_update[0].grown > 0


def test_a_gradient_that_a_hook_takes_away_is_not_guessed():
    """As where gradients are moved elsewhere while the pass goes on, and no optimizer is seen to step."""
    layer = SparseLinear(IN, OUT, sparsity=SPARSITY, dtype=torch.float64)
    layer.weight_values.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    layer.apply(algorithm := RigL(update_freq=1))
    loss_of(layer, 0).backward()
    algorithm.step()
    assert algorithm.last_update[0].skipped == "a hook has emptied .grad within the backward pass"


def test_a_gradient_that_was_put_there_between_two_passes_is_not_guessed():
    layer = SparseLinear(IN, OUT, sparsity=SPARSITY, dtype=torch.float64)
    layer.apply(algorithm := RigL(update_freq=1))
    loss_of(layer, 0).backward()
    layer.weight_values.grad = layer.weight_values.grad.clone()
    loss_of(layer, 1).backward()
    algorithm.step()
    assert algorithm.last_update[0].skipped == "part of the gradient was put there by hand"


def test_an_algorithm_that_rewires_nothing_for_two_updates_says_so():
    layer = SparseLinear(IN, OUT, sparsity=SPARSITY, dtype=torch.float64)
    layer.apply(algorithm := RigL(update_freq=1))

    def by_hand(step):
        (layer.weight_values.grad,) = torch.autograd.grad(loss_of(layer, step), layer.weight_values)
        algorithm.step()

    by_hand(0)
    with pytest.warns(UserWarning, match="RigL has rewired no layer at its last two updates: part of"):
        by_hand(1)
    layer.zero_grad()
    loss_of(layer, 2).backward()
    algorithm.step()
    assert not algorithm.last_update[0].skipped
    by_hand(3)  # one alone is no reason


def test_a_model_that_is_frozen_is_left_alone_in_silence():
    layer = SparseLinear(IN, OUT, sparsity=SPARSITY, dtype=torch.float64).requires_grad_(False)
    layer.apply(algorithm := RigL(update_freq=1))
    for _ in range(3):
        algorithm.step()
    assert algorithm.last_update[0].skipped == "frozen"


def test_an_algorithm_that_is_driven_by_an_optimizer_within_the_backward_pass():
    """The optimizer's hook comes first, then the algorithm's: the layer is rewired inside the pass."""
    torch.manual_seed(0)
    layer = SparseLinear(IN, OUT, sparsity=SPARSITY, dtype=torch.float64)
    ours, dense = Sparse(layer), DenseRigL(layer)
    ours.algorithm.detach()
    ours.algorithm = RigL(update_freq=EVERY, drop_fraction=FRACTION)
    optimizers = {p: torch.optim.SGD([p], lr=0.05) for p in layer.parameters()}

    def step_of(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in layer.parameters():
        p.register_post_accumulate_grad_hook(step_of)
    ours.algorithm.attach(layer, optimizers[layer.weight_values])
    for step in range(60):
        loss_of(layer, step).backward()
        plain(dense, step)
        assert ours.positions().tolist() == dense.positions().tolist(), f"at step {step}"
        torch.testing.assert_close(layer.to_dense().weight.detach(), dense.weight.detach())
    assert ours.algorithm.last_update[0].grown
