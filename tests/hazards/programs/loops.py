"""Training loops with RigL: none may be refused, and each must rewire as the masked twin does."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import sparselab
from tests.hazards.cases import demand, hazard
from tests.hazards.programs.names import rigl, weights
from tests.hazards.textbook import rigl_update

STEPS, EVERY = 24, 4


def reference(model: nn.Module) -> nn.Module:
    """A copy whose sparse layers are dense ones, with a mask on the weight."""
    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, sparselab.SparseLinear):
            twin.set_submodule(name, Masked(layer))
    return twin


class Masked(nn.Linear):
    """A dense layer with a mask, rewired by the textbook from the dense gradient that is in `.grad`."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer.in_features, layer.out_features, dtype=weights(layer).dtype)
        dense = layer.to_dense()
        self.load_state_dict(dense.state_dict())
        self.register_buffer("mask", torch.zeros_like(self.weight, dtype=torch.bool))
        self.mask.view(-1)[layer.positions()] = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def mask_gradient(self) -> None:
        """Before the optimizer's step: remember the dense gradient, and leave only that of connections."""
        self.dense_gradient = None if self.weight.grad is None else self.weight.grad.clone()
        if self.weight.grad is not None:
            self.weight.grad[~self.mask] = 0

    @torch.no_grad()
    def rewire(self, fraction: float) -> None:
        """After the step: RigL's update."""
        if self.dense_gradient is not None:
            rigl_update(self.weight, self.mask, self.dense_gradient, fraction)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        sparselab.SparseLinear(24, 32, sparsity=0.7, dtype=torch.float64),
        nn.Tanh(),
        sparselab.SparseLinear(32, 8, sparsity=0.5, dtype=torch.float64),
    )


Loop = Callable[[nn.Module, torch.optim.Optimizer, int], bool]


def compare(loop: Loop, model: nn.Module | None = None) -> str:
    """Train with a loop, which says whether it made an optimizer step, both ways; compare the topologies."""
    model = net() if model is None else model
    twin = reference(model)
    algorithm = rigl(EVERY, drop_fraction=0.3)
    model.apply(algorithm)
    layers = [each for each in model.modules() if isinstance(each, sparselab.SparseLinear)]
    twins = [each for each in twin.modules() if isinstance(each, Masked)]
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.003) for each in (model, twin)]
    optimizers[1].register_step_pre_hook(lambda *_: [each.mask_gradient() for each in twins] and None)
    done = 0
    for step in range(STEPS):
        torch.manual_seed(step)
        mine = loop(model, optimizers[0], step)
        torch.manual_seed(step)
        theirs = loop(twin, optimizers[1], step)
        assert mine == theirs
        if not mine:
            continue
        algorithm.step()
        done += 1
        if done % EVERY == 0:
            for each in twins:
                each.rewire(0.3)
        for n, (layer, each) in enumerate(zip(layers, twins, strict=True)):
            expected = each.mask.view(-1).nonzero()[:, 0]
            demand(
                torch.equal(layer.positions(), expected),
                f"after {done} steps layer {n} has other connections than its masked twin",
            )
    return f"the masked twin's topologies through {done // EVERY} updates"


def batch(n: int = 12, width: int = 24) -> torch.Tensor:
    return torch.randn(n, width, dtype=torch.float64)


@hazard("loops", "plain", refusable=False)
def plain() -> str:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> bool:
        optimizer.zero_grad()
        model(batch()).square().sum().backward()
        optimizer.step()
        return True

    return compare(loop)


@hazard("loops", "GAN: the generator's backward pass runs through the discriminator", refusable=False)
def gan() -> str:
    torch.manual_seed(1)
    generator = nn.Linear(6, 24, dtype=torch.float64)
    generators = {}

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> bool:
        ours = generators.setdefault(id(model), copy.deepcopy(generator))
        optimizer.zero_grad()
        fake = ours(batch(width=6))
        model(batch()).mean().backward()
        (-model(fake.detach()).mean()).backward()
        optimizer.step()
        # Adds to the discriminator's gradients, which the next zero_grad clears, as in torch's own example.
        model(ours(batch(width=6))).mean().backward()
        return True

    return compare(loop)


@hazard("loops", "GAN: the generator's backward pass comes first", refusable=False)
def gan_first() -> str:
    torch.manual_seed(1)
    generator = nn.Linear(6, 24, dtype=torch.float64)
    generators = {}

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> bool:
        ours = generators.setdefault(id(model), copy.deepcopy(generator))
        model(ours(batch(width=6))).mean().backward()
        optimizer.zero_grad()
        model(batch()).mean().backward()
        (-model(ours(batch(width=6)).detach()).mean()).backward()
        optimizer.step()
        return True

    return compare(loop)


