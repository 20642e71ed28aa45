"""What a convolution is beside its weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch.nn.modules.utils import _pair

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """What a convolution is beside its weights: W is (out_channels, in_channels // groups * elements)."""

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


def read_geometry(
    in_channels: int,
    groups: int,
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    zeros: bool = True,
) -> tuple[Geometry, list[int] | None]:
    """What a convolution is, in the words of torch: the geometry, and what is to be padded before.

    Parameters
    ----------
    in_channels, groups, kernel, stride, padding, dilation
        As of `torch.nn.functional.conv2d`.
    zeros : bool
        Whether the padding is of zeros, which the geometry can have itself where both sides are alike.

    Returns
    -------
    Geometry
    list of int, or None
        As `torch.nn.functional.pad` takes it; None if there is nothing to pad.

    Raises
    ------
    ValueError
        If a convolution cannot have the numbers.
    """
    kernel_size, strides, dilations = _pair(kernel), _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f'padding must be numbers, "same" or "valid", got {padding!r}')
        total = [d * (k - 1) for d, k in zip(dilations, kernel_size, strict=True)]
        total = total if padding == "same" else [0, 0]
        sides = [(n // 2, n - n // 2) for n in total]
    else:
        sides = [(n, n) for n in _pair(padding)]
    (top, bottom), (left, right) = sides
    inside = zeros and top == bottom and left == right
    added = (top, left) if inside else (0, 0)
    geometry = Geometry.of([in_channels, groups, *kernel_size, *strides, *added, *dilations])
    return geometry, None if inside else [left, right, top, bottom]
