"""Rewriting compressed rows, one connection after the other."""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array, index_dtype
from sparselab.kernels.layouts.padded_csr import RowTopology


def rewrite(
    topology: RowTopology, drop: Array, grow: Array, *, compact: bool = False
) -> tuple[RowTopology, Array]:
    """Remove the connections in the slots `drop`, then add those at the positions `grow`."""
    old = dict(zip(topology.positions().tolist(), topology.live_slots().tolist(), strict=True))
    dropped = set(np.asarray(drop).tolist())
    new = {position: slot for position, slot in old.items() if slot not in dropped}
    new.update({position: old.get(position, -1) for position in np.asarray(grow).tolist()})
    n_rows, columns = topology.shape
    per_row: list[list[tuple[int, int]]] = [[] for _ in range(n_rows)]
    for position, slot in sorted(new.items()):
        per_row[position // columns].append((position % columns, slot))
    counts = np.array([len(row) for row in per_row], np.int64)
    if not compact and np.all(counts <= np.diff(topology.indptr)):
        indptr = topology.indptr
    else:
        spare = 0 if compact else max(topology.capacity - int(counts.sum()), 0)
        extra = [spare * (i + 1) // n_rows - spare * i // n_rows for i in range(n_rows)]
        indptr = np.concatenate([[0], np.cumsum(counts + extra)]).astype(np.int64)
    indices = np.zeros(indptr[-1], index_dtype(columns))
    source = np.full(indptr[-1], -1, np.int64)
    for i, row in enumerate(per_row):
        for k, (column, slot) in enumerate(row):
            indices[indptr[i] + k], source[indptr[i] + k] = column, slot
    return RowTopology(topology.shape, indptr, counts, indices), source
