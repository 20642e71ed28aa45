"""`torch.nn.parallel.DistributedDataParallel`: all replicas have the connections of the first.

Torch sends parameters and buffers to all processes when it wraps a model, and buffers again before each
forward pass. The columns of layers are of a dtype that gloo cannot send, and must be the same everywhere, as
gradients are summed slot by slot. So they are made the same once, when the model is wrapped, and left out of
what torch sends.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from sparselab.nn.follow.replaced import take_connections
from sparselab.nn.ops.tracing import uncompiled
from sparselab.nn.storage.base import Storage


@uncompiled
def _wrapped(owner: nn.Module, name: str, module: nn.Module | None) -> None:
    """Torch's hook for a module that becomes part of another one."""
    if name != "module" or module is None or not isinstance(owner, DistributedDataParallel):
        return
    layers = {
        name: each
        for name, each in module.named_modules()
        if isinstance(getattr(each, "storage", None), Storage)
    }
    if not layers:
        return
    share_connections(list(layers.values()), owner.process_group)
    ignored: Any = owner.parameters_to_ignore
    ignored.update(
        f"{name}.{buffer}" if name else buffer
        for name, layer in layers.items()
        for buffer in layer.storage.pattern
    )


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
        count = torch.tensor([len(positions)], device=device)
        dist.broadcast(count, source, group)
        theirs = positions.clone() if len(positions) == count else positions.new_empty(int(count))
        dist.broadcast(theirs, source, group)
        take_connections(layer, theirs)


def refuse_shards(layer: nn.Module) -> NoReturn:
    """Raise TypeError: ``fully_shard`` and ``FullyShardedDataParallel`` would give processes parts of W."""
    raise TypeError(
        "fully_shard and FullyShardedDataParallel must be given modules without sparse layers, whose weights "
        f"cannot be cut into shards, got a {type(layer).__name__}; wrap the model in DistributedDataParallel"
    )


register_module_module_registration_hook(_wrapped)
