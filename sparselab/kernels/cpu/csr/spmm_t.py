"""Transposed sparse x dense: ``DX = W^T DY``, by gathering along the transpose's rows.

The plan holds the transpose's order; the values are brought into it once per call (4 bytes read at random and
4 written per connection, against one tile row per connection and tile of tokens), and the rest is the loop of
`spmm`. Scattering along W's own rows needs no plan, but stores a tile row per connection and ran 1 to 2 times
slower.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.csr.plan import TransposePlan
from sparselab.kernels.cpu.csr.skinny import MOST_TOKENS, address, matrix, multiply_few
from sparselab.kernels.cpu.csr.spmm import multiply
from sparselab.kernels.cpu.runtime.jit import aligned_empty, jit, launch, worker_count
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.vectors import get, weight

_MIN_SHARE = 16384


@jit
def _gather_share(share, n_shares, values, slots, out):  # type: ignore[no-untyped-def]
    if spread(share, n_shares):
        return
    n = len(slots)
    for k in range(share * n // n_shares, (share + 1) * n // n_shares):
        out[k] = weight(values, np.int64(get(slots, k)))


def gather(values: Array, slots: Array, dtype: np.dtype[Any]) -> Array:
    """The values, or those whose bits are given in uint16, in the order of the slots."""
    ordered = aligned_empty(len(slots), dtype)
    n_shares = 1 if len(slots) < 2 * _MIN_SHARE else min(worker_count(), len(slots) // _MIN_SHARE)
    launch(_gather_share, n_shares, values, slots, ordered)
    return ordered


def multiply_t(values: Array, plan: TransposePlan, DY: Array, DX: Array) -> None:
    """``DX = W^T DY``; DY and DX may have any strides and are not checked; DX is overwritten."""
    transposed = gather(values, plan.slots, DX.dtype)
    if DY.shape[1] <= MOST_TOKENS:
        offsets = np.zeros(DX.shape[0], DX.dtype)
        begin, end = plan.indptr[:-1], plan.indptr[1:]
        multiply_few(
            address(transposed), transposed, plan.indices, begin, end, address(offsets), offsets,
            matrix(DY), matrix(DX), worker_count(),
        )  # fmt: skip
    else:
        multiply(transposed, plan.indices, plan.segments, DY, DX)
