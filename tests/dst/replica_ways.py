"""Ways to hold replicas, or none, in several processes; run in each of them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from sparselab import SET, MaskedLinear, RigL, SparseLinear, average_over_ranks
from sparselab.dst import (
    GMP,
    MEST,
    SNFS,
    Group,
    PolynomialSchedule,
    Replicas,
    SRigL,
)
from tests.dst.harness import sparse_layers
from tests.dst.replica_faults import OFTEN, Strays, faults, made, message, train, wrapped
from tests.dst.replica_runs import Case, batch, replica, step_once


def each_alone(rank: int) -> Any:
    """Two ways for processes that have nothing to do with each other: found as one process finds it."""
    case = Case("set")
    own = [dist.new_group([number]) for number in range(2)][rank]
    model, algorithm = case.model(rank), case.algorithm()
    algorithm.attach(model, replicas=None)
    other, its = case.model(rank), case.algorithm()
    net = DistributedDataParallel(other, process_group=own)
    its.attach(net)
    for each, called, rewires in ((model, model, algorithm), (other, net, its)):
        optimizer = case.optimize(each, sharded=False)
        for step in range(1, 31):
            optimizer.zero_grad()
            step_once(case, called, step)
            optimizer.step()
            rewires.step()
    return [[layer.positions().tolist() for layer in sparse_layers(each)] for each in (model, other)]


def in_groups_of_their_own(rank: int) -> dict[str, Any]:
    """Two pairs among four processes, whose ranks in a pair have other numbers than among all."""
    pair = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])][rank % 2]
    settings = {"growth": "candidates"}
    return {
        "exact": replica(rank, Case("granet", ddp={"process_group": pair})),
        "candidates": replica(rank, Case("rigl", "conv", ddp={"process_group": pair}, replicas=settings)),
        "stray": [message(wrapped, rank, Strays(pair), None, 9, process_group=pair)],
    }


def kept_alike_by_hand(rank: int) -> Any:
    """No wrapper: gradients are averaged by whoever trains, whichever process group he has."""

    def average(optimizer: Any, _: int) -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2

    algorithm = Group({"0": RigL(**OFTEN), "2": SNFS(**OFTEN)})
    algorithm.attach(model := made(), replicas=Replicas(dist.group.WORLD))
    train(rank, model, algorithm, 17, each=average)
    twin, its = made(), Group({"0": RigL(**OFTEN), "2": SNFS(**OFTEN)})
    its.attach(twin, replicas=None)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    for step in range(1, 18):
        optimizer.zero_grad()
        step_once(Case("set"), twin, step)
        optimizer.step()
        its.step()
    return [[layer.positions().tolist() for layer in sparse_layers(each)] for each in (model, twin)]


def averaged_now_and_then(rank: int) -> Any:
    """Local SGD: two steps alone, then an average, then maybe an update; what each has in the end."""
    found = []
    mest = MEST(0.8, delta=0.05, soft_bound=False, lam=0.5, update_freq=4)
    for algorithm in (RigL(**OFTEN), SET(**OFTEN), SNFS(**OFTEN), mest):
        model = made()
        algorithm.attach(model, replicas=Replicas(dist.group.WORLD))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        apart = []
        for step in range(1, 17):
            optimizer.zero_grad()
            step_once(Case("set"), model, step, rank, 2)
            optimizer.step()
            if step % 2 == 0:
                apart.append(model[0].weight_values.detach().clone())
                average_over_ranks(model, optimizer)
                dist.all_reduce(apart[-1])
                torch.testing.assert_close(model[0].weight_values.detach(), apart[-1] / 2)
            algorithm.step()
        moments = optimizer.state[model[0].weight_values]["momentum_buffer"]
        found.append([*(layer.positions().tolist() for layer in sparse_layers(model)), moments.tolist()])
        assert all(not report.skipped and report.grown for report in algorithm.last_update)
    return found


class Either(nn.Module):
    """The first process uses one way in odd steps only, the second one in even ones only."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ways = nn.ModuleList(make(20, 12, sparsity=0.6, dtype=torch.float64) for _ in range(2))
        self.last = make(12, 3, sparsity=0.6, dtype=torch.float64)

    def forward(self, x: torch.Tensor, way: int) -> torch.Tensor:
        return self.last(self.ways[way](x).relu())


def parts_of_the_model_each(rank: int) -> Any:
    """What a process has not used counts as a gradient of 0."""
    found = []
    for make in (
        lambda: RigL(update_freq=4),
        lambda: SNFS(update_freq=4),
        lambda: RigL(update_freq=4, scope="row"),
    ):
        model, twin = Either(SparseLinear), Either(SparseLinear)
        net = DistributedDataParallel(model, find_unused_parameters=True)
        algorithm, its = make(), make()
        algorithm.attach(net)
        its.attach(twin, replicas=None)
        optimizers = [torch.optim.SGD(each.parameters(), lr=0.05, momentum=0.9) for each in (model, twin)]
        for step in range(1, 18):
            for optimizer in optimizers:
                optimizer.zero_grad()
            x, y = batch(step, 16)
            losses = []
            for number in range(2):
                part = slice(8 * number, 8 * number + 8)
                way = (step + number) % 2 if step % 4 else 0
                losses.append(nn.functional.cross_entropy(twin(x[part], way), y[part]) / 2)
                if number == rank:
                    nn.functional.cross_entropy(net(x[part], way), y[part]).backward()
            sum(losses).backward()
            for optimizer, each in zip(optimizers, (algorithm, its), strict=True):
                optimizer.step()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # one way has had no gradient
                    each.step()
        positions = [[layer.positions().tolist() for layer in sparse_layers(each)] for each in (model, twin)]
        skipped = [[report.skipped for report in each.last_update] for each in (algorithm, its)]
        found.append((positions, skipped))
    return found


