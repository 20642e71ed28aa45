"""Images as planes in which a convolution is a sum of shifted rows.

A chunk of images is laid out channel by channel: row after row of all images, with the zeros of the padding
between them. A window that moves by one pixel then moves by one number, and from row to row and from image to
image by constants, so output t of a kernel element is ``plane[t + shift]`` for every t: the unfolded batch is
there without being made. Zeros between two rows serve as the end of one and the beginning of the next. Some t
belong to no output; what is computed for them is never read.

With a stride of s, pixels ``s * a + phase`` of each phase that some kernel element meets make a plane of
their own, in which windows move by one pixel again.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from sparselab.kernels.arrays import Array, address
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.target import CACHE_LINE, TILE_BYTES
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.transpose import transpose8
from sparselab.kernels.cpu.simd.vectors import get, put, view_at

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the pixels of an image are in its planes.

    Attributes
    ----------
    outputs : (int, int)
        Rows and columns of outputs.
    rows, pitch : int
        Rows of one image in a plane, and numbers of a row, zeros included.
    tail : int
        The largest shift.
    phase, shift : int64 array, (kernel elements,)
        Which of the planes of a channel a kernel element reads, and how far along.
    phases : int64 array, (planes of a channel, 6)
        Of rows: first one in the plane, how many, which pixel that is; the same of columns.
    step : (int, int)
        Pixels from one number of a plane to the next, down and right.
    """

    outputs: Pair
    rows: int
    pitch: int
    tail: int
    phase: Array
    shift: Array
    phases: Array
    step: Pair

    @property
    def tokens(self) -> int:
        """Numbers of one image in a plane."""
        return self.rows * self.pitch

    def is_onto(self, size: Pair) -> bool:
        """Whether every pixel of an image of this size is in a plane."""
        return int((self.phases[:, 1] * self.phases[:, 4]).sum()) == size[0] * size[1]


