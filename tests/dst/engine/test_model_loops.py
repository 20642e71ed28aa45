"""Loops over whole models: sparse layers train in them as masked ones do, and RigL as the textbook has it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparselab import GSE, SNFS, RigL
from tests.dst.loop_run import EVERY, F64, FRACTION, IN, Cut, Run
from tests.shared import n_steps, usual

ALGORITHMS: dict[str, Callable[..., Any]] = {
    "rigl": RigL,
    "snfs": partial(SNFS, redistribute=None),
    "gse": partial(GSE, gamma=2.0),
}


def batch(n: int = 6) -> Tensor:
    return torch.randn(n, IN, dtype=F64)


def loss(run: Run, x: Tensor | None = None, use: bool = True) -> Tensor:
    y = run.model(batch() if x is None else x, use=use)
    return (y - torch.randn(y.shape, dtype=F64)).square().mean()


def gan(run: Run, step: int) -> None:
    """The model is the discriminator; the generator's pass runs through it."""
    if run.kept is None:
        generator = nn.Linear(4, IN, dtype=F64)
        run.kept = generator, torch.optim.Adam(generator.parameters(), 0.01)
    generator, adam = run.kept
    adam.zero_grad()
    (-run.model(generator(torch.randn(6, 4, dtype=F64))).mean()).backward()
    adam.step()
    run.optimizer.zero_grad()
    fake = generator(torch.randn(6, 4, dtype=F64)).detach()
    nn.functional.softplus(-run.model(batch())).mean().backward()
    nn.functional.softplus(run.model(fake)).mean().backward()
    run.finish()


def gan_generator_last(run: Run, step: int) -> None:
    """The generator's pass comes between the discriminator's step and the next one's `zero_grad`."""
    run.optimizer.zero_grad()
    loss(run).backward()
    run.finish()
    loss(run, batch().requires_grad_()).neg().backward()


def wgan_gp(run: Run, step: int) -> None:
    run.optimizer.zero_grad()
    real, fake = batch(), 2 * batch()
    mixed = torch.lerp(real, fake, torch.rand(len(real), 1, dtype=F64)).requires_grad_()
    (slope,) = torch.autograd.grad(run.model(mixed).sum(), mixed, create_graph=True)
    penalty = (slope.norm(dim=1) - 1).square().mean()
    (run.model(fake).mean() - run.model(real).mean() + penalty).backward()
    run.finish()


def scaled(run: Run, step: int) -> None:
    """Two steps in seven overflow, and are skipped by the scaler."""
    run.drive()
    if run.kept is None:
        run.kept = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=50)
    run.optimizer.zero_grad()
    value = loss(run) * (torch.inf if step % 7 in (2, 3) else 1)
    run.kept.scale(value).backward()
    run.kept.step(run.optimizer)
    run.kept.update()


def skipped_by_hand(run: Run, step: int) -> None:
    run.optimizer.zero_grad(set_to_none=step % 2 == 0)
    loss(run).backward()
    if torch.rand(()) < 0.7:
        run.finish()


def adversarial(run: Run, step: int) -> None:
    x = batch().requires_grad_()
    (slope,) = torch.autograd.grad(loss(run, x), x)
    run.optimizer.zero_grad()
    loss(run, (x + 0.1 * slope.sign()).detach()).backward()
    run.finish()


def layer_drop(run: Run, step: int) -> None:
    run.optimizer.zero_grad()
    for part in range(2):
        loss(run, use=(step + part) % 3 > 0).backward()
    run.finish()


