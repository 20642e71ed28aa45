"""Moving matrices into tiles and out of them.

A tile holds `width` tokens of some rows of a matrix, feature-major: ``tile[r * width + t]`` is row r, token
t, so that one row of a tile is one vector (`TILE_BYTES`). The matrices themselves may have any strides; in
the token-major case of PyTorch 8 x 8 register transposes move whole cache lines, about as fast as a copy.
Such a matrix is asked for ahead: each token lies in memory pages of its own, so the CPU foresees little.
Numbers in bfloat16, by their bits in uint16, are widened to float32 on their way into a tile, and rounded to
nearest even on their way out.
"""

from __future__ import annotations

from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.simd.bfloat16 import put_number
from sparselab.kernels.cpu.simd.transpose import transpose8
from sparselab.kernels.cpu.simd.vectors import (
    add,
    get,
    line_width,
    load,
    prefetch,
    prefetch_to_write,
    store,
    weight,
    zeros8,
)

#: Cache lines between the one in work and the one that is asked for.
_AHEAD = 2


@jit
def pack(x, start, row_stride, token_stride, n_rows, n_tokens, tile, width):  # type: ignore[no-untyped-def]
    """Fill `tile` from ``x[start + r * row_stride + t * token_stride]``; missing tokens become zeros."""
    if row_stride == 1:
        blocked_rows, blocked_tokens = n_rows // 8 * 8, n_tokens // 8 * 8
        line = line_width(tile)
        whole_lines = n_rows // line * line
        for t in range(0, blocked_tokens, 8):
            first = start + t * token_stride
            for r0 in range(0, whole_lines, line):
                for i in range(8):
                    prefetch(x, first + i * token_stride + r0 + _AHEAD * line)
                for r in range(r0, r0 + line, 8):
                    transpose8(x, first + r, token_stride, tile, r * width + t, width)
            for r in range(whole_lines, blocked_rows, 8):
                transpose8(x, first + r, token_stride, tile, r * width + t, width)
        for r in range(blocked_rows):
            for t in range(blocked_tokens, n_tokens):
                tile[r * width + t] = weight(x, start + r + t * token_stride)
        for r in range(blocked_rows, n_rows):
            for t in range(n_tokens):
                tile[r * width + t] = weight(x, start + r + t * token_stride)
    elif token_stride == 1:
        for r in range(n_rows):
            for t in range(n_tokens):
                tile[r * width + t] = weight(x, start + r * row_stride + t)
    else:
        for r in range(n_rows):
            for t in range(n_tokens):
                tile[r * width + t] = weight(x, start + r * row_stride + t * token_stride)
    if n_tokens < width:
        for r in range(n_rows):
            tile[r * width + n_tokens : (r + 1) * width] = 0


@jit
def unpack(tile, width, n_rows, n_tokens, y, start, row_stride, token_stride):  # type: ignore[no-untyped-def]
    """Store the tile's first `n_tokens` tokens at ``y[start + r * row_stride + t * token_stride]``."""
    blocked_rows, blocked_tokens = n_rows // 8 * 8, n_tokens // 8 * 8
    if row_stride != 1:
        blocked_tokens = 0
    line = line_width(tile)
    whole_lines = n_rows // line * line
    for t in range(0, blocked_tokens, 8):
        first = start + t * token_stride
        for r0 in range(0, whole_lines, line):
            for i in range(8):
                prefetch_to_write(y, first + i * token_stride + r0 + _AHEAD * line)
            for r in range(r0, r0 + line, 8):
                transpose8(tile, r * width + t, width, y, first + r, token_stride)
        for r in range(whole_lines, blocked_rows, 8):
            transpose8(tile, r * width + t, width, y, first + r, token_stride)
        for r in range(blocked_rows, n_rows):
            for i in range(t, t + 8):
                put_number(y, start + r + i * token_stride, get(tile, r * width + i))
    for r in range(n_rows):
        for t in range(blocked_tokens, n_tokens):
            put_number(y, start + r * row_stride + t * token_stride, get(tile, r * width + t))


@jit
def add_tokens(tile, first, n_rows, width, length, partial, row0):  # type: ignore[no-untyped-def]
    """Add tokens of tile rows to the 8 lanes that `partial` has for each of `n_rows`, from `row0` on.

    The rows are `width` numbers each, from row `first` on; `length` of these count, which are whole lanes.
    """
    like = zeros8(tile)
    for r in range(n_rows):
        total = load(partial, (row0 + r) * 8, like)
        at = (first + r) * width
        for t in range(at, at + length, 8):
            total = add(total, load(tile, t, like))
        store(partial, (row0 + r) * 8, total)
