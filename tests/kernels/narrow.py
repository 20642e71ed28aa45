"""Weights in bfloat16 and int8, as kernels take them, and what they stand for."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparselab.kernels.arrays import NONE_OF, address
from sparselab.kernels.cpu.narrow import Weights

Array = NDArray[Any]

#: Their dtypes: the bits of bfloat16, and int8.
NARROW = ("uint16", "int8")
FLOAT32 = NONE_OF[np.dtype(np.float32)]


class Stored(NamedTuple):
    """Weights, and the scales of rows, which only int8 has."""

    values: Array
    scales: Array | None

    @property
    def weights(self) -> Weights:
        """By address."""
        scales_at = 0 if self.scales is None else address(self.scales)
        return address(self.values), NONE_OF[self.values.dtype], scales_at

    def numbers(self, rows: Array) -> Array:
        """In float64, of weights in these rows; those in a row beyond all scales are 0."""
        if self.scales is None:
            return (self.values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        scales = np.append(self.scales, 0).astype(np.float64)
        return self.values * scales[np.minimum(rows, len(self.scales))]


def draw(rng: np.random.Generator, dtype: str, n_weights: int, n_rows: int) -> Stored:
    """Any weights, some of them the extremes; one row in five has nothing but 0."""
    if dtype == "uint16":
        numbers = rng.standard_normal(n_weights).astype(np.float32)
        return Stored((numbers.view(np.uint32) >> 16).astype(np.uint16), None)
    values = rng.integers(-127, 128, n_weights).astype(np.int8)
    values[rng.random(n_weights) < 0.1] = -128
    scales = rng.random(n_rows).astype(np.float32) + np.float32(1e-3)
    scales[rng.random(n_rows) < 0.2] = 0
    return Stored(values, scales)
