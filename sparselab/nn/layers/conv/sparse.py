"""Convolutions that store, compute and train only their live connections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from sparselab.kernels.arrays import n_connections
from sparselab.kernels.rewiring.rows import select_rows
from sparselab.nn.layers.compressed import CompressedLayer
from sparselab.nn.layers.conv.base import Convolution
from sparselab.nn.layers.kinds import LayerKind, register_kind
from sparselab.nn.ops.conv.conv2d import conv2d
from sparselab.nn.ops.conv.geometry import Size
from sparselab.nn.storage.checks import (
    check_bias,
    check_images,
    check_input,
    in_precision,
    read_fan_in,
    read_sparsity,
)
from sparselab.nn.storage.compressed import Compressed
from sparselab.nn.storage.entries import as_scores

Layer = TypeVar("Layer", bound="SparseConvolution")


class SparseConvolution(Convolution, CompressedLayer):
    """A convolution, transposed or not, in compressed rows.

    Parameters
    ----------
    dense : torch.nn.Module
        A dense layer with the same settings, which may be on the device "meta".
    bias : bool
    sparsity : float
    fan_in : int or None
        In place of the sparsity: connections of each row of W.
    device, dtype
        As of `sparselab.SparseLinear`.
    """

    def __init__(
        self, dense: Any, bias: bool, sparsity: float, fan_in: int | None,
        device: torch.device | str | int | None, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        rows = len(dense.weight)
        shape = rows, dense.weight[0].numel() if rows else 0
        nnz = n_connections(shape, sparsity) if fan_in is None else rows * read_fan_in(shape[1], fan_in)
        super().__init__(Compressed(shape, fan_in=fan_in), nnz, bias, device, dtype, dense.out_channels)
        self._configure(dense)
        self._draw_if_there(sparsity if fan_in is None else 1.0, stacklevel=5)

    @classmethod
    def from_dense(
        cls: type[Layer], conv: Any, sparsity: float | None = None, *, density: float | None = None
    ) -> Layer:
        """The largest weights of a dense layer, by magnitude; of equal ones the first in row-major order."""
        cls._require_dense(conv)
        return cls._from_largest(conv, read_sparsity(sparsity, density))

    @classmethod
    def _require_dense(cls, conv: object) -> None:
        if not isinstance(conv, cls.dense_type):
            raise TypeError(f"conv must be a torch.nn.{cls.dense_type.__name__}, got {type(conv).__name__}")

    def to_dense(self) -> Any:
        """The layer of torch with the same outputs, mode and trainability."""
        return self._dense_twin()

    def _in_precision(self, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        return in_precision(compute, x, self.weight_values.dtype)

    def _accept(self, x: Tensor) -> Tensor:
        check_images(x, self.in_channels, self.n_dims)
        return check_input(x, self.weight_values)


class SparseConvNd(SparseConvolution):
    """What `SparseConv1d`, `SparseConv2d` and `SparseConv3d` are but for their dimensions."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", *, sparsity: float | None = None, density: float | None = None,
        fan_in: int | None = None, device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        bias = check_bias(bias, f"{type(self).__name__}({in_channels}, {out_channels}, {kernel_size}")
        dense = cast("Any", self.dense_type)(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, padding_mode,
            device="meta",
        )  # fmt: skip
        super().__init__(dense, bias, read_sparsity(sparsity, density, fan_in), fan_in, device, dtype)

    @classmethod
    def from_dense(
        cls: type[Layer], conv: Any, sparsity: float | None = None, *, density: float | None = None,
        fan_in: int | None = None,
    ) -> Layer:  # fmt: skip
        """The largest weights of a dense layer, by magnitude; of equal ones the first in row-major order.

        With `fan_in`, those of each output channel.
        """
        cls._require_dense(conv)
        fraction = read_sparsity(sparsity, density, fan_in)
        if fan_in is None:
            return cls._from_largest(conv, fraction)
        rows, columns = len(conv.weight), conv.weight[0].numel()
        each = np.full(rows, read_fan_in(columns, fan_in))
        largest = select_rows(as_scores(conv.weight), np.arange(rows + 1) * columns, each)
        new = cls.from_positions(conv, torch.from_numpy(largest).long())
        new.storage.fan_in = int(fan_in)
        return new

    @property
    def fan_in(self) -> int | None:
        """Connections of each output channel; None if they do not have equally many."""
        if self.indptr.is_meta:
            return self.storage.fan_in
        row_nnz = torch.diff(self.indptr)
        if len(row_nnz) and bool((row_nnz == row_nnz[0]).all()):
            return int(row_nnz[0])
        return None

    def _product(self, images: Tensor) -> Tensor:
        return conv2d(images, self.in_use, self.bias, self, self.space.geometry)