@functools.lru_cache(maxsize=256)
def input_grid(size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Grid:
    """The grid of images of this size for a convolution with these settings; it has an output."""
    axes = [_Axis(*of_axis) for of_axis in zip(size, kernel, stride, padding, dilation, strict=True)]
    down, right = axes
    phases = sorted({(int(a), int(b)) for a in down.phase for b in right.phase})
    number = {phase: at for at, phase in enumerate(phases)}
    elements = [(i, j) for i in range(kernel[0]) for j in range(kernel[1])]
    shift = np.array([down.shift[i] * right.extent + right.shift[j] for i, j in elements], np.int64)
    return Grid(
        (down.outputs, right.outputs), down.extent, right.extent, int(shift.max()),
        np.array([number[down.phase[i], right.phase[j]] for i, j in elements], np.int64), shift,
        np.array([(*down.pixels(a), *right.pixels(b)) for a, b in phases], np.int64), stride,
    )  # fmt: skip


def output_grid(grid: Grid) -> Grid:
    """The grid of the outputs themselves, of the same rows and pitch."""
    rows, columns = grid.outputs
    one = np.zeros(1, np.int64)
    phases = np.array([(0, rows, 0, 0, columns, 0)], np.int64)
    return Grid(grid.outputs, grid.rows, grid.pitch, 0, one, one, phases, (1, 1))


class _Axis:
    """One direction: output o of kernel element k reads number ``o + shift[k]`` of phase ``phase[k]``."""

    def __init__(self, size: int, kernel: int, stride: int, padding: int, dilation: int) -> None:
        reach = np.arange(kernel) * dilation
        self.size, self.stride, self.padding = size, stride, padding
        self.outputs = (size + 2 * padding - int(reach[-1]) - 1) // stride + 1
        self.shift, self.phase = np.divmod(reach, stride)
        self.read = self.outputs + int(self.shift[-1])
        first, count = zip(*(self.pixels(int(phase))[:2] for phase in self.phase), strict=True)
        before = min(first)
        after = self.read - max(a + n for a, n in zip(first, count, strict=True))
        # Not more than the largest shift, so that no two outputs fall together.
        self.extent = self.read - max(0, min(before, after, int(self.shift[-1])))

    def pixels(self, phase: int) -> tuple[int, int, int]:
        """Where the phase's pixels begin, how many are read, and which is the first."""
        first = max(0, -((phase - self.padding) // self.stride))
        pixel = first * self.stride + phase - self.padding
        there = max(0, -((pixel - self.size) // self.stride))
        return first, max(0, min(self.read - first, there)), pixel


def plane_stride(n_tokens: int, itemsize: int) -> int:
    """Items from plane to plane, an odd number of cache lines, so that planes do not share cache sets."""
    line = CACHE_LINE // itemsize
    return (-(-n_tokens // line) | 1) * line


def whole_tiles(n_tokens: int, itemsize: int) -> int:
    """The tokens, rounded up to whole tiles of `multiply_shifted`."""
    width = 2 * TILE_BYTES // itemsize
    return -(-n_tokens // width) * width


@jit
def _copy(source, at, step, target, to, target_step, count):  # type: ignore[no-untyped-def]
    if step == 1 and target_step == 1:
        for k in range(count):
            put(target, to + k, get(source, at + k))
    else:
        for k in range(count):
            put(target, to + k * target_step, get(source, at + k * step))


@jit
def _move_eight(fill, x, at, across, planes, inside, plane_step, count):  # type: ignore[no-untyped-def]
    """Copy a row of pixels between eight channels, which lie together in the images, and their planes."""
    whole = count // 8 * 8
    for k in range(0, whole, 8):
        if fill:
            transpose8(x, at + k * across, across, planes, inside + k, plane_step)
        else:
            transpose8(planes, inside + k, plane_step, x, at + k * across, across)
    for k in range(whole, count):
        for c in range(8):
            if fill:
                put(planes, inside + c * plane_step + k, get(x, at + k * across + c))
            else:
                put(x, at + k * across + c, get(planes, inside + c * plane_step + k))


@jit
def _move_channels(  # type: ignore[no-untyped-def]
    worker, n_workers, fill, x_at, strides, n_images, phases, step, rows, pitch, planes, stride, margin
):
    """As `_move_pixels`, for images whose channels lie together, a multiple of eight of them."""
    if spread(worker, n_workers):
        return
    x = view_at(x_at, planes)
    per_channel = len(phases)
    n_groups = len(planes) // stride // per_channel // 8
    across = step[1] * strides[3]
    for group in range(worker * n_groups // n_workers, (worker + 1) * n_groups // n_workers):
        first = group * 8 * per_channel * stride
        if fill:
            planes[first : first + 8 * per_channel * stride] = 0
        for n in range(n_images):
            for f in range(per_channel):
                phase = phases[f]
                for a in range(phase[1]):
                    inside = first + f * stride + margin + (n * rows + phase[0] + a) * pitch + phase[3]
                    outside = n * strides[0] + group * 8
                    outside += (phase[2] + a * step[0]) * strides[2] + phase[5] * strides[3]
                    _move_eight(fill, x, outside, across, planes, inside, per_channel * stride, phase[4])


@jit
def _move_pixels(  # type: ignore[no-untyped-def]
    worker, n_workers, fill, x_at, strides, n_images, phases, step, rows, pitch, planes, stride, margin
):
    """Copy the pixels of some planes from the images, with zeros around them, or back to the images."""
    if spread(worker, n_workers):
        return
    x = view_at(x_at, planes)
    per_channel = len(phases)
    n_planes = len(planes) // stride
    for plane in range(worker * n_planes // n_workers, (worker + 1) * n_planes // n_workers):
        channel, phase = plane // per_channel, phases[plane % per_channel]
        if fill:
            planes[plane * stride : (plane + 1) * stride] = 0
        across = step[1] * strides[3]
        for n in range(n_images):
            for a in range(phase[1]):
                inside = plane * stride + margin + (n * rows + phase[0] + a) * pitch + phase[3]
                outside = n * strides[0] + channel * strides[1]
                outside += (phase[2] + a * step[0]) * strides[2] + phase[5] * strides[3]
                if fill:
                    _copy(x, outside, across, planes, inside, 1, phase[4])
                else:
                    _copy(planes, inside, 1, x, outside, across, phase[4])


def fill_planes(images: Array, grid: Grid, planes: Array, margin: int = 0) -> None:
    """Lay images (n, channels, height, width) of any strides out in planes (channels * phases, numbers).

    They begin `margin` from the beginning of a plane. Every other number of the planes becomes 0.
    """
    _move(True, images, grid, planes, margin)


def read_planes(images: Array, grid: Grid, planes: Array) -> None:
    """Write the pixels that planes (channels * phases, numbers) hold to images of any strides."""
    _move(False, images, grid, planes, 0)


def _move(fill: bool, images: Array, grid: Grid, planes: Array, margin: int) -> None:
    strides = tuple(step // images.itemsize for step in images.strides)
    n_channels = images.shape[1]
    together = strides[1] == 1 and strides[3] > 1 and n_channels > 0 and n_channels % 8 == 0
    kernel, parts = (_move_channels, n_channels // 8) if together else (_move_pixels, len(planes))
    launch(
        kernel, min(worker_count(planes.size), parts), fill, address(images), strides, len(images),
        grid.phases, grid.step, grid.rows, grid.pitch, planes.reshape(-1), planes.shape[1], margin,
    )  # fmt: skip
