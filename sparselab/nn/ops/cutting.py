"""Matrices as blocks."""

from __future__ import annotations

from torch import Tensor

from sparselab.kernels.layouts.block_csr import grid_of

Shape = tuple[int, int]


def cut(dense: Tensor, block_shape: Shape) -> Tensor:
    """All blocks of a matrix, (blocks, *block_shape), row by row; what lies outside the matrix is 0."""
    grid = grid_of((dense.shape[0], dense.shape[1]), block_shape)
    (rows, columns), (height, width) = grid, block_shape
    whole = dense.new_zeros((rows * height, columns * width))
    whole[: dense.shape[0], : dense.shape[1]] = dense
    return whole.view(-1, height, columns, width).transpose(1, 2).reshape(-1, height, width)


def join(blocks: Tensor, shape: Shape) -> Tensor:
    """The matrix of that shape whose blocks these are: the inverse of `cut`."""
    height, width = blocks.shape[1:]
    rows, columns = grid_of(shape, (height, width))
    whole = blocks.view(rows, columns, height, width).transpose(1, 2).reshape(rows * height, -1)
    return whole[: shape[0], : shape[1]]
