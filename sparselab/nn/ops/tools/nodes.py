"""Inputs that stand for tensors while `torch.fx` draws a graph."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy


def is_node(input: Any) -> bool:
    """Whether the input is such a one."""
    return type(input) is Proxy


def node_of(layer: nn.Module, input: Any, *args: Any, **kwargs: Any) -> Any:
    """A call of the layer as one node of the graph, as `torch.fx` draws those of torch's own layers.

    Raises
    ------
    TypeError
        If it is the layer itself that is traced.
    """
    tracer: Any = input.tracer
    if layer is tracer.root:
        raise TypeError(
            f"torch.fx must be given a model that contains the layer, got a {type(layer).__name__} itself, "
            "which is one node; write nn.Sequential(layer)"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input, *args), kwargs)
