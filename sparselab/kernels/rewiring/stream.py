"""A matrix that is never held whole: it arrives as blocks of rows."""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
import numpy.typing as npt

from sparselab.kernels.arrays import Array, for_kernels


def float_bits(scores: Array) -> tuple[Array, np.int64, np.int64]:
    """The scores as integers of the same width, the mask of their magnitude, and the bits of infinity.

    Magnitudes order like these integers, so they can be counted by their leading bits.
    """
    integer = np.dtype(np.int32 if scores.dtype == np.float32 else np.int64)
    infinity = np.array(np.inf, scores.dtype).view(integer)
    return scores.view(integer), np.int64(np.iinfo(integer).max), np.int64(infinity)


class BlockStream(abc.ABC):
    """A matrix that arrives as blocks of rows, of which something is kept.

    Parameters
    ----------
    n_columns : int
        Columns of the matrix.
    dtype : float32 or float64
        Type of the blocks.

    Attributes
    ----------
    finite : bool
        False once a NaN or an infinity was met; there is no result then.
    live_scores : float array
        ``|entry|`` at the slots of a sparse matrix, as far as they were seen.
    """

    live_scores: npt.NDArray[np.floating[Any]]

    def __init__(self, n_columns: int, dtype: npt.DTypeLike) -> None:
        self._n_columns = n_columns
        self._dtype = np.dtype(dtype)
        self._next_row = 0
        self.finite = True

    def push(self, first_row: int, block: npt.NDArray[np.floating[Any]]) -> None:
        """Take in the rows from `first_row` on.

        Parameters
        ----------
        first_row : int
            The row of the matrix that ``block[0]`` is; must follow the rows already seen.
        block : float array, (n_rows, n_columns)
            C-contiguous, of the declared type. Read only, not kept.

        Raises
        ------
        ValueError
            If the block is of another width, type or memory order, or comes out of order.
        """
        if block.ndim != 2 or block.shape[1] != self._n_columns or block.dtype != self._dtype:
            raise ValueError(
                f"block must be {self._dtype} of shape (n, {self._n_columns}), "
                f"got {block.dtype} of shape {block.shape}"
            )
        if not block.flags.c_contiguous:
            raise ValueError(
                f"block must be C-contiguous, got strides {block.strides}; pass np.ascontiguousarray(block)"
            )
        if first_row < self._next_row:
            raise ValueError(
                f"first_row must be at least {self._next_row}, the row after those seen, got {first_row}"
            )
        self._next_row = first_row + block.shape[0]
        if self.finite and block.size:
            self._take_in(first_row, for_kernels(block))

    def result(self) -> tuple[Array, npt.NDArray[np.floating[Any]]]:
        """Positions, strictly ascending, and scores ``|entry|`` of the winners.

        Raises
        ------
        ValueError
            If a value was not finite: the entries have no order then.
        """
        if not self.finite:
            raise ValueError("the matrix has entries that are not finite, so its largest are not defined")
        return self._winners()

    @abc.abstractmethod
    def _take_in(self, first_row: int, block: Array) -> None:
        """Look at a block that is not empty."""

    @abc.abstractmethod
    def _winners(self) -> tuple[Array, npt.NDArray[np.floating[Any]]]:
        """What `result` returns."""
