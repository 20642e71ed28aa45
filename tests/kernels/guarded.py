"""Runs the products on memory between forbidden pages: ``python -m tests.kernels.guarded SIDE [overrun]``.

Operands, the topology's arrays, plans and work memory each end just before such a page (SIDE is ``end``), or
begin just behind one (``front``). A read or write past that side ends the process with a signal. With
``overrun`` one is made on purpose, to show that the guard works.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from sparselab.kernels import BlockCSR, PaddedCSR, sddmm_dw, spmm, spmm_t
from sparselab.kernels.cpu.bsr import sddmm_dw as block_sddmm_dw
from sparselab.kernels.cpu.bsr import skinny as block_skinny
from sparselab.kernels.cpu.bsr import spmm as block_spmm
from sparselab.kernels.cpu.csr import sddmm_dw as row_sddmm_dw
from sparselab.kernels.cpu.csr import skinny as row_skinny
from sparselab.kernels.cpu.csr import spmm as row_spmm
from sparselab.kernels.layouts.topology import SparseMatrix, Topology

Array = np.ndarray[Any, Any]

PAGE = mmap.PAGESIZE
SIZES = ((1, 1), (3, 7), (9, 33), (40, 513), (130, 65))
BLOCKS = ((4, 1), (1, 8), (4, 4), (3, 5))
TOKENS = (1, 3, 8, 15, 16, 17, 33, 65)
BLOCK_TOKENS = (1, 2, 3, 9, 25, 193)

_held: list[Any] = []


def guarded_bytes(n_bytes: int, side: str) -> Array:
    """So many bytes that end just before a page which may not be touched, or begin just behind one."""
    pages = -(-n_bytes // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    forbidden = ctypes.c_void_p(start if side == "front" else start + pages * PAGE)
    if libc.mprotect(forbidden, ctypes.c_size_t(PAGE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    _held.append(memory)
    return np.frombuffer(memory, np.uint8, n_bytes, PAGE if side == "front" else pages * PAGE - n_bytes)


def guarded(array: Array, side: str) -> Array:
    """A copy in the same layout, in such memory."""
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    copy = guarded_bytes(array.nbytes, side).view(array.dtype).reshape(array.shape, order=order)
    copy[...] = array
    return copy


def guard_plan(plan: Any, side: str) -> Any:
    if isinstance(plan, np.ndarray):
        return guarded(plan, side)
    if isinstance(plan, tuple) and hasattr(plan, "_replace"):
        return type(plan)(*(guard_plan(part, side) for part in plan))
    return plan


def guard_plans(topology: Topology, side: str) -> None:
    """Move all that a topology keeps for its kernels."""
    topology._plans = {key: guard_plan(plan, side) for key, plan in topology.plans().items()}


def guard_scratch(side: str) -> None:
    def scratch(n_rows: int, row_items: int, dtype: np.dtype[Any]) -> Array:
        stride = -(-row_items * dtype.itemsize // 64) * 64
        block = guarded_bytes(n_rows * stride, side)
        block[:] = 255  # NaN in float32 and float64
        return block.view(dtype).reshape(n_rows, stride // dtype.itemsize)

    for module in (row_spmm, row_sddmm_dw, row_skinny, block_spmm, block_sddmm_dw, block_skinny):
        module.scratch = scratch  # type: ignore[attr-defined]


def run(drawn: SparseMatrix, topologies: list[Topology], tokens: int, order: str, side: str) -> None:
    """All products: once for the plans to be made, and once with everything guarded."""
    rng = np.random.default_rng(0)
    X, Y = (
        np.asarray(rng.standard_normal((n, tokens)), drawn.dtype, order=order)  # type: ignore[call-overload]
        for n in drawn.shape[::-1]
    )
    bias = np.ones(drawn.shape[0], drawn.dtype)
    products: list[Callable[..., Array]] = [
        lambda W, X, Y, bias, *out: spmm(W, X, *out, bias=bias),
        lambda W, X, Y, bias, *out: spmm_t(W, Y, *out),
        lambda W, X, Y, bias, *out: sddmm_dw(W, Y, X, *out),
    ]
    expected = [product(drawn, X, Y, bias) for product in products]
    for topology in topologies:
        guard_plans(topology, side)
    W = drawn.with_values(guarded(drawn.values, side))
    operands = [guarded(array, side) for array in (X, Y, bias)]
    for product, right in zip(products, expected, strict=True):
        out = guarded(np.full_like(right, np.nan), side)
        product(W, *operands, out)
        np.testing.assert_array_equal(out, right)
    _held.clear()


def main(side: str, overrun: bool) -> None:
    if overrun:
        array = guarded(np.zeros(3), side)
        ctypes.string_at(array.ctypes.data - (side == "front"), array.nbytes + 1)
    guard_scratch(side)
    for shape, tokens, dtype, order, sparsity in itertools.product(
        SIZES, TOKENS, (np.float32, np.float64), "CF", (0.0, 0.8)
    ):
        rows = PaddedCSR.random(shape, sparsity, 0, dtype=dtype)
        run(rows, [rows.topology], tokens, order, side)
    for shape, tokens, dtype, order, block in itertools.product(
        SIZES, BLOCK_TOKENS, (np.float32, np.float64), "CF", BLOCKS
    ):
        blocks = BlockCSR.random(shape, 0.5, block, 0, dtype=dtype)
        run(blocks, [blocks.topology, blocks.topology.blocks], tokens, order, side)
    print("no step over an edge")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] == ["overrun"])
