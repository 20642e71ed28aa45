"""The reducer of `DistributedDataParallel`, made again when numbers of connections have changed.

Torch makes it once, for the sizes that Parameters have then: buckets of that length, and hooks on the nodes
of autograd that accumulate their gradients. A Parameter that changes its size gets another node, and the
hooks of the old one are never called again. Torch then raises at the next forward pass but one; or, where it
looks for unused Parameters, it takes this one for unused and leaves each process with its own gradient, in
silence. So before a forward pass the sizes are looked at, and where one has changed, by whatever it was, the
reducer is made anew, as torch itself does where a copy of a wrapped model is read. No process waits for
another for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparselab.nn.ops.tracing import uncompiled
from sparselab.nn.storage.base import Storage

Sizes = list[tuple[int, int]]

#: The sparse layers of each wrapped model, and the sizes that its reducer was made for.
_made_for: weakref.WeakKeyDictionary[Any, tuple[list[Any], Sizes]] = weakref.WeakKeyDictionary()

#: What wraps the model that each of these layers is in.
_wrappers: weakref.WeakKeyDictionary[Any, weakref.ref[DistributedDataParallel]] = weakref.WeakKeyDictionary()


def keep_reducer(owner: DistributedDataParallel, layers: Sequence[Any]) -> None:
    """Let the reducer of a wrapped model follow the numbers of connections of its sparse layers.

    Parameters
    ----------
    owner : DistributedDataParallel
        Before its reducer is made.
    layers : sequence of sparse layers
    """
    _note(owner, layers)
    owner.register_forward_pre_hook(_follow_sizes)


def wrapper_of(layer: Any) -> DistributedDataParallel | None:
    """What wraps the model that a layer is in; None if nothing does."""
    reference = _wrappers.get(layer)
    return None if reference is None else reference()


def sparse_layers(module: nn.Module) -> dict[str, Any]:
    """The layers of a module that hold their weights in a `Storage`, by qualified names."""
    return {
        name: each
        for name, each in module.named_modules()
        if isinstance(getattr(each, "storage", None), Storage)
    }


def _note(owner: DistributedDataParallel, layers: Sequence[Any]) -> None:
    """Take note that a wrapped model has, or will have, a reducer for its layers as they are."""
    _made_for[owner] = list(layers), _sizes(layers)
    for layer in layers:
        _wrappers[layer] = weakref.ref(owner)


@uncompiled
def _follow_sizes(owner: DistributedDataParallel, _: Any) -> None:
    """Before a forward pass whose gradients are reduced: make the reducer again if it is of other sizes."""
    if not owner.require_backward_grad_sync:
        return
    if owner not in _made_for:  # a copy, whose reducer was made with it
        _note(owner, list(sparse_layers(owner.module).values()))
    layers, sizes = _made_for[owner]
    now = _sizes(layers)
    if now != sizes:
        remake_reducer(owner)
        _made_for[owner] = layers, now


def _sizes(layers: Sequence[Any]) -> Sizes:
    """Which Parameter each layer has, and how many numbers it holds."""
    held = (layer._parameters.get(layer.storage.parameter) for layer in layers)
    return [(id(each), 0 if each is None else each.numel()) for each in held]


def remake_reducer(owner: DistributedDataParallel) -> None:
    """Make the reducer of a wrapped model for the Parameters as they are; communication hooks stay.

    Parameters
    ----------
    owner : DistributedDataParallel
        With no backward pass under way.

    Raises
    ------
    RuntimeError
        If it reduces gradients in a way that cannot be made again (mixed precision of its own, Parameters
        whose reduction is delayed, optimizers within the backward pass), or this version of torch has no such
        way.
    """
    if why := _unable(owner):
        raise RuntimeError(
            f"a DistributedDataParallel model whose layers change their numbers of connections must reduce "
            f"gradients in the usual way, got one with {why}. Leave that out (torch.autocast computes in "
            f"bfloat16), or choose an algorithm that keeps the numbers (SET, RigL, ...)"
        )
    ddp: Any = owner
    torch_distributed: Any = dist
    try:
        name = ddp._get_ddp_logging_data().get("comm_hook", "")
        ddp.reducer._remove_autograd_hooks()
        parameters, of_sparse_gradient = ddp._build_params_for_reducer()
        names = ddp._build_debug_param_to_name_mapping(parameters)
        ddp._ddp_init_helper(parameters, of_sparse_gradient, names, ddp.static_graph)
        ddp._has_rebuilt_buckets = False
        if ddp.static_graph:
            ddp._static_graph_delay_allreduce_enqueued = False
            ddp.reducer._set_static_graph()
            ddp.logger._set_static_graph()
        for hook, state in ddp._comm_hooks:
            ddp.logger._set_comm_hook_name(hook.__qualname__)
            torch_distributed._register_comm_hook(ddp.reducer, state, hook)
        if name.startswith("BuiltinCommHookType.") and not ddp._comm_hooks:
            kind = getattr(torch_distributed.BuiltinCommHookType, name.partition(".")[2])
            ddp._register_builtin_comm_hook(kind)
    except (AttributeError, TypeError) as error:
        raise RuntimeError(
            "this version of torch has no known way to make the reducer of DistributedDataParallel anew, as "
            "other numbers of connections need. Choose an algorithm that keeps the numbers (SET, RigL, ...), "
            "or a version of torch from 2.6 to 2.13"
        ) from error


def _unable(owner: Any) -> str:
    """What of a wrapped model cannot be made again; empty if nothing."""
    if getattr(owner, "mixed_precision", None) is not None:
        return "mixed_precision"
    if getattr(owner, "_delay_all_reduce_params", ()):
        return "delay_all_reduce_named_params"
    if any(hasattr(each, "_in_backward_optimizers") for each in owner.module.parameters()):
        return "optimizers that step within the backward pass"
    return ""
