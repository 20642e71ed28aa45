"""A set of positions of one layer, one bit each."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparselab.kernels.arrays import Array


class PositionSet:
    """Positions below `size`, in ``size / 8`` bytes.

    Parameters
    ----------
    size : int

    Attributes
    ----------
    bits : uint8 array, (ceil(size / 8),)
        Bit ``p % 8`` of byte ``p // 8`` says whether p is a member.
    count : int
        Members.
    """

    def __init__(self, size: int) -> None:
        self.bits = np.zeros(-(-size // 8), np.uint8)
        self.count = 0

    def has(self, positions: Array) -> npt.NDArray[np.bool_]:
        """(n,): which of the positions are members."""
        found: npt.NDArray[np.bool_] = (
            self.bits[positions >> 3] >> (positions & 7).astype(np.uint8)
        ) & 1 != 0
        return found

    def add(self, positions: Array) -> None:
        """Make members of positions, strictly ascending. O(n)."""
        new = positions[~self.has(positions)]
        if not new.size:
            return
        byte = new >> 3
        first = np.flatnonzero(np.diff(byte, prepend=-1))
        bit = np.left_shift(np.uint8(1), (new & 7).astype(np.uint8))
        self.bits[byte[first]] |= np.bitwise_or.reduceat(bit, first)
        self.count += new.size
