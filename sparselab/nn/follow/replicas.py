"""Replicas of a layer in several processes: who holds them, and that all have the same connections.

Torch sends parameters and buffers to all processes when `torch.nn.parallel.DistributedDataParallel` wraps
a model, and buffers again before each forward pass. The columns of layers are of a dtype that gloo cannot
send, and must be the same everywhere, as gradients are summed slot by slot. So they are made the same once,
when the model is wrapped, and left out of what torch sends.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from sparselab.kernels.arrays import Array
from sparselab.nn.follow.checksums import of_connections, of_tensor
from sparselab.nn.follow.reducer import keep_reducer, sparse_layers, wrapper_of
from sparselab.nn.follow.replaced import take_connections
from sparselab.nn.ops.tracing import uncompiled

#: The processes that were said to hold replicas of a layer.
_declared: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


@uncompiled
def _wrapped(owner: nn.Module, name: str, module: nn.Module | None) -> None:
    """Torch's hook for a module that becomes part of another one."""
    if name != "module" or module is None or not isinstance(owner, DistributedDataParallel):
        return
    if not (layers := sparse_layers(module)):
        return
    share_connections(list(layers.values()), owner.process_group)
    ignored: Any = owner.parameters_to_ignore
    ignored.update(
        f"{name}.{buffer}" if name else buffer
        for name, layer in layers.items()
        for buffer in (*layer.storage.pattern, "forward_mask")
    )
    keep_reducer(owner, list(layers.values()))


def share_connections(layers: list[Any], group: Any = None) -> None:
    """Give layers the connections that they have in the first process of a group; weights go by position.

    Parameters
    ----------
    layers : list of sparse layers
        The same in every process.
    group : torch.distributed.ProcessGroup, optional
    """
    source, device = dist.get_global_rank(group, 0), layers[0].stored.device
    for layer in layers:
        positions = layer.positions().to(device)
        told = torch.tensor([len(positions), layer.forward_mask is not None], device=device)
        dist.broadcast(told, source, group)
        count, is_masked = told.tolist()
        theirs = positions.clone() if len(positions) == count else positions.new_empty(count)
        dist.broadcast(theirs, source, group)
        take_connections(layer, theirs)
        mask = torch.ones_like(layer.stored, dtype=torch.uint8)
        if is_masked:
            if layer.forward_mask is not None:
                mask.copy_(layer.forward_mask)
            dist.broadcast(mask, source, group)
        layer.forward_mask = mask.bool() if is_masked else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that a `DistributedDataParallel` wraps, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def declare_replicas(layers: Iterable[Any], group: Any) -> None:
    """Say which processes hold replicas of layers that nothing wraps; None takes it back."""
    for layer in layers:
        if group is None:
            _declared.pop(layer, None)
        else:
            _declared[layer] = group


def group_of_replicas(layer: Any) -> Any:
    """The processes that hold replicas of a layer, as far as anybody said; None if nobody did."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    wrapper = wrapper_of(layer)
    return _declared.get(layer) if wrapper is None else wrapper.process_group


def is_replicated(layer: Any) -> bool:
    """Whether other processes hold replicas of a layer."""
    group = group_of_replicas(layer)
    return group is not None and dist.get_world_size(group) > 1


def gather_numbers(numbers: Sequence[int] | Array, group: Any) -> Array:
    """int64 (processes, n): as many numbers of every process, in the order of the group."""
    ours = torch.as_tensor(np.asarray(numbers, np.int64))
    theirs = [torch.empty_like(ours) for _ in range(dist.get_world_size(group))]
    dist.all_gather(theirs, ours, group)
    return torch.stack(theirs).numpy()


def require_same_connections(layers: Mapping[str, Any], group: Any, when: str, hint: str = "") -> None:
    """Compare the connections of layers, in use or not, over processes; every process must call it.

    Parameters
    ----------
    layers : mapping of str to sparse layer
    group : torch.distributed.ProcessGroup
    when, hint : str
        Parts of the error.

    Raises
    ------
    RuntimeError
        In all processes, if those of one differ from those of the first.

    Notes
    -----
    Two numbers are sent by each process, and one more for each layer if they differ.
    """
    found = [_checksum(layer) for layer in layers.values()]
    whole = gather_numbers([len(found), of_tensor(torch.tensor(found))], group)
    if (whole == whole[0]).all():
        return
    if (whole[:, 0] != whole[0, 0]).any():
        counts = whole[:, 0].tolist()
        raise RuntimeError(f"all processes must have as many sparse layers {when}, got {counts}")
    table = gather_numbers(found, group)
    differ = {
        name: named_ranks(np.flatnonzero(column != column[0]), group)
        for name, column in zip(layers, table.T, strict=True)
        if (column != column[0]).any()
    }
    what = "; ".join(f"layer {name!r} differs in {ranks}" for name, ranks in differ.items())
    raise RuntimeError(
        f"all processes must have the connections of the first {when}, but {what}. Nothing that is summed "
        f"slot by slot is right from here on, so all of them stop{hint}"
    )


def _checksum(layer: Any) -> int:
    """Of the connections, and of which are in use."""
    found = of_connections(layer) or 0
    return found if layer.forward_mask is None else of_tensor(layer.forward_mask, found)


def named_ranks(ranks: Iterable[Any], group: Any) -> str:
    """Some processes of a group, by their number among all."""
    numbers = [dist.get_global_rank(group, int(rank)) for rank in ranks]
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def refuse_shards(layer: nn.Module) -> NoReturn:
    """Raise TypeError: ``fully_shard`` and ``FullyShardedDataParallel`` would give processes parts of W."""
    raise TypeError(
        "fully_shard and FullyShardedDataParallel must be given modules without sparse layers, whose weights "
        f"cannot be cut into shards, got a {type(layer).__name__}; wrap the model in DistributedDataParallel"
    )


register_module_module_registration_hook(_wrapped)
