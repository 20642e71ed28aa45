"""The k largest of many scores, exactly, by counting.

Floats order like integers once their sign is treated apart, so the k-th largest is found digit by digit:
count the scores by the leading bits of that integer, see which count holds the k-th, look at the next bits of
those only. That takes three passes for float32 and six for float64, no copy of the scores, and no comparison
that depends on their order. Counts of several workers add up exactly, so the result is the same for any
number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import prange

from sparselab.kernels._jit import jit, jit_parallel, launch, worker_count
from sparselab.kernels.layout import Array, slot_dtype

_DIGIT = 11
_MIN_SHARE = 1 << 16


def float_bits(scores: Array) -> tuple[Array, np.int64, np.int64]:
    """The scores as integers of the same width, the mask of their magnitude, and the bits of infinity."""
    integer = np.dtype(np.int32 if scores.dtype == np.float32 else np.int64)
    infinity = np.array(np.inf, scores.dtype).view(integer)
    return scores.view(integer), np.int64(np.iinfo(integer).max), np.int64(infinity)


@jit
def _key(bits, mask, infinity):  # type: ignore[no-untyped-def]
    """An integer that orders as the float does; 0 and -0 are equal, and NaN equals -inf."""
    size = np.int64(bits) & mask
    if size > infinity:
        return -infinity
    return -size if bits < 0 else size


@jit
def _count_digit_share(  # type: ignore[no-untyped-def]
    share, n_shares, bits, mask, infinity, prefix_shift, prefix, shift, first, counts
):
    """Count the keys that begin with `prefix` by their bits from `shift` on; `first` is the lowest value."""
    n = len(bits)
    for i in range(share * n // n_shares, (share + 1) * n // n_shares):
        key = _key(bits[i], mask, infinity)
        if prefix_shift > 62 or key >> prefix_shift == prefix:
            counts[share, (key >> shift) - first] += 1


@jit_parallel
def _count_digit(  # type: ignore[no-untyped-def]
    n_shares, bits, mask, infinity, prefix_shift, prefix, shift, first, counts
):
    for share in prange(n_shares):
        _count_digit_share(share, n_shares, bits, mask, infinity, prefix_shift, prefix, shift, first, counts)


@jit
def _count_taken_share(share, n_shares, bits, mask, infinity, shift, edge, above, equal):  # type: ignore[no-untyped-def]
    n = len(bits)
    n_above = n_equal = 0
    for i in range(share * n // n_shares, (share + 1) * n // n_shares):
        digits = _key(bits[i], mask, infinity) >> shift
        n_above += digits > edge
        n_equal += digits == edge
    above[share] = n_above
    equal[share] = n_equal


@jit_parallel
def _count_taken(n_shares, bits, mask, infinity, shift, edge, above, equal):  # type: ignore[no-untyped-def]
    for share in prange(n_shares):
        _count_taken_share(share, n_shares, bits, mask, infinity, shift, edge, above, equal)


@jit
def _take_share(  # type: ignore[no-untyped-def]
    share, n_shares, bits, mask, infinity, shift, edge, wanted, quota, ends, out
):
    """Write the indices that are taken (or, if not `wanted`, left), `quota` of those at the edge taken."""
    n = len(bits)
    at = ends[share]
    end = ends[share + 1]
    left = quota[share]
    for i in range(share * n // n_shares, (share + 1) * n // n_shares):
        digits = _key(bits[i], mask, infinity) >> shift
        at_edge = digits == edge
        taken = (digits > edge) | (at_edge & (left > 0))
        left -= at_edge
        # Always stored and sometimes kept: a branch on what the score is would be mispredicted.
        if at < end:
            out[at] = i
        at += taken == wanted


@jit_parallel
def _take(n_shares, bits, mask, infinity, shift, edge, wanted, quota, ends, out):  # type: ignore[no-untyped-def]
    for share in prange(n_shares):
        _take_share(share, n_shares, bits, mask, infinity, shift, edge, wanted, quota, ends, out)


def select(scores: npt.NDArray[np.floating[Any]], k: int, *, rest: bool = False) -> Array:
    """Indices of the `k` largest scores, or of all the others; equal scores prefer the lower index.

    Parameters
    ----------
    scores : float32 or float64 array, (n,)
        C-contiguous. Read only. NaN ranks below every number, beside -inf.
    k : int
        How many, ``0 <= k <= n``.
    rest : bool
        Return those that are not among the k largest.

    Returns
    -------
    int32 or int64 array, (k,) or (n - k,)
        Strictly ascending.

    Raises
    ------
    ValueError
        If `k` is outside ``[0, n]``.
    """
    n = scores.size
    if not 0 <= k <= n:
        raise ValueError(f"k must lie in [0, {n}], the number of scores; got {k}")
    if k in (0, n):
        return np.arange(n if (k == n) != rest else 0, dtype=slot_dtype(n))
    bits, mask, infinity = float_bits(scores)
    n_shares = max(1, min(worker_count(), n // _MIN_SHARE))
    shift, edge, missing = _edge(n_shares, bits, mask, infinity, k)
    above, equal = np.empty((2, n_shares), np.int64)
    launch(_count_taken, _count_taken_share, n_shares, bits, mask, infinity, shift, edge, above, equal)
    quota = np.clip(missing - (np.cumsum(equal) - equal), 0, equal)
    sizes = above + quota
    if rest:
        sizes = np.diff(np.arange(n_shares + 1) * n // n_shares) - sizes
    ends = np.zeros(n_shares + 1, np.int64)
    np.cumsum(sizes, out=ends[1:])
    out = np.empty(ends[-1], slot_dtype(n))
    launch(_take, _take_share, n_shares, bits, mask, infinity, shift, edge, not rest, quota, ends, out)
    return out


def _edge(
    n_shares: int, bits: Array, mask: np.int64, infinity: np.int64, k: int
) -> tuple[np.int64, np.int64, int]:
    """``(shift, edge, missing)``: take keys with ``key >> shift > edge``, and `missing` of those equal."""
    width = bits.dtype.itemsize * 8
    prefix_shift, prefix, shift = 63, 0, width - _DIGIT
    first, missing = -(1 << (_DIGIT - 1)), k
    while True:
        counts = np.zeros((n_shares, 1 << _DIGIT), np.int64)
        launch(
            _count_digit, _count_digit_share, n_shares, bits, mask, infinity,
            np.int64(prefix_shift), np.int64(prefix), np.int64(shift), np.int64(first), counts,
        )  # fmt: skip
        total = counts.sum(0)
        from_top = np.cumsum(total[::-1])
        digit = len(total) - 1 - int(np.searchsorted(from_top, missing))
        missing -= int(from_top[len(total) - 1 - digit] - total[digit])
        prefix, prefix_shift = first + digit, shift
        if shift == 0 or missing == total[digit]:
            return np.int64(shift), np.int64(prefix), missing
        shift = max(shift - _DIGIT, 0)
        first = prefix << (prefix_shift - shift)
