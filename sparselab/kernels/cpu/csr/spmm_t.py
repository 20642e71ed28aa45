"""Transposed sparse x dense: ``DX = W^T DY``, by gathering along the transpose's rows.

The plan holds the transpose's order; the values are brought into it once per call (see `order`: 6 bytes read
and 4 written at random per connection, against one tile row per connection and tile of tokens), and the rest
is the loop of `spmm`. Scattering along W's own rows needs no plan, but stores a tile row per connection and
ran 1 to 2 times slower.
"""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array, Rows, address
from sparselab.kernels.cpu.csr.order import into_order
from sparselab.kernels.cpu.csr.plan import TransposePlan
from sparselab.kernels.cpu.csr.skinny import MOST_TOKENS, matrix, multiply_skinny
from sparselab.kernels.cpu.csr.spmm import multiply
from sparselab.kernels.cpu.runtime.launch import worker_count


def multiply_t(values: Array, W: Rows, plan: TransposePlan, DY: Array, DX: Array) -> None:
    """``DX = W^T DY``; DY and DX may have any strides and are not checked; DX is overwritten."""
    transposed = into_order(address(values), values, W, plan.order, DX.dtype)
    if DY.shape[1] <= MOST_TOKENS:
        offsets = np.zeros(DX.shape[0], DX.dtype)
        begin, end = plan.indptr[:-1], plan.indptr[1:]
        multiply_skinny(
            (address(transposed), transposed, None), plan.indices, begin, end, address(offsets), offsets,
            matrix(DY), matrix(DX), worker_count(),
        )  # fmt: skip
    else:
        multiply(transposed, plan.indices, plan.segments, DY, DX)
