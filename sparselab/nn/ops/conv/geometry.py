"""What a convolution is beside its weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[int, int]
#: One number for all dimensions, or one for each.
Size = int | tuple[int, ...]


class Geometry(NamedTuple):
    """What a convolution of images is beside its weights.

    W is (out_channels, in_channels // groups * elements).
    """

    in_channels: int
    groups: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Geometry:
        """That of its `numbers`.

        Raises
        ------
        ValueError
            If they are not what a convolution can have.
        """
        if len(numbers) != 10:
            raise ValueError(f"geometry must be ten numbers, got {list(numbers)}")
        in_channels, groups, a, b, c, d, e, f, g, h = (int(number) for number in numbers)
        if min(groups, a, b, c, d, g, h) < 1 or min(in_channels, e, f) < 0 or in_channels % groups:
            raise ValueError(
                "geometry must be in_channels, groups that divide them, and two numbers each of kernel, "
                f"stride, padding (from 0) and dilation, got {list(numbers)}"
            )
        if max(numbers) >= 1 << 31:
            raise ValueError(f"geometry must be numbers below 2**31, got {list(numbers)}")
        return cls(in_channels, groups, (a, b), (c, d), (e, f), (g, h))

    @property
    def numbers(self) -> list[int]:
        """All of them, as an operator takes them."""
        return [*self[:2], *itertools.chain(*self[2:])]

    @property
    def elements(self) -> int:
        """Elements of the kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def columns(self) -> int:
        """Columns of W."""
        return self.in_channels // self.groups * self.elements

    def outputs(self, size: Pair) -> Pair:
        """Rows and columns of outputs for images of this size; not positive if they are too small."""
        (a, b), (p, q), (s, t), (d, e) = self.kernel, self.padding, self.stride, self.dilation
        down = (size[0] + 2 * p - d * (a - 1) - 1) // s + 1
        return down, (size[1] + 2 * q - e * (b - 1) - 1) // t + 1


class Depth(NamedTuple):
    """What a convolution of volumes is along their depth."""

    kernel: int
    stride: int
    padding: int
    dilation: int


class Space(NamedTuple):
    """A convolution of one, two or three dimensions, as one of images.

    Signals are images of one row. Of volumes the depth alone is unfolded: each slice of the output is an
    image, made of the slices below its windows, which are further channels of one image. Columns of W are
    then those of images too: element ``(d, i, j)`` of channel c is element ``(i, j)`` of channel
    ``c * depth + d``.

    Attributes
    ----------
    geometry : Geometry
        Of the images.
    depth : Depth or None
        Of volumes.
    kernel, stride, padding, dilation : tuple of int
        One number for each dimension, as torch has them. The padding is what lies within the convolution.
    extents : tuple of int
        What the first window takes of an input, beside its padding.
    outside : list of int, or None
        What is to be padded before, as `torch.nn.functional.pad` takes it; None if there is nothing.
    n_dims : int
        1, 2 or 3.
    """

    geometry: Geometry
    depth: Depth | None
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    extents: tuple[int, ...]
    outside: list[int] | None
    n_dims: int

    def convolve(self, x: Tensor, product: Callable[[Tensor], Tensor], mode: str = "constant") -> Tensor:
        """The convolution of x, by one of images.

        Parameters
        ----------
        x : (n, in_channels, *size), or without n
        product : callable
            The outputs of images (n, geometry.in_channels, height, width).
        mode : str
            How `torch.nn.functional.pad` shall pad what is outside.

        Returns
        -------
        (n, out_channels, *outputs), or without n

        Raises
        ------
        RuntimeError
            If x is smaller than the kernel.
        """
        is_batch = x.ndim == self.n_dims + 2
        batch = x if is_batch else x.unsqueeze(0)
        if self.outside is not None:
            batch = F.pad(batch, self.outside, mode)
        ends = zip(batch.shape[2:], self.extents, self.stride, strict=True)
        outputs = [(size - extent) // step + 1 for size, extent, step in ends]
        if min(outputs) < 1:
            raise RuntimeError(
                f"input must be as large as the kernel, {self.kernel} of dilation {self.dilation}, when it "
                f"is padded; got {tuple(x.shape)}, which gives {tuple(outputs)} outputs"
            )
        y = self._unstacked(product(self._unfolded(batch)), len(batch), outputs[0])
        return y if is_batch else y.squeeze(0)

    def transpose(
        self, x: Tensor, product: Callable[[Tensor, Pair], Tensor], output_padding: Sequence[int]
    ) -> Tensor:
        """The transposed convolution of x: what the gradient of a convolution's input is.

        Parameters
        ----------
        x : (n, out_channels, *outputs), or without n
        product : callable
            Of images and the height and width that its results shall have: these,
            (n, geometry.in_channels, height, width).
        output_padding : sequence of int
            Outputs beyond the least number, as of `torch.nn.functional.conv_transpose2d`.

        Returns
        -------
        (n, in_channels, *size), or without n

        Raises
        ------
        RuntimeError
            If the output padding is negative or not below stride or dilation, or no output is left.
        """
        limits = [max(pair) for pair in zip(self.stride, self.dilation, strict=True)]
        if not all(0 <= more < limit for more, limit in zip(output_padding, limits, strict=True)):
            raise RuntimeError(
                f"output_padding must be at least 0 and below stride {self.stride} or dilation "
                f"{self.dilation}, got {tuple(output_padding)}"
            )
        is_batch = x.ndim == self.n_dims + 2
        batch = x if is_batch else x.unsqueeze(0)
        ends = zip(self.least(batch.shape[2:]), output_padding, strict=True)
        size = tuple(least + more for least, more in ends)
        if min(*size, *batch.shape[2:]) < 1:
            raise RuntimeError(
                f"input must have outputs, got {tuple(x.shape)}, of which {size} outputs are left"
            )
        # A whole stride of output padding is what further inputs would reach.
        further = [more // step for more, step in zip(output_padding, self.stride, strict=True)]
        if any(further):
            batch = F.pad(batch, [n for each in reversed(further) for n in (0, each)])
        images = self._stacked(batch)
        height, width = (1, *size)[-2:]
        y = self._folded(product(images, (height, width)), batch.shape[2], size)
        return y if is_batch else y.squeeze(0)

    def least(self, inputs: Sequence[int]) -> list[int]:
        """The smallest size of which a convolution makes so many outputs."""
        ends = zip(inputs, self.stride, self.extents, strict=True)
        return [(n - 1) * step + extent for n, step, extent in ends]

    def _unfolded(self, x: Tensor) -> Tensor:
        """Images, of (n, in_channels, *size)."""
        if self.depth is None:
            return x if self.n_dims == 2 else x.unsqueeze(2)
        kernel, stride, padding, dilation = self.depth
        padded = F.pad(x, [0, 0, 0, 0, padding, padding]) if padding else x
        length = (padded.shape[2] - dilation * (kernel - 1) - 1) // stride * stride + 1
        # (n, outputs, channels, kernel, height, width): the only copy. `Tensor.unfold`, which makes a view of
        # this, has a gradient that `torch.func.vmap` does not know.
        windows = torch.stack(
            [
                padded[:, :, first : first + length : stride].transpose(1, 2)
                for first in range(0, dilation * kernel, dilation)
            ],
            3,
        )
        return windows.flatten(2, 3).flatten(0, 1)

    def _folded(self, images: Tensor, n_slices: int, size: tuple[int, ...]) -> Tensor:
        """The transpose of `_unfolded`: (n, in_channels, *size) of images, so many for each of n."""
        if self.depth is None:
            return images if self.n_dims == 2 else images.squeeze(2)
        depth, *plane = size
        kernel, stride, padding, dilation = self.depth
        slices = torch.unflatten(images.flatten(2), 0, (len(images) // n_slices, n_slices))
        columns = slices.transpose(1, 2).flatten(2)
        volumes = F.fold(
            columns, (depth, plane[0] * plane[1]), (kernel, 1), (dilation, 1), (padding, 0), (stride, 1)
        )
        return torch.unflatten(volumes, 3, plane)

    def _stacked(self, y: Tensor) -> Tensor:
        """Images, of (n, out_channels, *outputs)."""
        if self.depth is None:
            return y if self.n_dims == 2 else y.unsqueeze(2)
        return y.transpose(1, 2).flatten(0, 1)

    def _unstacked(self, images: Tensor, n: int, n_slices: int) -> Tensor:
        """(n, out_channels, *outputs) of images, so many for each of n."""
        if self.depth is None:
            return images if self.n_dims == 2 else images.squeeze(2)
        return torch.unflatten(images, 0, (n, n_slices)).transpose(1, 2).contiguous()


def with_bias(y: Tensor, bias: Tensor | None, n_dims: int) -> Tensor:
    """The outputs (..., channels, *size) plus a bias (channels,) or None, in the dtype of the outputs.

    Raises
    ------
    RuntimeError
        If there is another number of biases.
    """
    if bias is None:
        return y
    channels = y.shape[-n_dims - 1]
    if bias.shape != (channels,):
        raise RuntimeError(f"bias must have shape ({channels},), got {tuple(bias.shape)}")
    return y + bias.to(y.dtype).reshape(channels, *[1] * n_dims)


def as_sizes(value: Size | Sequence[int], n_dims: int) -> tuple[int, ...]:
    """One number for each dimension.

    Raises
    ------
    ValueError
        If there is another number of them.
    """
    given = tuple(value) if isinstance(value, Iterable) else (value,)
    sizes = given * n_dims if len(given) == 1 else given
    if len(sizes) != n_dims:
        raise ValueError(f"sizes must be one number, or {n_dims}, got {value}")
    return sizes


def read_space(
    in_channels: int,
    groups: int,
    kernel: Sequence[int],
    stride: Size,
    padding: Size | str,
    dilation: Size,
    zeros: bool = True,
) -> Space:
    """What a convolution is, in the words of torch.

    Parameters
    ----------
    in_channels, groups, kernel, stride, padding, dilation
        As of `torch.nn.functional.conv2d` and its likes; the kernel has as many numbers as there are
        dimensions.
    zeros : bool
        Whether the padding is of zeros, which the convolution can have itself where both sides are alike.

    Raises
    ------
    ValueError
        If a convolution cannot have the numbers.
    """
    n_dims, kernel = len(kernel), tuple(kernel)
    strides, dilations = as_sizes(stride, n_dims), as_sizes(dilation, n_dims)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f'padding must be numbers, "same" or "valid", got {padding!r}')
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel, strict=True)]
        sides = [(n // 2, n - n // 2) for n in total]
    else:
        sides = [(n, n) for n in as_sizes(padding, n_dims)]
    inside = all(before == after and (zeros or before == 0) for before, after in sides)
    added = tuple(before if inside else 0 for before, _ in sides)
    outside = None if inside else [n for side in reversed(sides) for n in side]
    numbers = kernel, strides, added, dilations
    depth = Depth(*(each[0] for each in numbers)) if n_dims == 3 else None
    if depth is not None:
        in_channels *= _checked(depth).kernel
    (a, b), (s, t), (p, q), (d, e) = (
        (neutral, *each)[-2:] for neutral, each in zip((1, 1, 0, 1), numbers, strict=True)
    )
    geometry = Geometry.of([in_channels, groups, a, b, s, t, p, q, d, e])
    extents = tuple(d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilations, added, strict=True))
    return Space(geometry, depth, *numbers, extents, outside, n_dims)


def _checked(depth: Depth) -> Depth:
    if min(depth.kernel, depth.stride, depth.dilation) < 1 or depth.padding < 0:
        raise ValueError(
            "kernel, stride and dilation must be at least 1 and padding at least 0 along the depth, got "
            f"{tuple(depth)}"
        )
    return depth
