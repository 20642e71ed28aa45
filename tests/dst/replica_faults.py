"""What goes wrong with replicas in several processes, and other ways to hold them; run in each process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparselab import SET, MaskedLinear, RigL, SparseLinear, average_over_ranks
from sparselab.dst import (
    MEST,
    SNFS,
    DynamicSparsityAlgorithm,
    Group,
    RandomGrowth,
    Replicas,
    SRigL,
    random_free,
)
from sparselab.nn.follow.reducer import remake_reducer
from tests.dst.harness import sparse_layers
from tests.dst.replica_runs import Case, batch, replica, step_once

OFTEN = {"update_freq": 4, "drop_fraction": 0.3}


def made(seed: int = 0, **settings: Any) -> nn.Module:
    torch.manual_seed(seed)
    first = SparseLinear(20, 31, sparsity=0.8, dtype=torch.float64, **settings)
    second = SparseLinear(31, 10, sparsity=0.8, dtype=torch.float64)
    return nn.Sequential(first, nn.ReLU(), second, nn.Linear(10, 3, dtype=torch.float64))


def train(rank: int, model: Any, algorithm: Any, steps: int, net: Any = None, each: Any = None) -> None:
    """Some steps; `net` is what is called, and `each` what happens after the passes of a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        step_once(Case("set"), net or model, step, rank, 2)
        if each is not None:
            each(optimizer, step)
        optimizer.step()
        algorithm.step()


def message(act: Callable[..., Any], *arguments: Any) -> str:
    """What it says, as the first process of several, that something cannot be done."""
    try:
        act(*arguments)
    except RuntimeError as error:
        return str(error)
    return "no error"


def wrapped(rank: int, algorithm: Any, each: Any = None, steps: int = 9, **settings: Any) -> nn.Module:
    model = made(rank)
    net = DistributedDataParallel(model, **settings)
    algorithm.attach(net)
    train(rank, model, algorithm, steps, net, each)
    return model


def nobody_said(rank: int) -> str:
    algorithm = SET(**OFTEN)
    algorithm.attach(model := made())
    return message(train, rank, model, algorithm, 1)


def one_is_not_wrapped(rank: int) -> str:
    parts = nn.ModuleDict({"a": nn.Linear(2, 2), "b": made(), "c": made()})
    parts["b"] = DistributedDataParallel(parts["b"])
    algorithm = SET(**OFTEN)
    algorithm.attach(parts)
    return message(algorithm.advance)


def said_alone_but_wrapped(rank: int) -> str:
    model = made()
    net = DistributedDataParallel(model)
    algorithm = SET(**OFTEN)
    algorithm.attach(net, replicas=None)
    return message(train, rank, model, algorithm, 1, net)


def seeds_differ(rank: int) -> str:
    return message(wrapped, rank, SET(**OFTEN, seed=rank))


def steps_differ(rank: int) -> str:
    algorithm = SET(update_freq=1)

    def skip(_: Any, step: int) -> None:
        if rank and step == 3:
            algorithm._step += 1

    return message(wrapped, rank, algorithm, skip)


class Straying(RandomGrowth):
    """Draws what each process draws for itself, in the second layer."""

    def choose(self, update: Any) -> Any:
        view = update.view
        rng = np.random.default_rng(dist.get_rank()) if view.index else view.rng()
        return random_free(rng, update.kept, view.size, update.n_grow)


class Strays(DynamicSparsityAlgorithm):
    def __init__(self) -> None:
        super().__init__(update_freq=4, grow=Straying())


def a_part_strays(rank: int) -> str:
    return message(wrapped, rank, Strays())


def one_is_rewired(rank: int) -> str:
    algorithm = RigL(**OFTEN)

    def rewire(_: Any, step: int) -> None:
        if rank and step == 2:
            layer = algorithm.layers[0]
            free = np.setdiff1d(np.arange(620), layer.positions().numpy())[:1]
            layer.rewrite(torch.tensor([0]), torch.from_numpy(free))

    return message(wrapped, rank, algorithm, rewire)


def gradients_are_apart(rank: int) -> str:
    model, algorithm = made(rank), SET(**OFTEN)
    net = DistributedDataParallel(model)
    algorithm.attach(net)
    return message(train, rank, model, algorithm, 9)  # not what the wrapper puts out


def one_is_frozen(rank: int) -> str:
    model, algorithm = made(), SET(**OFTEN)
    algorithm.attach(model, replicas=Replicas(dist.group.WORLD))
    model[2].requires_grad_(rank == 0)
    return message(train, rank, model, algorithm, 4)


def uneven_inputs(rank: int) -> str:
    algorithm = SET(**OFTEN)

    def act() -> None:
        model = made()
        net = DistributedDataParallel(model)
        algorithm.attach(net)
        with net.join():
            train(rank, model, algorithm, 1, net)

    return message(act)


def shards_in_one_memory(rank: int) -> str:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns that torch.jit.script is deprecated

    model = made()
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, lr=0.01
    )
    return message(SET(**OFTEN).attach, model, optimizer)


def reducers_that_cannot_be_made(rank: int) -> list[str]:
    nets = [DistributedDataParallel(made()) for _ in range(3)]
    nets[0]._delay_all_reduce_params = [1]
    nets[1].module[0].weight_values._in_backward_optimizers = []
    nets[2]._ddp_init_helper = lambda: None
    return [message(remake_reducer, net) for net in nets]


def averages_of_other_connections(rank: int) -> list[str]:
    return [message(average_over_ranks, model) for model in (made(rank), made()[: 3 + rank])]


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


def in_a_group_of_their_own(rank: int) -> Any:
    """Replicas in a group that is not all there is, whose ranks have other numbers."""
    group = dist.new_group([1, 0])
    found = replica(rank, Case("rigl", ddp={"process_group": group}))
    return [each.tolist() for each in found["positions"]]


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
    """One that was put into ``.grad`` by hand in one process, and fan-ins where one has seen no gradient."""
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
    net = DistributedDataParallel(either, find_unused_parameters=True)
    rows = SRigL(update_freq=1)
    rows.attach(net)
    net(torch.ones(2, 20, dtype=torch.float64), rank).sum().backward()
    rows.advance()
    return skipped, [report.skipped for report in rows.last_update]


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


ERRORS = (
    nobody_said,
    one_is_not_wrapped,
    said_alone_but_wrapped,
    seeds_differ,
    steps_differ,
    a_part_strays,
    one_is_rewired,
    gradients_are_apart,
    one_is_frozen,
    uneven_inputs,
    shards_in_one_memory,
    reducers_that_cannot_be_made,
    averages_of_other_connections,
)
WAYS = (
    each_alone,
    in_a_group_of_their_own,
    kept_alike_by_hand,
    averaged_now_and_then,
    parts_of_the_model_each,
    not_finite_in_one,
    a_gradient_one_does_not_know,
    masks_are_shared,
)


def everything(rank: int) -> dict[str, Any]:
    return {each.__name__: each(rank) for each in (*ERRORS, *WAYS)}
