"""One process, or several that `torchrun` has started to train one model together."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """Which process this is, and of how many."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that evaluates, prints and writes."""
        return self.rank == 0

    def share(self, model: nn.Module) -> nn.Module:
        """The model, with gradients that are averaged over all processes."""
        return model if self.world == 1 else DistributedDataParallel(model)

    def backward(self, model: nn.Module, is_last: bool) -> AbstractContextManager[None]:
        """For one backward pass of several: gradients are averaged after the last."""
        return model.no_sync() if self.world > 1 and not is_last else nullcontext()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            distributed.barrier()


def join_ranks() -> Ranks:
    """Meet the other processes, if there are any."""
    if "RANK" not in os.environ:
        return Ranks()
    distributed.init_process_group("gloo")
    return Ranks(distributed.get_rank(), distributed.get_world_size())
