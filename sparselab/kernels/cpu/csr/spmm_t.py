"""Transposed sparse x dense: ``DX = W^T DY``, by gathering along the transpose's rows.

The plan holds the transpose's order; the values are brought into it once per call (4 bytes read at random and
4 written per connection, against one tile row per connection and tile of tokens), and the rest is the loop of
`spmm`. Scattering along W's own rows needs no plan, but stores a tile row per connection and ran 1 to 2 times
slower.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparselab.kernels.arrays import Array, address
from sparselab.kernels.cpu.csr.plan import TransposePlan
from sparselab.kernels.cpu.csr.skinny import MOST_TOKENS, matrix, multiply_skinny
from sparselab.kernels.cpu.csr.spmm import multiply
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.memory import scratch_of_values
from sparselab.kernels.cpu.runtime.team import spread
from sparselab.kernels.cpu.simd.vectors import get, view_at, weight

_MIN_PART = 16384


@jit
def _gather_values(worker, n_workers, values_at, bits, slots, out):  # type: ignore[no-untyped-def]
    if spread(worker, n_workers):
        return
    n, values = len(slots), view_at(values_at, bits)
    for k in range(worker * n // n_workers, (worker + 1) * n // n_workers):
        out[k] = weight(values, np.int64(get(slots, k)))


def gather(values_at: int, bits: Array, slots: Array, dtype: np.dtype[Any]) -> Array:
    """The values at an address, of the dtype of `bits`, in the order of the slots, and what lies behind them.

    bfloat16 is given as its bits in uint16. The array is lent until the next call in the same thread.
    """
    ordered = scratch_of_values(len(slots), dtype)
    n_workers = 1 if len(slots) < 2 * _MIN_PART else min(worker_count(), len(slots) // _MIN_PART)
    launch(_gather_values, n_workers, values_at, bits, slots, ordered)
    return ordered


def multiply_t(values: Array, plan: TransposePlan, DY: Array, DX: Array) -> None:
    """``DX = W^T DY``; DY and DX may have any strides and are not checked; DX is overwritten."""
    transposed = gather(address(values), values, plan.slots, DX.dtype)
    if DY.shape[1] <= MOST_TOKENS:
        offsets = np.zeros(DX.shape[0], DX.dtype)
        begin, end = plan.indptr[:-1], plan.indptr[1:]
        multiply_skinny(
            (address(transposed), transposed, None), plan.indices, begin, end, address(offsets), offsets,
            matrix(DY), matrix(DX), worker_count(),
        )  # fmt: skip
    else:
        multiply(transposed, plan.indices, plan.segments, DY, DX)
