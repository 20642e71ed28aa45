"""What each of the eight tiles is for, and the instructions on them, for all products.

Tiles 0 to 3 are sums, 16 x 16 each, which together are 32 x 32: their names tell which of two rows and
columns of tiles they are. 4 and 5 are the rows of a product, 6 and 7 the pairs; see
`sparselab.kernels.cpu.simd.matrix_tiles`.
"""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.simd.matrix_tiles import dot, load_tile, store_tile, zero

#: Rows and columns of one tile of sums, and of the four together.
STRIP, PANEL = 16, 32

zero00, zero10, zero01, zero11 = (zero(tile) for tile in range(4))
load00, load10, load01, load11 = (load_tile(tile) for tile in range(4))
store00, store10, store01, store11 = (store_tile(tile) for tile in range(4))
rows0, rows1, pairs0, pairs1 = (load_tile(tile) for tile in range(4, 8))
dot00, dot10, dot01, dot11 = dot(0, 4, 6), dot(1, 5, 6), dot(2, 4, 7), dot(3, 5, 7)


def configuration(depth: int) -> Array:
    """What the unit is told of its tiles, for instructions that sum over so many entries."""
    told = np.zeros(64, np.uint8)
    told[0] = 1
    row_bytes, n_rows = told[16:32].view(np.uint16), told[48:56]
    row_bytes[:8] = 64
    row_bytes[4:6] = 2 * depth
    n_rows[:6] = STRIP
    n_rows[6:8] = depth // 2
    return told