class SparseConv2d(SparseConvNd):
    """Drop-in for `torch.nn.Conv2d` with a sparse W.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        As of `torch.nn.Conv2d`.
    sparsity : float in [0, 1], optional
        Fraction of W that does not exist; 0.9 if nothing else says it. Exactly
        ``round((1 - sparsity) * out_channels * in_channels // groups * height * width)`` connections are
        drawn uniformly at random, from torch's random generator.
    density : float in [0, 1], optional
        ``1 - sparsity``, in place of it.
    fan_in : int, optional
        In place of both: connections of each output channel.
    device : torch.device, optional
        Forward passes run on the CPU.
    dtype : torch.dtype, optional
        float32, float64, bfloat16 or float16. In the latter two sums are still made in float32.

    Attributes
    ----------
    weight_values : Parameter, (nnz, 1, 1)
        Weights of the live connections, output channel by output channel. Connection (row, column) has the
        place of ``weight.reshape(out_channels, -1)[row, column]`` in the weight of a `torch.nn.Conv2d`:
        ``column = (channel * height + i) * width + j``, with channels counted in their group.
    weight : SparseWeight, (out_channels, in_channels // groups, height, width)
        As of `SparseLinear`, for `torch.nn.functional.conv2d`.
    indptr, indices, forward_mask, bias
        As of `SparseLinear`.
    in_features, out_features : int
        Columns and rows of W: ``in_channels // groups * height * width`` and `out_channels`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `torch.nn.Conv2d`, and if the sparsity or density is not a number in [0, 1], fan_in not one of 0 to
        `in_features`, or more than one of them is given.

    Notes
    -----
    ``nnz * outputs of an image * images`` multiply-adds for each product. The batch is never unfolded: chunks
    of images are laid out once, as planes with the zeros of the padding, in scratch of at most 8 MiB (or one
    image of inputs and outputs), in which a window is a range of addresses. Any strides are read;
    outputs are in channels_last if the images are.

    Batches that are far from 8 MiB, or layers of few connections to an output, are quicker dense.

    Examples
    --------
    >>> import torch, sparselab
    >>> layer = sparselab.SparseConv2d(64, 128, 3, padding=1, sparsity=0.9)
    >>> layer(torch.randn(8, 64, 16, 16)).shape
    torch.Size([8, 128, 16, 16])
    >>> layer.nnz
    7373
    """

    dense_class = nn.Conv2d
    dense_type = nn.Conv2d
    n_dims = 2


class SparseConv1d(SparseConvNd):
    """Drop-in for `torch.nn.Conv1d` with a sparse W.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        As of `torch.nn.Conv1d`.
    sparsity, density, fan_in, device, dtype
        As of `SparseConv2d`.

    Attributes
    ----------
    weight_values : Parameter, (nnz, 1, 1)
        As of `SparseConv2d`, with ``column = channel * length + i``.
    weight : SparseWeight, (out_channels, in_channels // groups, length)
        As of `SparseLinear`, for `torch.nn.functional.conv1d`.
    indptr, indices, forward_mask, bias, in_features, out_features
        As of `SparseConv2d`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `SparseConv2d`.

    Notes
    -----
    Computed as `SparseConv2d` of images with one row, by views: nothing is copied. Any strides are read; the
    output is contiguous. Short signals of few channels, or layers of few connections to an output, are
    quicker dense.

    Examples
    --------
    >>> import torch, sparselab
    >>> layer = sparselab.SparseConv1d(64, 128, 5, padding="same", sparsity=0.9)
    >>> layer(torch.randn(8, 64, 100)).shape
    torch.Size([8, 128, 100])
    >>> layer.nnz
    4096
    """

    dense_class = nn.Conv1d
    dense_type = nn.Conv1d
    n_dims = 1


class SparseConv3d(SparseConvNd):
    """Drop-in for `torch.nn.Conv3d` with a sparse W.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        As of `torch.nn.Conv3d`.
    sparsity, density, fan_in, device, dtype
        As of `SparseConv2d`.

    Attributes
    ----------
    weight_values : Parameter, (nnz, 1, 1)
        As of `SparseConv2d`, with ``column = ((channel * depth + d) * height + i) * width + j``.
    weight : SparseWeight, (out_channels, in_channels // groups, depth, height, width)
        As of `SparseLinear`, for `torch.nn.functional.conv3d`.
    indptr, indices, forward_mask, bias, in_features, out_features
        As of `SparseConv2d`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `SparseConv2d`.

    Notes
    -----
    Computed as `SparseConv2d` of the slices of the output, each made of the slices below its windows. These
    are copied once: about ``kernel_size[0] / stride[0]`` times the input, held for the backward pass where W
    is trained, and as much again for a moment in it; a padded depth takes one more copy of the input. The
    output is copied once, to be contiguous. So a layer of a kernel as deep as the volume, or of few channels,
    is quicker dense, and takes less memory; a kernel of depth 1 costs one copy.

    Examples
    --------
    >>> import torch, sparselab
    >>> layer = sparselab.SparseConv3d(16, 32, 3, padding=1, sparsity=0.9)
    >>> layer(torch.randn(2, 16, 8, 10, 10)).shape
    torch.Size([2, 32, 8, 10, 10])
    >>> layer.nnz
    1382
    """

    dense_class = nn.Conv3d
    dense_type = nn.Conv3d
    n_dims = 3


for _cls, _dense in ((SparseConv2d, nn.Conv2d), (SparseConv1d, nn.Conv1d), (SparseConv3d, nn.Conv3d)):
    register_kind(LayerKind("sparse", _cls, (_dense,)))
    register_kind(LayerKind("fan_in", _cls, (_dense,), ("fan_in",)))
