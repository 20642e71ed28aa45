"""What optimizers hold, and hooks on those of the process that live as long as the object they serve."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

# Hooks whose owner is gone. The garbage collector may take an owner while torch walks over its hooks, and
# removing one there would be an error in the middle of an optimizer step; so it waits.
_retired_hooks: list[RemovableHandle] = []


def held_ids(optimizer: torch.optim.Optimizer) -> set[int]:
    """The `id` of every Parameter that an optimizer has."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def shard_of(optimizer: Any) -> torch.optim.Optimizer | None:
    """What steps the Parameters of this process, and has their state, in a ``ZeroRedundancyOptimizer``.

    None for other optimizers.
    """
    inner = getattr(optimizer, "optim", None)
    is_sharded = hasattr(optimizer, "consolidate_state_dict")
    return inner if is_sharded and isinstance(inner, torch.optim.Optimizer) else None


def require_shards_apart(optimizer: Any) -> None:
    """Raise RuntimeError if a ``ZeroRedundancyOptimizer`` could not follow Parameters of other sizes."""
    for setting in ("parameters_as_bucket_view", "_overlap_with_ddp"):
        if hasattr(optimizer, "consolidate_state_dict") and getattr(optimizer, setting, False):
            raise RuntimeError(
                f"a {type(optimizer).__name__} of layers that are rewired must not be made with "
                f"{setting.removeprefix('_')}=True, which binds Parameters to places in one memory that they "
                f"leave when their sizes change; leave it out"
            )


def call_while_alive(owner: object, method: str, register: Callable[..., RemovableHandle]) -> None:
    """Call a method with every optimizer of the process that steps, for as long as its owner lives.

    Parameters
    ----------
    owner : object
        Held weakly.
    method : str
        Takes the optimizer.
    register : callable
        ``register_optimizer_step_pre_hook`` or ``register_optimizer_step_post_hook`` of torch.
    """
    while _retired_hooks:
        _retired_hooks.pop().remove()
    reference = weakref.ref(owner)

    def call(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if (alive := reference()) is not None:
            getattr(alive, method)(optimizer)

    weakref.finalize(owner, _retired_hooks.append, register(call))
