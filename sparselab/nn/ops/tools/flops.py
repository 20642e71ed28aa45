"""What torch's `FlopCounterMode` counts of sparse products: two operations for each weight and token.

Without the bias, as of torch's own products. Lookups count as none, as torch's do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch.utils.flop_counter import register_flop_formula

from sparselab.nn.ops.conv.conv2d import conv2d_input_grad, conv2d_operator, conv2d_values_grad
from sparselab.nn.ops.linear import linear_input_grad, linear_operator, linear_values_grad

Shape = Sequence[int]
Formula = TypeVar("Formula", bound=Callable[..., int])


def _register(operator: Any) -> Callable[[Formula], Formula]:
    register: Any = register_flop_formula(operator._opoverload.overloadpacket)
    return register  # type: ignore[no-any-return]


@_register(linear_operator)
def _linear(x: Shape, values: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * math.prod(values)


@_register(linear_input_grad)
def _linear_input_grad(grad: Shape, values: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * grad[0] * math.prod(values)


@_register(linear_values_grad)
def _linear_values_grad(grad: Shape, x: Shape, *args: Any, out_shape: Sequence[Shape], **kwargs: Any) -> int:
    return 2 * grad[0] * math.prod(out_shape[0])


@_register(conv2d_operator)
def _conv2d(x: Shape, values: Shape, *args: Any, out_shape: Shape, **kwargs: Any) -> int:
    return 2 * _pixels(out_shape) * math.prod(values)


@_register(conv2d_input_grad)
def _conv2d_input_grad(grad: Shape, values: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * _pixels(grad) * math.prod(values)


@_register(conv2d_values_grad)
def _conv2d_values_grad(grad: Shape, x: Shape, *args: Any, out_shape: Shape, **kwargs: Any) -> int:
    return 2 * _pixels(grad) * math.prod(out_shape)


def _pixels(images: Shape) -> int:
    """Positions where a kernel is applied, of all images."""
    return images[0] * images[2] * images[3]
