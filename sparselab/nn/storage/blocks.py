"""Matrices as blocks, and patterns that consist of whole ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparselab.kernels.layouts.block_csr import grid_of
from sparselab.nn.storage.patterns import read_pattern

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


def read_blocks(pattern: Any, shape: Shape, block_shape: Shape) -> tuple[Tensor, Tensor | None]:
    """Positions of the blocks of a pattern in the grid, and their weights if the pattern has some.

    Parameters
    ----------
    pattern : see `read_pattern`
        Of the shape of the matrix, in whole blocks, or boolean, of the shape of the grid.
    shape, block_shape : (int, int)

    Raises
    ------
    TypeError, ValueError
        As `read_pattern`; and if the pattern has another shape, or part of a block is missing.
    """
    grid = grid_of(shape, block_shape)
    given, positions, weights = read_pattern(pattern)
    if given == grid and weights is None:
        return positions, None
    if given != shape:
        raise ValueError(
            f"pattern must have the shape of the layer, {shape}, or if it is boolean that of its grid, "
            f"{grid}; got {given}"
        )
    (row, i), (column, j) = (
        (at // size, at % size)
        for at, size in zip((positions // shape[1], positions % shape[1]), block_shape, strict=True)
    )
    kept, slot, counts = torch.unique(row * grid[1] + column, return_inverse=True, return_counts=True)
    rows, columns = (
        (n - at * size).clamp(max=size)
        for at, n, size in zip((kept // grid[1], kept % grid[1]), shape, block_shape, strict=True)
    )
    if bool((counts != rows * columns).any()):
        raise ValueError(f"pattern must consist of whole blocks of shape {block_shape}")
    if weights is None:
        return kept, None
    values = weights.new_zeros((len(kept), *block_shape))
    values[slot, i, j] = weights
    return kept, values
