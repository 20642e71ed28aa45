"""Counts of connections for each row of a layer."""

from __future__ import annotations

import numpy as np

from sparselab.kernels.arrays import Array


def apportion_rows(total: int, weights: Array, caps: Array) -> Array:
    """Split a number into integers in proportion to weights, for arrays as long as a layer has rows.

    The rule of `sparselab.dst.apportion`: whoever would get more than its cap gets the cap, and the others
    share the rest; shares are rounded down, and what that leaves goes to the largest remainders, among equals
    to the first.

    Parameters
    ----------
    total : int
        The sum of the result; at most that of the caps.
    weights : int array, (rows,)
        At least 0. Where all that have room left are 0, they share equally.
    caps : int array, (rows,)

    Returns
    -------
    int64 array, (rows,)

    Raises
    ------
    ValueError
        If `total` is negative or exceeds the sum of the caps.

    Notes
    -----
    Exact while ``total * weights.max()`` fits 63 bits.

    Examples
    --------
    >>> apportion_rows(10, np.array([1, 1, 2]), np.array([9, 9, 2]))
    array([4, 4, 2])
    """
    if not 0 <= total <= caps.sum():
        raise ValueError(f"total must lie between 0 and the sum of the caps, {caps.sum()}, got {total}")
    counts = np.zeros(len(caps), np.int64)
    free = np.arange(len(caps))
    while free.size:
        share = weights[free].astype(np.int64)
        if not share.any():
            share[:] = 1
        whole = share.sum()
        over = total * share > caps[free] * whole
        if not over.any():
            counts[free], left = np.divmod(total * share, whole)
            counts[free[np.argsort(-left, kind="stable")[: total - counts[free].sum()]]] += 1
            break
        counts[free[over]] = caps[free[over]]
        total -= int(caps[free[over]].sum())
        free = free[~over]
    return counts
