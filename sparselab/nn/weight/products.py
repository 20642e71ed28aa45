"""What torch's functions compute with the weight of a sparse layer, by its sparse products."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from sparselab.nn.ops.conv.conv2d import conv2d as sparse_conv2d
from sparselab.nn.ops.conv.conv2d import conv2d_transposed
from sparselab.nn.ops.conv.geometry import Size, as_sizes, read_space, with_bias
from sparselab.nn.ops.linear import linear as sparse_linear
from sparselab.nn.ops.linear import linear_transposed
from sparselab.nn.storage.checks import check_images, check_input, check_tokens, in_precision


class LiveWeight(Protocol):
    """The weight of a layer, or its transpose."""

    layer: Any
    transposed: bool

    @property
    def shape(self) -> torch.Size:
        """Of the dense weight, transposed if that is asked for."""

    def values(self) -> Tensor:
        """The live weights, laid out as the layer's Parameter."""


def linear(x: Tensor, weight: LiveWeight, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``, as `torch.nn.functional.linear`.

    Parameters
    ----------
    x : (..., weight.shape[1])
    weight : LiveWeight
        Of two dimensions.
    bias : (weight.shape[0],), optional

    Raises
    ------
    RuntimeError
        If an operand does not fit.
    """
    if len(weight.shape) != 2:
        raise RuntimeError(f"weight must have two dimensions, got {tuple(weight.shape)}")
    values, (rows, columns) = weight.values(), weight.shape

    def compute(x: Tensor) -> Tensor:
        x = check_tokens(x, values, columns)
        tokens = x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), columns)
        if weight.transposed:
            y = linear_transposed(tokens, values, weight.layer)
            y = y if bias is None else y + bias
        else:
            y = sparse_linear(tokens, values, bias, weight.layer)
        return y if x.ndim == 2 else y.reshape(*x.shape[:-1], rows)

    return in_precision(compute, x, values.dtype)


def convolve(
    n_dims: int, x: Tensor, weight: LiveWeight, bias: Tensor | None = None, stride: Size = 1,
    padding: Size | str = 0, dilation: Size = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """The convolution of x, as `torch.nn.functional.conv2d` and its likes.

    Parameters
    ----------
    n_dims : int
        1, 2 or 3.
    x : (n, groups * weight.shape[1], *size), or without n
    weight : LiveWeight
        Of two dimensions more than `n_dims`.
    bias : (weight.shape[0],), optional
    stride, padding, dilation, groups
        Those of the layer, or any others.

    Raises
    ------
    RuntimeError, ValueError
        If an operand does not fit.
    """
    channels, kernel = _kernel(n_dims, weight)
    if padding == "same" and any(step != 1 for step in as_sizes(stride, n_dims)):
        raise RuntimeError(f"stride must be 1 with padding='same', got {stride}")
    space = read_space(channels * groups, groups, kernel, stride, padding, dilation)
    check_images(x, channels * groups, n_dims)
    values = weight.values()

    def compute(x: Tensor) -> Tensor:
        return space.convolve(
            check_input(x, values),
            lambda images: sparse_conv2d(images, values, bias, weight.layer, space.geometry),
        )

    return in_precision(compute, x, values.dtype)


def convolve_transposed(
    n_dims: int, x: Tensor, weight: LiveWeight, bias: Tensor | None = None, stride: Size = 1,
    padding: Size = 0, output_padding: Size = 0, groups: int = 1, dilation: Size = 1,
) -> Tensor:  # fmt: skip
    """The transposed convolution of x, as `torch.nn.functional.conv_transpose2d` and its likes.

    Parameters
    ----------
    n_dims : int
        1, 2 or 3.
    x : (n, weight.shape[0], *size), or without n
    weight : LiveWeight
        Of two dimensions more than `n_dims`.
    bias : (groups * weight.shape[1],), optional
    stride, padding, output_padding, groups, dilation
        Those of the layer, or any others.

    Raises
    ------
    RuntimeError, ValueError
        If an operand does not fit.
    """
    channels, kernel = _kernel(n_dims, weight)
    space = read_space(channels * groups, groups, kernel, stride, as_sizes(padding, n_dims), dilation)
    check_images(x, weight.shape[0], n_dims)
    values = weight.values()

    def compute(x: Tensor) -> Tensor:
        y = space.transpose(
            check_input(x, values),
            lambda images, size: conv2d_transposed(images, values, weight.layer, space.geometry, size),
            as_sizes(output_padding, n_dims),
        )
        return with_bias(y, bias, n_dims)

    return in_precision(compute, x, values.dtype)


def _kernel(n_dims: int, weight: LiveWeight) -> tuple[int, tuple[int, ...]]:
    """Channels of a group, and the kernel's size."""
    if len(weight.shape) != n_dims + 2:
        number = ("three", "four", "five")[n_dims - 1]
        raise RuntimeError(f"weight must have {number} dimensions, got {tuple(weight.shape)}")
    _, channels, *kernel = weight.shape
    return channels, tuple(kernel)
