"""Two-dimensional convolutions that store, compute and train only their live connections."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from sparselab.kernels.arrays import n_connections
from sparselab.kernels.rewiring.rows import select_rows
from sparselab.nn.layers.base import SparseLayer
from sparselab.nn.layers.compressed import CompressedLayer
from sparselab.nn.layers.kinds import LayerKind, register_kind
from sparselab.nn.ops.conv2d import conv2d
from sparselab.nn.ops.geometry import read_geometry
from sparselab.nn.storage.checks import (
    check_bias,
    check_images,
    check_input,
    read_fan_in,
    read_sparsity,
    under_autocast,
)
from sparselab.nn.storage.compressed import Compressed
from sparselab.nn.storage.entries import as_scores
from sparselab.nn.storage.patterns import read_pattern

Layer = TypeVar("Layer", bound="Convolution")
Size = int | tuple[int, int]

#: What `torch.nn.functional.pad` calls the modes.
_MODES = {"zeros": "constant"}


class Convolution(SparseLayer):
    """What convolutions have in common, however W is stored: settings, images in and images out."""

    dense_class = nn.Conv2d
    dense_type = nn.Conv2d
    settings = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "padding_mode",
    )  # fmt: skip

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    #: For the representation of `torch.nn.Conv2d`.
    output_padding = (0, 0)

    def _configure(self, conv: Any) -> None:
        """Take over the settings of a convolution."""
        for name in self.settings:
            setattr(self, name, getattr(conv, name))
        self.geometry, self._pad = read_geometry(
            conv.in_channels, conv.groups, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.padding_mode == "zeros",
        )  # fmt: skip

    @classmethod
    def from_pattern(
        cls: type[Layer],
        pattern: Any,
        bias: bool = True,
        *,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> Layer:
        """A layer with the connections of an array (out_channels, in_channels // groups, height, width).

        The topology stays as it is: only an algorithm of `sparselab.dst` that is attached changes it.

        Parameters
        ----------
        pattern : bool array or tensor of four dimensions, or a matrix
            A matrix, of any kind that `SparseLinear.from_pattern` takes, has the shape of W and needs
            `kernel_size` among the settings.
        bias : bool
            Drawn as in a new layer.
        dtype : torch.dtype, optional
            float32, float64 or bfloat16; torch's default if None, whatever the dtype of the pattern.
        settings
            The other arguments of the layer: stride, padding, dilation, groups, padding_mode.

        Raises
        ------
        TypeError, ValueError
            As `SparseLinear.from_pattern`; and if the pattern does not fit the settings.

        Examples
        --------
        >>> from sparselab import SparseConv2d
        >>> SparseConv2d.from_pattern(np.ones((8, 4, 3, 3), bool), padding=1)
        SparseConv2d(4, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), sparsity=0, nnz=288)
        """
        if len(pattern.shape) == 4:
            settings["kernel_size"] = tuple(pattern.shape[2:])
            pattern = pattern.reshape(pattern.shape[0], -1)
        if "kernel_size" not in settings:
            raise TypeError("kernel_size must be given with a pattern of two dimensions")
        (rows, columns), positions, weights = read_pattern(pattern)
        kernel = nn.modules.utils._pair(settings["kernel_size"])
        channels = columns // max(kernel[0] * kernel[1], 1) * settings.get("groups", 1)
        make = cast("Any", cls)
        new: Layer = make(channels, rows, **settings, bias=bias, sparsity=1.0, dtype=dtype)
        if new.shape != (rows, columns):
            raise ValueError(f"pattern must have whole kernels of size {kernel}, got {columns} columns")
        new._begin_with(positions, weights)
        return new

    def _convolved(self, x: Tensor) -> Tensor:
        """The output for checked images, or for one."""
        images = x if x.ndim == 4 else x.unsqueeze(0)
        if self._pad is not None:
            images = nn.functional.pad(images, self._pad, _MODES.get(self.padding_mode, self.padding_mode))
        outputs = self.geometry.outputs((images.shape[2], images.shape[3]))
        if min(outputs) < 1:
            raise RuntimeError(
                f"input must be as large as the kernel, {self.kernel_size} of dilation {self.dilation}, "
                f"when it is padded; got {tuple(x.shape)}, which gives {outputs} outputs"
            )
        y = self._product(images)
        return y if x.ndim == 4 else y.squeeze(0)

    def _product(self, x: Tensor) -> Tensor:
        """The output for checked and padded images."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        text = nn.Conv2d.extra_repr(cast("Any", self))  # type: ignore[no-untyped-call]
        return f"{text}, sparsity={self.sparsity:.4g}, nnz={self.nnz}"


class SparseConv2d(Convolution, CompressedLayer):
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
        float32, float64 or bfloat16. In bfloat16 the sums are still made in float32.

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
    image of inputs and outputs), in which a window is a range of addresses. Any strides are read, so also
    channels_last; the output is contiguous.

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

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", *, sparsity: float | None = None, density: float | None = None,
        fan_in: int | None = None, device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        bias = check_bias(bias, f"SparseConv2d({in_channels}, {out_channels}, {kernel_size}")
        dense = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False,
            cast("Any", padding_mode), device="meta",
        )  # fmt: skip
        shape = out_channels, dense.weight[0].numel() if out_channels else 0
        amount = read_sparsity(sparsity, density, fan_in)
        nnz = n_connections(shape, amount)
        if fan_in is not None:
            nnz = out_channels * read_fan_in(shape[1], fan_in)
        super().__init__(Compressed(shape, fan_in=fan_in), nnz, bias, device, dtype)
        self._configure(dense)
        self._draw_if_there(amount if fan_in is None else 1.0)

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d, sparsity: float | None = None, *, density: float | None = None,
        fan_in: int | None = None,
    ) -> SparseConv2d:  # fmt: skip
        """The largest weights of a dense layer, by magnitude; of equal ones the first in row-major order.

        With `fan_in`, those of each output channel.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be a torch.nn.Conv2d, got {type(conv).__name__}")
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
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the dense layer's weight."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    @property
    def fan_in(self) -> int | None:
        """Connections of each output channel; None if they do not have equally many."""
        if self.indptr.is_meta:
            return self.storage.fan_in
        row_nnz = torch.diff(self.indptr)
        if len(row_nnz) and bool((row_nnz == row_nnz[0]).all()):
            return int(row_nnz[0])
        return None

    def to_dense(self) -> nn.Conv2d:
        """A `torch.nn.Conv2d` with the same outputs, mode and trainability."""
        new: nn.Conv2d = self._dense_twin()
        return new

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x.

        Parameters
        ----------
        x : (n, in_channels, height, width) or (in_channels, height, width), the dtype of `weight_values`
            Under CPU autocast any floating dtype; the product is then computed in the dtype of
            `weight_values`, and returned in that of autocast, unless it is float64.

        Returns
        -------
        (n, out_channels, rows, columns) or (out_channels, rows, columns)

        Raises
        ------
        RuntimeError
            If the shape, the dtype or the device does not fit.
        NotImplementedError
            If the layer or x is on a device without products.
        """
        if torch.is_autocast_enabled("cpu"):
            return under_autocast(self.forward, x, self.in_use.dtype)
        check_images(x, self.in_channels)
        return self._convolved(check_input(x, self.weight_values))

    def _product(self, x: Tensor) -> Tensor:
        return conv2d(x, self.in_use, self.bias, self, self.geometry)


register_kind(LayerKind("sparse", SparseConv2d, (nn.Conv2d,)))
register_kind(LayerKind("fan_in", SparseConv2d, (nn.Conv2d,), ("fan_in",)))
