"""One process, or several that `torchrun` has started to train one model together."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import sparselab


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
        model.register_comm_hook(None, bf16_compress_hook)
        return None

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
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return Ranks(distributed.get_rank(), distributed.get_world_size(), restarts > 0)