@hazard("loops", "a step skipped after a backward pass, as by GradScaler", refusable=False)
def skipped() -> str:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> bool:
        optimizer.zero_grad()
        model(batch()).square().sum().backward()
        if step % 3 == 2:
            return False
        optimizer.step()
        return True

    return compare(loop)


@hazard("loops", "adversarial: autograd.grad for x before the backward pass", refusable=False)
def adversarial() -> str:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> bool:
        x = batch().requires_grad_()
        (direction,) = torch.autograd.grad(model(x).square().sum(), x)
        optimizer.zero_grad()
        model((x + 0.1 * direction.sign()).detach()).square().sum().backward()
        optimizer.step()
        return True

    return compare(loop)


@hazard("loops", "autograd.grad for the weights before the backward pass", refusable=False)
def looked_at() -> str:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> bool:
        torch.autograd.grad(model(batch()).square().sum(), list(model.parameters()))
        optimizer.zero_grad()
        model(batch()).square().sum().backward()
        optimizer.step()
        return True

    return compare(loop)


class Dropped(nn.Module):
    """A residual layer that is left out of some passes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = sparselab.SparseLinear(24, 24, sparsity=0.7, dtype=torch.float64)
        self.second = sparselab.SparseLinear(24, 8, sparsity=0.5, dtype=torch.float64)

    def forward(self, x: torch.Tensor, use: bool = True) -> torch.Tensor:
        if use:
            x = x + self.first(x).tanh()
        y: torch.Tensor = self.second(x)
        return y


@hazard("loops", "a layer unused in one micro-batch of two", refusable=False)
def layer_drop() -> str:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> bool:
        optimizer.zero_grad()
        for k in range(2):
            model(batch(), use=(step + k) % 2 == 0).square().sum().backward()
        optimizer.step()
        return True

    return compare(loop, Dropped())


@hazard("loops", "two losses on one graph", refusable=False)
def two_losses() -> str:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> bool:
        optimizer.zero_grad()
        y = model(batch())
        y.square().sum().backward(retain_graph=True)
        y.abs().sum().backward()
        optimizer.step()
        return True

    return compare(loop)


@hazard("loops", "accumulation over three micro-batches, undeclared", refusable=False)
def accumulated() -> str:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> bool:
        optimizer.zero_grad()
        for _ in range(3):
            model(batch()).square().sum().backward()
        optimizer.step()
        return True

    return compare(loop)


@hazard("loops", "gradients zeroed in place", refusable=False)
def zeroed_in_place() -> str:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> bool:
        model(batch()).square().sum().backward()
        optimizer.zero_grad(set_to_none=False)
        model(batch()).square().sum().backward()
        optimizer.step()
        return True

    return compare(loop)


@hazard("loops", "gradient checkpointing", refusable=False)
def checkpointed() -> str:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> bool:
        optimizer.zero_grad()
        x = batch().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=step % 2 == 0)
        y.square().sum().backward()
        optimizer.step()
        return True

    return compare(loop)


@hazard("loops", "LBFGS for the biases, whose step calls a closure many times", refusable=False)
def lbfgs() -> str:
    model = net()
    dense = [p for p in model.parameters() if p.ndim == 1 and len(p) < 40]
    algorithm = rigl(2, drop_fraction=0.3)
    model.apply(algorithm)
    optimizer = torch.optim.LBFGS(dense, max_iter=5)
    sgd = torch.optim.SGD([p for p in model.parameters() if all(p is not each for each in dense)], lr=1e-3)
    torch.manual_seed(0)
    x = batch()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        sgd.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
        sgd.step()
        algorithm.step()
    report = algorithm.last_update
    demand(all(each.dropped for each in report), f"no update: {report}")
    return "updated"


@hazard("loops", "50 evaluations with gradients on hold nothing", refusable=False)
def evaluated() -> str:
    model = net()
    algorithm = rigl(1, drop_fraction=0.3)
    model.apply(algorithm)
    x = torch.randn(1 << 12, 24, dtype=torch.float64)

    def held() -> int:
        gc.collect()
        return sum(each.numel() for each in gc.get_objects() if type(each) is torch.Tensor)

    model(x).sum().backward()
    model.zero_grad()
    before = held()
    for _ in range(50):
        model(x).sum().backward()
        model.zero_grad()
    grown = (held() - before) / x.numel()
    demand(grown < 5, f"{grown:.0f} copies of the input are held")
    return f"{max(grown, 0):.1f} copies of the input are held"
