"""What torch's functions compute with the weight of a sparse layer, by its sparse products."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from sparselab.nn.ops.conv2d import conv2d as sparse_conv2d
from sparselab.nn.ops.geometry import Pair, read_geometry
from sparselab.nn.ops.linear import linear as sparse_linear
from sparselab.nn.ops.linear import linear_transposed
from sparselab.nn.storage.checks import check_images, check_input, check_tokens, under_autocast


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
    if torch.is_autocast_enabled("cpu"):
        return under_autocast(lambda x: linear(x, weight, bias), x, weight.values().dtype)
    if len(weight.shape) != 2:
        raise RuntimeError(f"weight must have two dimensions, got {tuple(weight.shape)}")
    values, (rows, columns) = weight.values(), weight.shape
    x = check_tokens(x, values, columns)
    tokens = x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), columns)
    if weight.transposed:
        y = linear_transposed(tokens, values, weight.layer)
        y = y if bias is None else y + bias
    else:
        y = sparse_linear(tokens, values, bias, weight.layer)
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], rows)


def conv2d(
    x: Tensor, weight: LiveWeight, bias: Tensor | None = None, stride: int | Pair = 1,
    padding: int | Pair | str = 0, dilation: int | Pair = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """The convolution of images, as `torch.nn.functional.conv2d`.

    Parameters
    ----------
    x : (n, groups * weight.shape[1], height, width), or without n
    weight : LiveWeight
        Of four dimensions.
    bias : (weight.shape[0],), optional
    stride, padding, dilation, groups
        Those of the layer, or any others.

    Raises
    ------
    RuntimeError, ValueError
        If an operand does not fit.
    """
    if torch.is_autocast_enabled("cpu"):
        return under_autocast(
            lambda x: conv2d(x, weight, bias, stride, padding, dilation, groups), x, weight.values().dtype
        )
    if len(weight.shape) != 4:
        raise RuntimeError(f"weight must have four dimensions, got {tuple(weight.shape)}")
    if padding == "same" and _pair(stride) != (1, 1):
        raise RuntimeError(f"stride must be 1 with padding='same', got {stride}")
    (_, channels, *kernel), values = weight.shape, weight.values()
    geometry, outside = read_geometry(channels * groups, groups, kernel, stride, padding, dilation)
    check_images(x, geometry.in_channels)
    x = check_input(x, values)
    images = x if x.ndim == 4 else x.unsqueeze(0)
    if outside is not None:
        images = torch.nn.functional.pad(images, outside)
    outputs = geometry.outputs((images.shape[2], images.shape[3]))
    if min(outputs) < 1:
        raise RuntimeError(
            f"input must be as large as the kernel, got {tuple(x.shape)}, of {outputs} outputs"
        )
    y = sparse_conv2d(images, values, bias, weight.layer, geometry)
    return y if x.ndim == 4 else y.squeeze(0)
