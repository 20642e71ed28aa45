"""What convolutions have in common, of whatever dimensions and however W is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from sparselab.nn.layers.base import SparseLayer
from sparselab.nn.ops.conv.geometry import Geometry, Pair, Space, as_sizes, read_space, with_bias
from sparselab.nn.ops.tools.nodes import is_node, node_of
from sparselab.nn.ops.tracing import is_transformed
from sparselab.nn.storage.checks import check_images
from sparselab.nn.storage.patterns import read_pattern

Layer = TypeVar("Layer", bound="Convolution")

#: What `torch.nn.functional.pad` calls the modes.
_MODES = {"zeros": "constant"}

#: What torch calls the order of memory in which channels come last, by the number of dimensions.
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Convolution(SparseLayer):
    """What convolutions have in common: settings, and how x becomes images and they become y."""

    settings: tuple[str, ...] = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "padding_mode",
    )  # fmt: skip
    #: 1, 2 or 3.
    n_dims: ClassVar[int]
    #: What the rows of W are, and what its columns go over, group by group.
    row_channels: ClassVar[str] = "out_channels"
    column_channels: ClassVar[str] = "in_channels"

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    space: Space

    def _configure(self, layer: Any) -> None:
        """Take over the settings of a convolution."""
        for name in self.settings:
            setattr(self, name, getattr(layer, name))
        self.output_padding = layer.output_padding
        self.space = read_space(
            getattr(layer, self.column_channels), layer.groups, layer.kernel_size, layer.stride,
            layer.padding, layer.dilation, layer.padding_mode == "zeros",
        )  # fmt: skip

    @property
    def geometry(self) -> Geometry:
        """The convolution of images that it is computed as."""
        return self.space.geometry

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the dense layer's weight."""
        rows, columns = getattr(self, self.row_channels), getattr(self, self.column_channels)
        return rows, columns // self.groups, *self.kernel_size

    @classmethod
    def from_pattern(
        cls: type[Layer],
        pattern: Any,
        bias: bool = True,
        *,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> Layer:
        """A layer with the connections of an array of the shape of the dense layer's weight.

        The topology stays as it is: only an algorithm of `sparselab.dst` that is attached changes it.

        Parameters
        ----------
        pattern : bool array or tensor, or a matrix
            Of the weight's dimensions: (out_channels, in_channels // groups, height, width) of a
            `SparseConv2d`. A matrix, of any kind that `SparseLinear.from_pattern` takes, has the shape of W
            and needs `kernel_size` among the settings.
        bias : bool
            Drawn as in a new layer.
        dtype : torch.dtype, optional
            float32, float64, bfloat16 or float16; torch's default if None, whatever the dtype of the pattern.
        settings
            The other arguments of the layer: stride, padding, dilation, groups, padding_mode.

        Raises
        ------
        TypeError, ValueError
            As `SparseLinear.from_pattern`; and if the pattern does not fit the settings.

        Examples
        --------
        >>> import numpy as np
        >>> from sparselab import SparseConv2d
        >>> SparseConv2d.from_pattern(np.ones((8, 4, 3, 3), bool), padding=1)
        SparseConv2d(4, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), sparsity=0, nnz=288)
        """
        if len(pattern.shape) == cls.n_dims + 2:
            settings["kernel_size"] = tuple(pattern.shape[2:])
            pattern = pattern.reshape(pattern.shape[0], -1)
        if "kernel_size" not in settings:
            raise TypeError("kernel_size must be given with a pattern of two dimensions")
        (rows, columns), positions, weights = read_pattern(pattern)
        kernel = as_sizes(settings["kernel_size"], cls.n_dims)
        channels = columns // max(math.prod(kernel), 1) * settings.get("groups", 1)
        sizes = {cls.row_channels: rows, cls.column_channels: channels}
        make = cast("Any", cls)
        new: Layer = make(**sizes, **settings, bias=bias, sparsity=1.0, dtype=dtype)
        if new.shape != (rows, columns):
            raise ValueError(f"pattern must have whole kernels of size {kernel}, got {columns} columns")
        new._begin_with(positions, weights)
        return new

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of the input.

        Parameters
        ----------
        input : (n, in_channels, *size) or (in_channels, *size), the dtype of the weights
            The size is (length,), (height, width) or (depth, height, width). Under CPU autocast any floating
            dtype; a sparse product is then computed in the dtype of the weights, and returned in that of
            autocast, unless it is float64.

        Returns
        -------
        (n, out_channels, *outputs) or (out_channels, *outputs)
            In channels_last if the input is.

        Raises
        ------
        RuntimeError
            If the shape, the dtype or the device does not fit.
        NotImplementedError
            If the layer or the input is on a device without products.
        """
        if is_node(input):
            return node_of(self, input)  # type: ignore[no-any-return]
        mode = _MODES.get(self.padding_mode, self.padding_mode)
        y = self._in_precision(input, lambda x: self.space.convolve(self._accept(x), self._product, mode))
        return _in_format_of(input, y)

    def _in_precision(self, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """What is computed of x, as autocast has it."""
        return compute(x)

    def _accept(self, x: Tensor) -> Tensor:
        """What is computed with, of a checked x."""
        check_images(x, self.in_channels, self.n_dims)
        return x

    def _product(self, images: Tensor) -> Tensor:
        """The outputs of checked and padded images."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        text = nn.Conv2d.extra_repr(cast("Any", self))  # type: ignore[no-untyped-call]
        return f"{text}, sparsity={self.sparsity:.4g}, nnz={self.nnz}"


class TransposedConvolution(Convolution):
    """What transposed convolutions have in common: they are the gradient of the input of a convolution.

    The rows of W are their inputs.
    """

    settings = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "groups",
        "dilation", "padding_mode",
    )  # fmt: skip
    row_channels = "in_channels"
    column_channels = "out_channels"

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """The transposed convolution of the input.

        Parameters
        ----------
        input : (n, in_channels, *size) or (in_channels, *size), the dtype of the weights
            As of other convolutions.
        output_size : sequence of int, optional
            Of the outputs, or with n and channels before; what `output_padding` gives by default.

        Returns
        -------
        (n, out_channels, *outputs) or (out_channels, *outputs)

        Raises
        ------
        RuntimeError
            If the shape, the dtype or the device does not fit, or the output padding is not below stride or
            dilation.
        ValueError
            If an output of that size cannot be made of the input.
        NotImplementedError
            If the layer or the input is on a device without products.
        """
        if is_node(input):
            return node_of(self, input, output_size)  # type: ignore[no-any-return]
        y = self._in_precision(input, lambda x: self._of_size(self._accept(x), output_size))
        return _in_format_of(input, y)

    def _of_size(self, x: Tensor, output_size: Sequence[int] | None) -> Tensor:
        more = self.output_padding if output_size is None else self._more(x, output_size)
        return with_bias(self.space.transpose(x, self._transposed, more), self.bias, self.n_dims)

    def _more(self, x: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
        """The output padding that gives an output of a size."""
        leading = x.ndim - self.n_dims
        size = tuple(output_size)
        size = size[leading:] if len(size) == x.ndim else size
        if len(size) != self.n_dims:
            raise ValueError(
                f"output_size must have {self.n_dims} or {x.ndim} numbers for an input of shape "
                f"{tuple(x.shape)}, got {tuple(output_size)}"
            )
        least = self.space.least(x.shape[leading:])
        more = tuple(size[d] - least[d] for d in range(self.n_dims))
        if not all(0 <= n < step for n, step in zip(more, self.stride, strict=True)):
            most = [n + step - 1 for n, step in zip(least, self.stride, strict=True)]
            raise ValueError(
                f"output_size must be from {least} to {most} for an input of shape {tuple(x.shape)}, got "
                f"{tuple(output_size)}"
            )
        return more

    def _transposed(self, images: Tensor, size: Pair) -> Tensor:
        """The outputs of checked images, of a height and width, without biases."""
        raise NotImplementedError

    def _bias_bound(self, indptr: Tensor, dtype: torch.dtype) -> Tensor:
        # Biases are of the outputs, which are no rows: all of them within the bound of the mean row.
        mean = indptr[-1].to(dtype) / max(len(indptr) - 1, 1)
        return mean.clamp(min=1).rsqrt()


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """The outputs in channels_last if the inputs are so, as torch has them; `torch.vmap` cannot tell."""
    memory_format = _FORMATS.get(x.ndim)
    if (
        is_transformed()
        or memory_format is None
        or x.is_contiguous()
        or not x.is_contiguous(memory_format=memory_format)
    ):
        return y
    return y.contiguous(memory_format=memory_format)
