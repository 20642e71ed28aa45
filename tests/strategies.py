"""Hypothesis strategies: patterns at the edges of vectors, tiles and rows; dense operands in any layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray

from sparselab.kernels import PaddedCSR

Array = NDArray[Any]

#: Around the widths of vectors (4 to 16), tile rows (16 to 64 tokens) and blocks of columns (128, 256).
SIZES = (1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300)
TOKENS = (0, 1, 7, 8, 9, 63, 64, 65, 130)
VALUE_DTYPES = (np.float32, np.float64)
INDEX_DTYPES = (np.uint16, np.int32, np.int64)

#: Row lengths of each kind of pattern, from (rng, rows, columns).
PATTERNS: dict[str, Callable[[np.random.Generator, int, int], Array]] = {
    "even": lambda rng, rows, columns: rng.binomial(columns, 0.2, rows),
    "unequal": lambda rng, rows, columns: (columns * rng.random(rows) ** 4).astype(np.int64),
    "empty and full rows": lambda rng, rows, columns: rng.choice([0, columns], rows),
    "one connection each": lambda rng, rows, columns: np.ones(rows, np.int64),
    "one row": lambda rng, rows, columns: np.where(np.arange(rows) == rng.integers(rows), columns, 0),
    "nothing": lambda rng, rows, columns: np.zeros(rows, np.int64),
    "everything": lambda rng, rows, columns: np.full(rows, columns),
}


def build(
    shape: tuple[int, int], kind: str, rng: np.random.Generator, *, dtype: DTypeLike = np.float32,
    index_dtype: DTypeLike = np.uint16, spare: int = 0,
) -> PaddedCSR:  # fmt: skip
    """A matrix of one of the `PATTERNS`; up to `spare` poisoned slots before, between and after its rows."""
    rows, columns = shape
    row_nnz = PATTERNS[kind](rng, rows, columns).astype(np.int64)
    room = row_nnz + rng.integers(spare + 1, size=rows)
    indptr = np.concatenate([[0], np.cumsum(room)]) + rng.integers(spare + 1)
    indices = np.full(indptr[-1], np.iinfo(index_dtype).max, index_dtype)
    values = np.full(indptr[-1], np.nan, dtype)
    for begin, n in zip(indptr, row_nnz, strict=False):
        indices[begin : begin + n] = np.sort(rng.choice(columns, n, replace=False))
        values[begin : begin + n] = rng.standard_normal(n)
    return PaddedCSR(shape, indptr, row_nnz, indices, values)


@st.composite
def matrices(
    draw: st.DrawFn, *, sizes: tuple[int, ...] = SIZES, index_dtypes: tuple[type, ...] = INDEX_DTYPES,
    spares: tuple[int, ...] = (0, 3),
) -> PaddedCSR:  # fmt: skip
    """Any pattern, sizes from `sizes`, either value dtype, with or without spare slots."""
    shape = draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))
    return build(
        shape,
        draw(st.sampled_from(sorted(PATTERNS))),
        draw(generators()),
        dtype=draw(st.sampled_from(VALUE_DTYPES)),
        index_dtype=draw(st.sampled_from(index_dtypes)),
        spare=draw(st.sampled_from(spares)),
    )


def generators() -> st.SearchStrategy[np.random.Generator]:
    """Seeded generators: hypothesis chooses what kind of data, these fill it in."""
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


class Layout(NamedTuple):
    """How to cut a view from a larger array: the larger array's shape and order, and the cut."""

    grow: tuple[int, int, int]
    order: str
    cut: Callable[[Array], Array]


LAYOUTS = {
    "C": Layout((1, 0, 0), "C", lambda a: a),
    "Fortran": Layout((1, 0, 0), "F", lambda a: a),
    "reversed": Layout((1, 0, 0), "C", lambda a: a[::-1, ::-1]),
    "reversed Fortran": Layout((1, 0, 0), "F", lambda a: a[::-1, ::-1]),
    "every second": Layout((2, 1, 1), "C", lambda a: a[1::2, 1::2]),
    "every second Fortran": Layout((2, 1, 1), "F", lambda a: a[1::2, 1::2]),
    "offset": Layout((1, 2, 3), "C", lambda a: a[1:-1, 2:-1]),
    "offset Fortran": Layout((1, 2, 3), "F", lambda a: a[1:-1, 2:-1]),
}
BROADCASTS = ("one token for all", "one feature for all")


def base_array(layout: str, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    """The array that a view of this shape and layout is cut from, filled with the canary -77."""
    (factor, rows, tokens), order, _ = LAYOUTS[layout]
    return np.full((factor * shape[0] + rows, factor * shape[1] + tokens), -77, dtype, order=order)  # type: ignore[call-overload]


def operand(rng: np.random.Generator, shape: tuple[int, int], dtype: DTypeLike, layout: str) -> Array:
    """A standard normal matrix in the layout, read-only."""
    if layout in BROADCASTS:
        narrow = (shape[0], min(shape[1], 1)) if layout == BROADCASTS[0] else (min(shape[0], 1), shape[1])
        return np.broadcast_to(rng.standard_normal(narrow).astype(dtype), shape)
    if layout == "unaligned":
        records = np.zeros(shape, [("odd", np.uint8), ("number", dtype)])
        records["number"] = rng.standard_normal(shape)
        matrix = records["number"]
    else:
        matrix = LAYOUTS[layout].cut(base_array(layout, shape, dtype))
        matrix[...] = rng.standard_normal(shape)
    matrix.flags.writeable = False
    return matrix


def operand_layouts() -> st.SearchStrategy[str]:
    return st.sampled_from([*LAYOUTS, *BROADCASTS, "unaligned"])
