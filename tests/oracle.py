"""What a product must be, in float64 and dense, and the one rule for how far from it a result may be.

A sum of n products, in any order, differs from the exact one by at most ``n * u`` times the sum of the
products' magnitudes, where u is half of eps (Higham, Accuracy and Stability of Numerical Algorithms, section
3.1). The rule grants (n + 4) * eps, which leaves as much again for this oracle's own rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

Array = NDArray[Any]


class Exact(NamedTuple):
    """A result in float64, the magnitude of its terms summed, and their number (these two broadcast)."""

    value: Array
    magnitude: Array
    terms: Array


def product(
    A: ArrayLike, B: ArrayLike, *, live: ArrayLike | None = None, bias: ArrayLike | None = None
) -> Exact:
    """``A B + bias[:, None]``, where only the products at `live` positions of A exist (default: all)."""
    A, B = np.asarray(A, np.float64), np.asarray(B, np.float64)
    live = np.ones(A.shape, np.bool_) if live is None else np.asarray(live)
    value, magnitude = np.zeros((2, A.shape[0], B.shape[1]))
    with np.errstate(invalid="ignore", over="ignore"):
        for i, columns in enumerate(live):
            value[i] = A[i, columns] @ B[columns]
            magnitude[i] = np.abs(A[i, columns]) @ np.abs(B[columns])
        if bias is not None:
            value += np.asarray(bias, np.float64)[:, None]
            magnitude += np.abs(np.asarray(bias, np.float64))[:, None]
    return Exact(value, magnitude, live.sum(1, keepdims=True) + (bias is not None))


def assert_close(actual: object, exact: Exact, dtype: DTypeLike) -> None:
    """Fail unless `actual` has the dtype, shape, NaNs and infinities it must and is within the bound."""
    assert isinstance(actual, np.ndarray), f"expected an array, got {type(actual).__name__}"
    assert actual.dtype == dtype, f"expected dtype {np.dtype(dtype)}, got {actual.dtype}"
    assert actual.shape == exact.value.shape, f"expected shape {exact.value.shape}, got {actual.shape}"
    got = actual.astype(np.float64)
    finite = np.isfinite(exact.value)
    np.testing.assert_array_equal(got[~finite], exact.value[~finite], "NaN or infinity")
    bound = np.broadcast_to(error_bound(exact, dtype), got.shape)[finite]
    error = np.abs(got[finite] - exact.value[finite])
    wrong = ~(error <= bound)  # a NaN where a number belongs is wrong too
    if wrong.any():
        with np.errstate(over="ignore"):
            worst = np.argmax(np.where(np.isnan(error), np.inf, error / bound))
        where = tuple(int(axis[worst]) for axis in np.nonzero(finite))
        raise AssertionError(
            f"{wrong.sum()} of {got.size} entries are off by more than the bound; the worst at {where}: "
            f"{got[where]} instead of {exact.value[where]}, bound {bound[worst]:.3g}"
        )


def error_bound(exact: Exact, dtype: DTypeLike) -> Array:
    """Largest error granted to each entry; the smallest normal number covers results that underflow."""
    kind = np.finfo(np.dtype(dtype))
    with np.errstate(invalid="ignore"):
        return np.asarray((exact.terms + 4) * kind.eps * exact.magnitude + kind.tiny)
