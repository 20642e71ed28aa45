"""What goes wrong with replicas in several processes; run in each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparselab import SET, RigL, SparseLinear, average_over_ranks
from sparselab.dst import (
    DynamicSparsityAlgorithm,
    RandomGrowth,
    Replicas,
    random_free,
)
from sparselab.nn.follow.reducer import remake_reducer
from tests.dst.replica_runs import Case, step_once

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
        step_once(Case("set"), net or model, step, rank % 2, 2)
        if each is not None:
            each(optimizer, step)
        optimizer.step()
        algorithm.step()


def message(act: Callable[..., Any], *arguments: Any, **settings: Any) -> str:
    """The words in which something cannot be done."""
    try:
        act(*arguments, **settings)
    except RuntimeError as error:
        return str(error)
    return "no error"


def wrapped(rank: int, algorithm: Any, each: Any = None, steps: int = 9, **settings: Any) -> nn.Module:
    model = made(rank)
    net = DistributedDataParallel(model, **settings)
    algorithm.attach(net)
    train(rank, model, algorithm, steps, net, each)
    algorithm.detach()
    return model


def nobody_said(rank: int) -> str:
    algorithm = SET(**OFTEN)
    algorithm.attach(model := made())
    return message(train, rank, model, algorithm, 1)


def the_wrapper_is_gone(rank: int) -> str:
    algorithm = SET(**OFTEN)
    algorithm.attach(model := wrapped(rank, SET(**OFTEN), steps=1))
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

    def __init__(self, group: Any) -> None:
        super().__init__()
        self._rank = dist.get_rank(group)

    def choose(self, update: Any) -> Any:
        view = update.view
        rng = np.random.default_rng(self._rank) if view.index else view.rng()
        return random_free(rng, update.kept, view.size, update.n_grow)


class Strays(DynamicSparsityAlgorithm):
    def __init__(self, group: Any = None) -> None:
        super().__init__(update_freq=4, grow=Straying(group))


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


ERRORS = (
    nobody_said,
    the_wrapper_is_gone,
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


def faults(rank: int) -> dict[str, Any]:
    return {each.__name__: each(rank) for each in ERRORS}
