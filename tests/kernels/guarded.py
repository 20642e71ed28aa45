"""Runs the products on memory that ends at a forbidden page: ``python -m tests.kernels.guarded [overrun]``.

A read or write past the end of an operand ends the process with a signal. With ``overrun`` one is made on
purpose, to show that the guard works.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
from typing import Any

import numpy as np

from sparselab.kernels import (
    BlockCSR,
    PaddedCSR,
    plan_sddmm_dw,
    plan_spmm,
    plan_spmm_t,
    sddmm_dw,
    spmm,
    spmm_t,
)
from sparselab.kernels.cpu.csr.plan import Segments, TransposePlan

Array = np.ndarray[Any, Any]

PAGE = mmap.PAGESIZE
SIZES = ((1, 1), (3, 7), (9, 33), (40, 513), (130, 65))
BLOCKS = ((4, 1), (1, 8), (4, 4), (3, 5))
TOKENS = (1, 3, 8, 15, 16, 17, 33, 65)

_held = []


def guarded(array: Array) -> Array:
    """A copy in the same layout whose last byte is the last one before a page that may not be touched."""
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    pages = -(-array.nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    forbidden = ctypes.c_void_p(start + pages * PAGE)
    if libc.mprotect(forbidden, ctypes.c_size_t(PAGE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    _held.append(memory)
    copy = np.frombuffer(memory, array.dtype, array.size, pages * PAGE - array.nbytes)
    copy = copy.reshape(array.shape, order=order)
    copy[...] = array
    return copy


def guard_plan(plan: Any) -> Any:
    parts = [guard_plan(part) if isinstance(part, Segments) else part for part in plan]
    return type(plan)(*(guarded(part) if isinstance(part, np.ndarray) else part for part in parts))


def run(shape: tuple[int, int], tokens: int, dtype: type, order: str, sparsity: float) -> None:
    rng = np.random.default_rng(0)
    drawn = PaddedCSR.random(shape, sparsity, rng, dtype=dtype)
    W = PaddedCSR(
        shape, *(guarded(part) for part in (drawn.indptr, drawn.row_nnz, drawn.indices, drawn.values))
    )
    X, Y = (
        guarded(np.asarray(rng.standard_normal((n, tokens)), dtype, order=order))  # type: ignore[call-overload]
        for n in (shape[1], shape[0])
    )
    out, bias = guarded(np.zeros(W.capacity, dtype)), guarded(np.zeros(shape[0], dtype))
    transpose = plan_spmm_t(W)
    assert isinstance(transpose, TransposePlan)
    spmm(W, X, Y, bias=bias, plan=guard_plan(plan_spmm(W)))
    spmm_t(W, Y, X, plan=guard_plan(transpose))
    sddmm_dw(W, Y, X, out, plan=guard_plan(plan_sddmm_dw(W)))


def run_blocks(shape: tuple[int, int], tokens: int, dtype: type, order: str, block: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    drawn = BlockCSR.random(shape, 0.5, block, rng, dtype=dtype)
    W = BlockCSR(shape, block, *(guarded(part) for part in (drawn.indptr, drawn.indices, drawn.values)))
    X, Y = (
        guarded(np.asarray(rng.standard_normal((n, tokens)), dtype, order=order))  # type: ignore[call-overload]
        for n in (shape[1], shape[0])
    )
    out, bias = guarded(np.zeros(W.values.shape, dtype)), guarded(np.zeros(shape[0], dtype))
    spmm(W, X, Y, bias=bias, plan=guard_plan(plan_spmm(W)))
    spmm_t(W, Y, X, plan=guard_plan(plan_spmm_t(W)))
    sddmm_dw(W, Y, X, out, plan=guard_plan(plan_sddmm_dw(W)))


def main() -> None:
    if sys.argv[1:] == ["overrun"]:
        array = guarded(np.zeros(3))
        ctypes.string_at(array.ctypes.data, array.nbytes + 1)
    for shape, tokens, dtype, order, sparsity in itertools.product(
        SIZES, TOKENS, (np.float32, np.float64), "CF", (0.0, 0.8)
    ):
        run(shape, tokens, dtype, order, sparsity)
    for shape, tokens, dtype, order, block in itertools.product(
        SIZES, (1, 2, 3, 9, 25, 193), (np.float32, np.float64), "CF", BLOCKS
    ):
        run_blocks(shape, tokens, dtype, order, block)
    print("no read past an end")


if __name__ == "__main__":
    main()
