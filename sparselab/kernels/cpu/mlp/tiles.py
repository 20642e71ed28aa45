"""Hidden numbers in tiles: how they lie in memory, and what is done to those of a group of rows."""

from __future__ import annotations

from typing import NamedTuple

from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.simd.activations import activation, activation_and_gradient
from sparselab.kernels.cpu.simd.vectors import lanes_of, load, put, store, stream, zeros_register


class Tiling(NamedTuple):
    """Where row r of a tile of tokens is, if all tiles have so many rows.

    `together` tiles share a row of memory, `stride` numbers long, as gradients by blocks want them; else a
    tile is `width` numbers of its first row, of its second, and so on.
    """

    rows: int
    width: int
    together: int
    stride: int


@jit
def first_of(tiling, tile):  # type: ignore[no-untyped-def]
    """Where the first row of a tile begins."""
    block = tile // tiling.together
    return block * tiling.rows * tiling.stride + (tile - block * tiling.together) * tiling.width


@jit
def activate(kind, tile, first, last, saved, shift):  # type: ignore[no-untyped-def]
    """Apply a nonlinearity to ``tile[first : last]``; what it is applied to goes to ``saved[shift:]``.

    Unless the shift is negative.
    """
    like = zeros_register(tile)
    for k in range(first, last, lanes_of(like)):
        x = load(tile, k, like)
        if shift >= 0:
            stream(saved, shift + k, x)
        store(tile, k, activation(kind, x))


@jit
def differentiate(kind, tile, row0, row1, width, tokens, saved, shift, grads, values, place, stride):  # type: ignore[no-untyped-def]
    """Multiply the rows of gradients in `tile` by the derivative, at ``saved[shift:]``.

    The products and the values of the nonlinearity also go to `grads` and `values`, whose row 0 is at
    `place`, with zeros for missing tokens.
    """
    like = zeros_register(tile)
    zero = tile.dtype.type(0)
    for r in range(row0, row1):
        to = place + r * stride
        for k in range(0, width, lanes_of(like)):
            x, grad = load(saved, shift + r * width + k, like), load(tile, r * width + k, like)
            value, grad = activation_and_gradient(kind, x, grad)
            store(tile, r * width + k, grad)
            store(grads, to + k, grad)
            store(values, to + k, value)
        for k in range(tokens, width):
            put(grads, to + k, zero)
            put(values, to + k, zero)
