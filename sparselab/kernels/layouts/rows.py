"""Compressed rows as arrays alone: as compiled code reads them, and what must hold of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sparselab.kernels.arrays import Array, check_integers, for_kernels


class RowArrays(NamedTuple):
    """The arrays of a `RowTopology` as compiled code reads them; see `sparselab.kernels.arrays.Rows`."""

    shape: tuple[int, int]
    indptr: Array
    row_nnz: Array
    indices: Array
    nnz: int

    @property
    def rows(self) -> RowArrays:
        """Itself."""
        return self

    @classmethod
    def of(cls, shape: tuple[int, int], indptr: Array, row_nnz: Array, indices: Array) -> RowArrays:
        """Those of read-only arrays, whose memory they share."""
        nnz = int(row_nnz.sum())
        return cls(shape, for_kernels(indptr), for_kernels(row_nnz), for_kernels(indices), nnz)


def check_rows(indptr: Array, row_nnz: Array) -> None:
    """Raise ValueError unless rows follow each other and have room for their live slots."""
    # Compared, not subtracted: a difference of hostile numbers can wrap around to a harmless one.
    if indptr[0] < 0 or np.any(indptr[1:] < indptr[:-1]):
        raise ValueError(f"indptr must start at 0 or above and never decrease, got {indptr}")
    over = (row_nnz < 0) | (row_nnz > np.diff(indptr))
    if np.any(over):
        row = int(np.argmax(over))
        space = int(indptr[row + 1] - indptr[row])
        raise ValueError(f"row_nnz[{row}] must be between 0 and the row's {space} slots, got {row_nnz[row]}")


def check_columns(n_columns: int, indptr: Array, row_nnz: Array, indices: Array) -> None:
    """Raise ValueError unless the live columns are of the matrix and strictly ascending in each row."""
    # Slots are listed, at 8 bytes each, only where some are spare.
    index = indices if int(row_nnz.sum()) == len(indices) else indices[live_slots(indptr, row_nnz)]
    check_range(index, n_columns)
    rising = index[1:] > index[:-1]
    begins = np.cumsum(row_nnz)[:-1]
    rising[begins[(begins > 0) & (begins < len(index))] - 1] = True
    if not np.all(rising):
        k = int(np.argmin(rising))
        row = int(np.searchsorted(np.cumsum(row_nnz), k, side="right"))
        raise ValueError(
            "indices must be strictly ascending within a row, "
            f"got {index[k]} before {index[k + 1]} in row {row}"
        )


def check_range(columns: Array, n_columns: int) -> None:
    """Raise ValueError unless all columns, of whatever integer dtype, are of the matrix."""
    # As Python's integers: the columns may be narrow and unsigned.
    if len(columns) and not ((least := int(columns.min())) >= 0 and int(columns.max()) < n_columns):
        worst = least if least < 0 else int(columns.max())
        raise ValueError(f"indices must be columns of 0..{n_columns - 1}, got {worst}")


def spare_slots(row_nnz: Array, padding: float) -> Array:
    """Spare slots of each row, a fraction of its entries rounded up; ValueError if that is no count."""
    if not 0 <= padding < np.inf:
        raise ValueError(f"padding must be a finite number of at least 0, got {padding}")
    spare = np.ceil(row_nnz * padding)
    if spare.sum() >= 1 << 62:
        raise ValueError(f"padding must leave fewer than 2**62 slots spare, got {padding}")
    return spare.astype(np.int64)


def live_slots(indptr: Array, row_nnz: Array) -> Array:
    """int64 array: the live slots, row after row."""
    nnz = int(row_nnz.sum())
    if int(indptr[-1]) == nnz:
        return np.arange(nnz)
    before = np.cumsum(row_nnz) - row_nnz
    return np.repeat(indptr[:-1] - before, row_nnz) + np.arange(nnz)


def check_ascending(name: str, integers: Array) -> Array:
    """The integers as kernels read them; TypeError or ValueError unless they are such and never decrease."""
    plain = for_kernels(check_integers(name, integers))
    if np.any(plain[1:] < plain[:-1]):
        raise ValueError(f"{name} must be in ascending order, got {plain}")
    return plain
