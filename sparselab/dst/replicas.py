"""Several processes that hold replicas of a model: who they are, and what an update exchanges with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

from sparselab.dst.checks import require_finite
from sparselab.kernels.arrays import Array
from sparselab.nn.follow.reducer import wrapper_of
from sparselab.nn.follow.replicas import declare_replicas, gather_numbers, named_ranks
from sparselab.nn.layers.base import SparseLayer

GrowthExchange = Literal["exact", "candidates"]


@dataclass(frozen=True)
class Replicas:
    """How processes that hold replicas of a model rewire all of them alike; an argument of `attach`.

    Parameters
    ----------
    process_group : torch.distributed.ProcessGroup, optional
        The processes. By default those of the ``DistributedDataParallel`` that wraps the model, before the
        first step or after. Where nothing wraps it, give the group whose processes you keep alike yourself:
        weights, gradients (if the algorithm ranks by them) and optimizer state must be the same in all of
        them when the algorithm steps; see `sparselab.average_over_ranks`.
    growth : {"exact", "candidates"}
        How growth by gradient looks at the gradient of all processes together, their mean. "exact": the
        largest entries of the mean, as one process with all of the batch would find them; the dense gradient
        of a layer is sent once for each update, in blocks, or what it is made of where that is less.
        "candidates": each process proposes its own largest, and only these are compared by their means, where
        that sends less. What is large in the mean but nowhere among the first is missed.
    candidates : float
        How many times what a layer may grow each process proposes; at least 1.

    Raises
    ------
    TypeError, ValueError
        If `growth` or `candidates` are none of these.

    Notes
    -----
    With D entries of a dense gradient, n connections, R processes and k positions to grow, each process sends
    about ``2 (R - 1) / R`` times D numbers for a layer by blocks, and ``n + 2 c k R`` numbers by candidates,
    once for each update. Averages over steps (`SNFS`) are always sent whole, samples (`GSE`) as they are.

    Examples
    --------
    >>> from sparselab.dst import Replicas
    >>> Replicas(growth="candidates", candidates=3)
    Replicas(process_group=None, growth='candidates', candidates=3)
    """

    process_group: Any = None
    growth: GrowthExchange = "exact"
    candidates: float = 2

    def __post_init__(self) -> None:
        if self.growth not in get_args(GrowthExchange):
            raise ValueError(f"growth must be one of {get_args(GrowthExchange)}, got {self.growth!r}")
        require_finite("candidates", self.candidates)
        if self.candidates < 1:
            raise ValueError(f"candidates must be at least 1, got {self.candidates!r}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        """Itself: the processes cannot be copied."""
        return self


#: Those that the wrapper of a model says.
ALL_REPLICAS = Replicas()


class Ranks:
    """The processes of an update, of which this is one: what all of them call in the same order.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
    replicas : Replicas

    Attributes
    ----------
    group : torch.distributed.ProcessGroup
    size, rank : int
        How many they are, and which of them this is.
    replicas : Replicas
    """

    def __init__(self, group: Any, replicas: Replicas) -> None:
        self.group, self.replicas = group, replicas
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def numbers(self, numbers: Sequence[int] | Array) -> Array:
        """int64 (size, n): as many numbers of each."""
        return gather_numbers(numbers, self.group)

    def lists(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        """The numbers (n,) of each, which may be more or fewer."""
        lengths = self.numbers([len(numbers)])[:, 0].tolist()
        if not any(lengths):  # gloo sends no empty tensors
            return [numbers] * self.size
        padded = numbers.new_zeros(max(lengths))
        padded[: len(numbers)] = numbers
        theirs = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(theirs, padded, self.group)
        return [each[:n] for each, n in zip(theirs, lengths, strict=True)]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all of them, in place; the same bits in each."""
        if tensor.numel():
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def mean_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over all of them, in place; the same bits in each."""
        return self.sum_(tensor).div_(self.size)

    def to_one(self, tensor: torch.Tensor, root: int) -> list[torch.Tensor]:
        """What each has, at number `root`; nothing in the others. Shapes must be the same."""
        found = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == root else []
        dist.gather(tensor.contiguous(), found or None, self._global(root), self.group)
        return found

    def from_one(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        """What number `root` has, in place."""
        if tensor.numel():
            dist.broadcast(tensor, self._global(root), self.group)
        return tensor

    def named(self, ranks: Array) -> str:
        """Some of them in words."""
        return named_ranks(ranks, self.group)

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)


def find_ranks(name: str, layers: Sequence[SparseLayer], replicas: Replicas | None) -> Ranks | None:
    """The processes that must rewire some layers alike; None if this one is alone.

    Parameters
    ----------
    name : str
        Of the algorithm.
    layers : sequence of layers
        All that it has.
    replicas : Replicas or None
        What it was told; None means alone.

    Raises
    ------
    RuntimeError
        If there are several processes and nobody said whether they hold replicas, or what was said does not
        agree with what wraps the layers.
    """
    if not (dist.is_available() and dist.is_initialized()) or not layers:
        return None
    wrappers = [wrapper_of(layer) for layer in layers]
    groups = [None if each is None else each.process_group for each in wrappers]
    told = None if replicas is None else replicas.process_group
    if told is not None and groups.count(None) == len(groups):
        declare_replicas(layers, told)
        groups = [told] * len(layers)
    if any(group is not groups[0] for group in groups) or (told is not None and told is not groups[0]):
        n_groups = len(set(map(id, groups)) - {id(None)})
        raise RuntimeError(
            f"the layers of a {name} must all be wrapped in DistributedDataParallel of one process group, "
            f"that of Replicas if it names one; got {len(groups) - groups.count(None)} of {len(groups)} "
            f"layers wrapped, and {n_groups} group{'s' * (n_groups != 1)}"
        )
    if groups[0] is None:
        if replicas is not None and (world := dist.get_world_size()) > 1:
            raise RuntimeError(_unclear(name, world))
        return None
    if (size := dist.get_world_size(groups[0])) < 1:
        raise RuntimeError(f"process_group of {name} must hold this process, which is not among its ranks")
    if size == 1:
        return None
    if replicas is None:
        raise RuntimeError(
            f"the layers of a {name} must not be wrapped in DistributedDataParallel where replicas=None says "
            f"that each process trains a model of its own, got a wrapper of {size} processes"
        )
    if any(getattr(getattr(each, "_join_config", None), "enable", False) for each in wrappers):
        raise RuntimeError(
            f"a {name} must be stepped in all processes alike, which it cannot be within join(), where some "
            f"have no more inputs; let all have equally many batches (DistributedSampler does)"
        )
    return Ranks(groups[0], replicas)


def _unclear(name: str, world: int) -> str:
    return (
        f"a {name} that steps in a world of {world} processes must know whether they hold replicas of its "
        f"layers, got none that DistributedDataParallel wraps: each process would rewire its own by itself. "
        f"Wrap the model; or, where each process trains a model of its own (trials of a search), "
        f"attach(model, replicas=None); or, where you keep the replicas alike yourself, attach(model, "
        f"replicas=Replicas(process_group))"
    )


def n_proposed(k: int, replicas: Replicas) -> int:
    """How many candidates a process proposes for `k` positions."""
    return math.ceil(k * replicas.candidates)
