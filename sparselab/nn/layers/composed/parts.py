"""What modules that are made of linear layers do with each of them."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sparselab.nn.layers.extras import extras


def copy_parameter(parameter: Tensor | None) -> nn.Parameter | None:
    """A Parameter of its own; None of None."""
    if parameter is None:
        return None
    return nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def copy_linear(linear: nn.Linear) -> nn.Linear:
    """A plain linear layer with the same weights, in memory of its own."""
    new = nn.Linear(linear.in_features, linear.out_features, device="meta").train(linear.training)
    new.register_parameter("weight", copy_parameter(linear.weight))
    new.register_parameter("bias", copy_parameter(linear.bias))
    return new


def as_dense(layer: nn.Module) -> nn.Linear:
    """A part as a plain linear layer; TypeError if it is none, or would lose something."""
    if type(layer) in (nn.Linear, NonDynamicallyQuantizableLinear):
        if found := extras(layer, ("weight", "bias")):
            raise TypeError(f"to_dense must not lose what a projection has, got {' and '.join(found)}")
        return copy_linear(cast(nn.Linear, layer))
    make = getattr(layer, "to_dense", None)
    dense = None if make is None else make()
    if isinstance(dense, nn.Linear):
        return dense
    raise TypeError(f"projections must be linear layers to be packed, got {type(layer).__name__}")
