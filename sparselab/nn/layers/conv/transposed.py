"""Transposed convolutions that store, compute and train only their live connections."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from sparselab.nn.layers.conv.base import TransposedConvolution
from sparselab.nn.layers.conv.sparse import SparseConvolution
from sparselab.nn.layers.kinds import LayerKind, register_kind
from sparselab.nn.ops.conv.conv2d import conv2d_transposed
from sparselab.nn.ops.conv.geometry import Pair, Size
from sparselab.nn.storage.checks import check_bias, read_sparsity


class SparseConvTransposeNd(TransposedConvolution, SparseConvolution):
    """What the transposed convolutions are but for their dimensions."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1, padding: Size = 0,
        output_padding: Size = 0, groups: int = 1, bias: bool = True, dilation: Size = 1,
        padding_mode: str = "zeros", *, sparsity: float | None = None, density: float | None = None,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        bias = check_bias(bias, f"{type(self).__name__}({in_channels}, {out_channels}, {kernel_size}")
        dense = cast("Any", self.dense_type)(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, False, dilation,
            padding_mode, device="meta",
        )  # fmt: skip
        super().__init__(dense, bias, read_sparsity(sparsity, density), None, device, dtype)

    def _transposed(self, images: Tensor, size: Pair) -> Tensor:
        return conv2d_transposed(images, self.in_use, self, self.geometry, size)


class SparseConvTranspose2d(SparseConvTransposeNd):
    """Drop-in for `torch.nn.ConvTranspose2d` with a sparse W.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias
    dilation, padding_mode
        As of `torch.nn.ConvTranspose2d`.
    sparsity : float in [0, 1], optional
        Fraction of W that does not exist; 0.9 if density is not given either. Exactly
        ``round((1 - sparsity) * in_channels * out_channels // groups * height * width)`` connections are
        drawn uniformly at random, from torch's random generator.
    density : float in [0, 1], optional
        ``1 - sparsity``, in place of it.
    device : torch.device, optional
        Forward passes run on the CPU.
    dtype : torch.dtype, optional
        float32, float64, bfloat16 or float16. In the latter two sums are still made in float32.

    Attributes
    ----------
    weight_values : Parameter, (nnz, 1, 1)
        Weights of the live connections, input channel by input channel. Connection (row, column) has the
        place of ``weight.reshape(in_channels, -1)[row, column]`` in the weight of a
        `torch.nn.ConvTranspose2d`: ``column = (channel * height + i) * width + j``, with output channels
        counted in their group.
    weight : SparseWeight, (in_channels, out_channels // groups, height, width)
        As of `SparseLinear`, for `torch.nn.functional.conv_transpose2d`.
    indptr, indices, forward_mask
        As of `SparseLinear`.
    bias : Parameter, (out_channels,), or None
    in_features, out_features : int
        Columns and rows of W, ``out_channels // groups * height * width`` and `in_channels`: those of the
        convolution whose input's gradient this is. What algorithms do row by row (``scope="row"``, a fan-in,
        `sparselab.SRigL`) they do by input channel.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `torch.nn.ConvTranspose2d`, and if the sparsity or density is not a number in [0, 1], or both are
        given.

    Notes
    -----
    The forward pass is the gradient of a `SparseConv2d`'s input, and the gradient of the input is the forward
    pass of one: costs, strides and scratch are those of `SparseConv2d`. Biases are added afterwards.

    Weights are drawn as torch draws them, with live counts in place of dense ones: from U(-b, b) with
    ``b = 1 / sqrt(connections of the input channel)``; biases with that of the mean input channel. Without a
    sparsity both are the distributions of `torch.nn.ConvTranspose2d`.

    Batches that are far from 8 MiB, or layers of few connections to an input channel, are quicker dense.

    Examples
    --------
    >>> import torch, sparselab
    >>> layer = sparselab.SparseConvTranspose2d(64, 32, 4, stride=2, padding=1, sparsity=0.9)
    >>> layer(torch.randn(8, 64, 16, 16)).shape
    torch.Size([8, 32, 32, 32])
    >>> layer.nnz
    3277
    """

    dense_class = nn.ConvTranspose2d
    dense_type = nn.ConvTranspose2d
    n_dims = 2


class SparseConvTranspose1d(SparseConvTransposeNd):
    """Drop-in for `torch.nn.ConvTranspose1d` with a sparse W.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias
    dilation, padding_mode
        As of `torch.nn.ConvTranspose1d`.
    sparsity, density, device, dtype
        As of `SparseConvTranspose2d`.

    Attributes
    ----------
    weight_values : Parameter, (nnz, 1, 1)
        As of `SparseConvTranspose2d`, with ``column = channel * length + i``.
    weight : SparseWeight, (in_channels, out_channels // groups, length)
        As of `SparseLinear`, for `torch.nn.functional.conv_transpose1d`.
    indptr, indices, forward_mask, bias, in_features, out_features
        As of `SparseConvTranspose2d`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `SparseConvTranspose2d`.

    Notes
    -----
    Computed as `SparseConvTranspose2d` of images with one row, by views. When a dense layer is quicker, and
    how weights and biases are drawn: as there.

    Examples
    --------
    >>> import torch, sparselab
    >>> layer = sparselab.SparseConvTranspose1d(64, 32, 4, stride=2, padding=1, sparsity=0.9)
    >>> layer(torch.randn(8, 64, 50)).shape
    torch.Size([8, 32, 100])
    """

    dense_class = nn.ConvTranspose1d
    dense_type = nn.ConvTranspose1d
    n_dims = 1


class SparseConvTranspose3d(SparseConvTransposeNd):
    """Drop-in for `torch.nn.ConvTranspose3d` with a sparse W.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias
    dilation, padding_mode
        As of `torch.nn.ConvTranspose3d`.
    sparsity, density, device, dtype
        As of `SparseConvTranspose2d`.

    Attributes
    ----------
    weight_values : Parameter, (nnz, 1, 1)
        As of `SparseConvTranspose2d`, with ``column = ((channel * depth + d) * height + i) * width + j``.
    weight : SparseWeight, (in_channels, out_channels // groups, depth, height, width)
        As of `SparseLinear`, for `torch.nn.functional.conv_transpose3d`.
    indptr, indices, forward_mask, bias, in_features, out_features
        As of `SparseConvTranspose2d`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `SparseConvTranspose2d`.

    Notes
    -----
    Computed as `SparseConvTranspose2d` slice by slice of the input; what each adds to the slices of the
    output is then summed (`torch.nn.functional.fold`). Before that it takes about
    ``kernel_size[0] / stride[0]`` times the output, twice for a moment, and its gradient as much; the input
    is copied once, and held for the backward pass where W is trained. So a deep kernel, or few channels, are
    quicker dense, and take less memory. How weights and biases are drawn: as of `SparseConvTranspose2d`.

    Examples
    --------
    >>> import torch, sparselab
    >>> layer = sparselab.SparseConvTranspose3d(16, 8, 2, stride=2, sparsity=0.9)
    >>> layer(torch.randn(2, 16, 4, 5, 5)).shape
    torch.Size([2, 8, 8, 10, 10])
    """

    dense_class = nn.ConvTranspose3d
    dense_type = nn.ConvTranspose3d
    n_dims = 3


register_kind(LayerKind("sparse", SparseConvTranspose1d, (nn.ConvTranspose1d,)))
register_kind(LayerKind("sparse", SparseConvTranspose2d, (nn.ConvTranspose2d,)))
register_kind(LayerKind("sparse", SparseConvTranspose3d, (nn.ConvTranspose3d,)))
