"""What torch's `FlopCounterMode` counts of sparse products: two operations for each weight and token.

Without the bias, as of torch's own products. Of a sparse input as many as if its entries were spread evenly
over the inputs. Lookups count as none, as torch's do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch.utils.flop_counter import register_flop_formula

from sparselab.nn.ops.conv.conv2d import conv2d_input_grad, conv2d_operator, conv2d_values_grad
from sparselab.nn.ops.inputs.product import sparse_input, sparse_input_values_grad
from sparselab.nn.ops.linear import linear_input_grad, linear_operator, linear_values_grad
from sparselab.nn.ops.narrow.linear import narrow_operator

Shape = Sequence[int]
Formula = TypeVar("Formula", bound=Callable[..., int])


def _register(operator: Any) -> Callable[[Formula], Formula]:
    register: Any = register_flop_formula(operator._opoverload.overloadpacket)
    return register  # type: ignore[no-any-return]


@_register(linear_operator)
def _linear(x: Shape, values: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * math.prod(values)


@_register(narrow_operator)
def _narrow_linear(x: Shape, values: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * math.prod(values)


@_register(linear_input_grad)
def _linear_input_grad(grad: Shape, values: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * grad[0] * math.prod(values)


@_register(linear_values_grad)
def _linear_values_grad(grad: Shape, x: Shape, *args: Any, out_shape: Sequence[Shape], **kwargs: Any) -> int:
    return 2 * grad[0] * math.prod(out_shape[0])


@_register(sparse_input)
def _sparse_input(
    starts: Shape, columns: Shape, entries: Shape, values: Shape, bias: Any, indptr: Shape, indices: Shape,
    sizes: Sequence[int], *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return _by_entries(columns, values, sizes)


@_register(sparse_input_values_grad)
def _sparse_input_values_grad(
    grad: Shape, starts: Shape, columns: Shape, entries: Shape, indptr: Shape, indices: Shape,
    sizes: Sequence[int], *args: Any, out_shape: Shape, **kwargs: Any,
) -> int:  # fmt: skip
    return _by_entries(columns, out_shape, sizes)


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


def _by_entries(columns: Shape, values: Shape, sizes: Sequence[int]) -> int:
    """Each stored entry of the tokens meets the weights of one input."""
    return 2 * columns[0] * math.prod(values) // max(sizes[1], 1)
