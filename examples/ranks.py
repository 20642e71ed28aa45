"""One process, or several that `torchrun` has started to train one model together."""

from __future__ import annotations

import os
import time
import uuid
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import sparselab

#: Seconds that a process waits for an answer before it asks again.
ANSWER_S = 2


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many, and whether `torchrun` has started them again."""

    rank: int = 0
    world: int = 1
    again: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the one that evaluates, prints and writes."""
        return self.rank == 0

    def share(self, model: nn.Module) -> nn.Module:
        """The model, with gradients that are averaged over all processes."""
        return model if self.world == 1 else DistributedDataParallel(model)

    def compress(self, model: nn.Module, how: str, top_k: float) -> sparselab.TopKCompression | None:
        """Send gradients of a shared model "whole", in "bfloat16", or their largest entries ("top-k").

        What must be saved with the model is returned.
        """
        if not isinstance(model, DistributedDataParallel) or how == "whole":
            return None
        if how == "top-k":
            return sparselab.TopKCompression(model, top_k)
        model.register_comm_hook(None, in_bfloat16)
        return None

    def backward(self, model: nn.Module, is_last: bool) -> AbstractContextManager[None]:
        """For one backward pass of several: gradients are averaged after the last."""
        return model.no_sync() if self.world > 1 and not is_last else nullcontext()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            distributed.barrier()

    def agreed(self, value: Any) -> Any:
        """What the first process says."""
        said = [value]
        if self.world > 1:
            distributed.broadcast_object_list(said, 0)
        return said[0]

    def means(self, numbers: list[float]) -> list[float]:
        """Of as many numbers in every process."""
        if self.world == 1 or not numbers:
            return numbers
        sums = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(sums)
        return (sums / self.world).tolist()


def in_bfloat16(state, bucket):  # without annotations, which torch compares with its own
    """Torch's hook by another name: by its own, torch wants a GPU for it."""
    return bf16_compress_hook(state, bucket)


def join_ranks() -> Ranks:
    """Meet the other processes, if there are any."""
    if "RANK" not in os.environ:
        return Ranks()
    store, rank, world = next(distributed.rendezvous("env://"))
    distributed.init_process_group("gloo", store=of_these(store, rank, world), rank=rank, world_size=world)
    restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    distributed.all_reduce(restarts, distributed.ReduceOp.MAX)  # one of them may run where all began anew
    return Ranks(rank, world, restarts.item() > 0)


def of_these(store: distributed.Store, rank: int, world: int) -> distributed.Store:
    """A part of a store that only the processes have that are here now.

    `torchrun` keeps its store from one start to the next, with the addresses of processes that are gone,
    which new ones would try to reach. So the first names a part by a number that it draws, and answers each
    of the others by the number that this one has drawn; an answer to another number is an old one.
    """
    ours = uuid.uuid4().hex
    if rank == 0:
        store.set("first", ours)
        for other in range(1, world):
            store.set(f"{ours}/answer to {other}", store.get(f"{ours}/{other}"))
        return distributed.PrefixStore(ours, store)
    deadline = time.monotonic() + distributed.default_pg_timeout.total_seconds()
    while time.monotonic() < deadline:
        first = store.get("first").decode()
        store.set(f"{first}/{rank}", ours)
        try:
            store.wait([answer := f"{first}/answer to {rank}"], timedelta(seconds=ANSWER_S))
        except distributed.DistStoreError:
            continue
        if store.get(answer).decode() == ours:
            return distributed.PrefixStore(first, store)
        time.sleep(0.05)
    raise TimeoutError("the first process of this start did not answer")