def not_finite_in_one(rank: int) -> list[list[str]]:
    """A gradient that overflows in one process leaves the layer alone in all."""
    found = []
    for growth, tokens in (("exact", 4), ("exact", 64), ("candidates", 4)):
        model = made()
        net = DistributedDataParallel(model)
        algorithm = RigL(update_freq=2)
        algorithm.attach(net, replicas=Replicas(growth=growth))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.full((tokens, 20), torch.inf if rank else 1.0, dtype=torch.float64)).sum().backward()
            optimizer.step()
            algorithm.step()
        found.append([report.skipped for report in algorithm.last_update])
    return found


def a_gradient_one_does_not_know(rank: int) -> Any:
    """One that was put into ``.grad`` by hand in one process, and fan-ins where one has seen no gradient.

    And none that any process has seen.
    """
    model = made()
    net = DistributedDataParallel(model)
    algorithm = RigL(update_freq=1)
    algorithm.attach(net)
    if rank:
        model[0].weight_values.grad = torch.ones_like(model[0].weight_values)
    net(torch.ones(2, 20, dtype=torch.float64)).sum().backward()
    algorithm.advance()
    skipped = [report.skipped for report in algorithm.last_update]

    from sparselab.nn import constant_fan_in_

    either = constant_fan_in_(Either(SparseLinear))
    other = DistributedDataParallel(either, find_unused_parameters=True)
    rows = SRigL(update_freq=1)
    rows.attach(other)
    other(torch.ones(2, 20, dtype=torch.float64), rank).sum().backward()
    rows.advance()
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing was rewired
            algorithm.advance()
    nothing = [report.skipped for report in algorithm.last_update]
    return skipped, [report.skipped for report in rows.last_update], nothing


def all_are_frozen(rank: int) -> list[str]:
    """Nothing is rewired, and nothing waits."""
    model, algorithm = made().requires_grad_(False), SNFS(update_freq=1)
    algorithm.attach(model, replicas=Replicas(dist.group.WORLD))
    algorithm.step()
    return [report.skipped for report in algorithm.last_update]


def masks_are_shared(rank: int) -> Any:
    """What is in use is that of the first process, too, and is not sent again."""
    layers = [SparseLinear(20, 31, sparsity=0.8), MaskedLinear(31, 10, sparsity=0.8)]
    if rank == 0:
        layers[0].forward_mask = torch.ones_like(layers[0].weight_values, dtype=torch.bool)
        layers[0].forward_mask[3] = False
    else:
        layers[1].forward_mask = torch.zeros_like(layers[1].weight, dtype=torch.bool)
    net = DistributedDataParallel(nn.Sequential(*layers))
    sent = [name for name, _ in net.module.named_buffers() if name not in net.parameters_to_ignore]
    return int(layers[0].forward_mask.sum()), layers[1].forward_mask, layers[0].nnz, sent


def copies_go_on(rank: int) -> Any:
    """A copy of the wrapped model, its optimizer and its algorithm, whose numbers of connections change."""
    model = made(rank)
    net = DistributedDataParallel(model)
    algorithm = GMP(PolynomialSchedule(0.8, 0.95, 12), update_freq=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    algorithm.attach(net)
    runs, found = [(net, optimizer, algorithm)], []
    for step in range(1, 15):
        if step == 7:
            runs.append(copy.deepcopy(runs[0]))
        for called, steps, rewires in runs:
            steps.zero_grad()
            step_once(Case("set"), called, step, rank, 2)
            steps.step()
            rewires.step()
    for called, *_ in runs:
        found.append([layer.weight_values.flatten().tolist() for layer in sparse_layers(called)])
    return found


def hooks_stay(rank: int) -> list[str]:
    """Communication hooks of torch and of Python, after the reducer was made again."""
    found = []
    for builtin in (False, True):
        model = made()
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)
        if builtin:
            net._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
        else:
            net.register_comm_hook(None, fp16_compress_hook)
        for count in (0, 3):
            model[0].rewrite(torch.arange(count), torch.empty(0, dtype=torch.int64))
            net(torch.randn(4, 20, dtype=torch.float64)).square().sum().backward()
        gradient = model[0].weight_values.grad
        assert torch.equal(gradient, gradient.half().double())
        found.append(net._get_ddp_logging_data()["comm_hook"])
    return found


WAYS = (
    each_alone,
    kept_alike_by_hand,
    averaged_now_and_then,
    parts_of_the_model_each,
    not_finite_in_one,
    a_gradient_one_does_not_know,
    all_are_frozen,
    masks_are_shared,
    copies_go_on,
    hooks_stay,
)


def everything(rank: int) -> dict[str, Any]:
    return {**faults(rank), **{each.__name__: each(rank) for each in WAYS}}
