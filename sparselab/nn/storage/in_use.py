"""The weights that a forward mask leaves in use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def without_unused(values: Tensor, mask: Tensor) -> Tensor:
    """Weights with 0 where a mask is False; the gradient of all of them is that of the result.

    Parameters
    ----------
    values : Tensor
    mask : bool tensor of the same shape
    """
    # The compiler takes no function with a forward mode.
    function = _Used if torch.compiler.is_compiling() else _UsedInAnyMode
    used: Tensor = function.apply(values, mask)  # type: ignore[no-untyped-call]
    return used


class _Used(torch.autograd.Function):
    """Weights with 0 where a mask is False; the gradient of all of them is that of the result."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, values.detach(), 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _UsedInAnyMode(_Used):
    """The same with a forward mode."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        # The transpose of `backward`, so that both modes tell the same derivative.
        tangent: Tensor = tangents[0]
        return tangent.view_as(tangent)