def layer_drop_of_whole_steps(run: Run, step: int) -> None:
    run.optimizer.zero_grad()
    loss(run, use=(step // 3) % 2 == 0).backward()
    run.finish()


def two_losses(run: Run, step: int) -> None:
    run.optimizer.zero_grad()
    y = run.model(batch())
    y.square().mean().backward(retain_graph=True)
    (y - 1).abs().mean().backward()
    run.finish()


def accumulation_that_changes(run: Run, step: int) -> None:
    run.optimizer.zero_grad()
    for _ in range(1 + step // 37 % 4):
        loss(run).backward()
    run.finish()


def checkpointed(run: Run, step: int) -> None:
    run.optimizer.zero_grad()
    x = batch().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(run.model, x, use_reentrant=step % 2 == 0)
    (y.square().mean() + loss(run)).backward()
    run.finish()


def clipped(run: Run, step: int) -> None:
    run.optimizer.zero_grad()
    for _ in range(2):
        loss(run).backward()
    live = [layer.weight.grad[layer.mask] for layer in run.cut] if run.cut else None
    if live is None:
        nn.utils.clip_grad_norm_(run.parameters, 0.5)
    else:  # of what is trained
        others = [layer.bias.grad.flatten() for layer in run.cut]
        norm = torch.cat(live + others).norm()
        for p in run.parameters:
            p.grad.mul_((0.5 / (norm + 1e-6)).clamp(max=1))
    run.finish()


def an_optimizer_for_each_layer(run: Run, step: int) -> None:
    if run.kept is None:
        run.kept = [run.sgd(list(layer.parameters()), 0.03, 0.9) for layer in run.layers]
    for each in run.kept:
        each.zero_grad()
    loss(run).backward()
    for each in run.kept:
        each.step()
    run.algorithm_step()


def two_optimizers_over_the_same(run: Run, step: int) -> None:
    """Steps of both in turns, and at times of both."""
    if run.kept is None:
        run.kept = [run.optimizer, run.sgd(lr=0.02, momentum=0.5)]
    for each in [run.kept, run.kept[:1], run.kept[1:]][step % 3]:
        each.zero_grad()
        loss(run).backward()
        each.step()
        run.algorithm_step()


def optimizer_in_backward(run: Run, step: int) -> None:
    if run.kept is None:
        run.kept = {p: run.sgd([p], momentum=0.9) for p in run.parameters}

        def now(p: Tensor) -> None:
            run.kept[p].step()
            run.kept[p].zero_grad()

        for p in run.parameters:
            p.register_post_accumulate_grad_hook(now)
    loss(run).backward()
    run.algorithm_step()


def sam(run: Run, step: int) -> None:
    """Up along the gradient, the gradient there, back, and a step with it."""
    run.optimizer.zero_grad()
    x = batch()
    run.model(x).square().mean().backward()
    moves = []
    for layer in run.layers:
        stored = layer.weight if isinstance(layer, Cut) else layer.stored
        move = 0.05 * stored.grad
        if isinstance(layer, Cut):
            move[~layer.mask] = 0
        moves.append((stored, move))
    with torch.no_grad():
        for stored, move in moves:
            stored.add_(move)
    run.optimizer.zero_grad()
    run.model(x).square().mean().backward()
    with torch.no_grad():
        for stored, move in moves:
            stored.sub_(move)
    run.finish()


def maml(run: Run, step: int) -> None:
    """An inner step whose derivative counts, in `functional_call`; then the outer loss, and a plain one."""
    run.optimizer.zero_grad()
    parameters = dict(run.model.named_parameters())
    x = batch()
    inner = functional_call(run.model, parameters, (x,)).square().mean()
    slopes = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
    fast = {}
    for (name, p), slope in zip(parameters.items(), slopes, strict=True):
        owner = run.model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, Cut) and p is owner.weight:
            slope = torch.where(owner.mask, slope, 0)
        fast[name] = p - 0.1 * slope
    (functional_call(run.model, fast, (x + 1,)).square().mean()).backward()
    run.finish()


def first_order_maml(run: Run, step: int) -> None:
    """Inner steps on a copy; the outer gradient is that of a plain pass."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in run.model.named_parameters()}
    x = batch()
    inner = functional_call(run.model, parameters, (x,)).square().mean()
    torch.autograd.grad(inner, list(parameters.values()))
    inner = functional_call(run.model, parameters, (x,)).square().mean()
    inner.backward()
    run.optimizer.zero_grad()
    loss(run).backward()
    run.finish()


def evaluations(run: Run, step: int) -> None:
    """With gradients on, in training and in evaluation mode, before and after the pass that counts."""
    run.model.eval()
    loss(run)
    loss(run).backward()
    run.model.train()
    run.optimizer.zero_grad()
    loss(run).backward()
    loss(run)
    run.finish()
    if step % 4 == 0:
        loss(run).backward()


def cleared_between_step_and_algorithm(run: Run, step: int) -> None:
    loss(run).backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.algorithm_step()


def averaged_model(run: Run, step: int) -> None:
    """A teacher, which is a copy: passes through it are nobody's."""
    if step % 20 == 0:
        run.kept = copy.deepcopy(run.model)
    x = batch()
    run.kept(x).mean().backward()
    run.optimizer.zero_grad()
    (run.model(x) - run.kept(x).detach()).square().mean().backward()
    loss(run).backward()
    run.finish()


LOOPS = [
    gan, gan_generator_last, wgan_gp, scaled, skipped_by_hand, adversarial, layer_drop,
    layer_drop_of_whole_steps, two_losses, accumulation_that_changes, checkpointed, clipped,
    an_optimizer_for_each_layer, two_optimizers_over_the_same, optimizer_in_backward, sam, maml,
    first_order_maml, evaluations, cleared_between_step_and_algorithm, averaged_model,
]  # fmt: skip


def same(ours: Run, theirs: Run, step: int) -> None:
    for n, (a, b) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
        assert a.positions().tolist() == b.positions().tolist(), f"layer {n} after step {step}"
    for a, b in zip(ours.weights(), theirs.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


#: What a user says of a loop, where it is needed.
TOLD = {accumulation_that_changes: {"grad_accumulation": 4}}


@pytest.mark.parametrize("name", [usual(name == "rigl", name) for name in ALGORITHMS])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_loop_trains_sparse_masked_and_dense_alike(loop: Any, name: str) -> None:
    def algorithm() -> Any:
        return ALGORITHMS[name](update_freq=EVERY, drop_fraction=FRACTION, **TOLD.get(loop, {}))

    runs = [Run("sparse", algorithm()), Run("masked", algorithm())]
    if name == "rigl":
        runs.append(Run("textbook", None))
    born = [layer.positions().tolist() for layer in runs[0].layers]
    steps = n_steps(76, 200) if name == "rigl" else 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(steps):
            updates = runs[0].algorithm.steps_done // EVERY
            for run in runs:
                torch.manual_seed(1000 + step)
                loop(run, step)
            if updates < runs[0].algorithm.steps_done // EVERY or step == steps - 1:
                for other in runs[1:]:
                    same(runs[0], other, step)
    assert all(a != layer.positions().tolist() for a, layer in zip(born, runs[0].layers, strict=True))
    assert runs[0].algorithm.steps_done > steps // 2
