"""Runs the products on memory between forbidden pages: ``python -m tests.kernels.guarded SIDE HOW``.

Operands, the topology's arrays, plans and work memory each end just before such a page (SIDE is ``end``), or
begin just behind one (``front``). A read or write past that side ends the process with a signal. HOW is
``all`` for every combination of sizes, blocks and orders, or ``half`` for every other one. With ``overrun`` a
read past the side is made on purpose, to show that the guard works.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sparselab.kernels import BlockCSR, PaddedCSR, sddmm_dw, spmm, spmm_t
from sparselab.kernels.arrays import address
from sparselab.kernels.cpu import narrow as weights_to_numbers
from sparselab.kernels.cpu.amx import gradient as unit_gradient
from sparselab.kernels.cpu.amx import product as unit_product
from sparselab.kernels.cpu.amx import sampled as unit_sampled
from sparselab.kernels.cpu.amx.gradient import sample_blocks
from sparselab.kernels.cpu.amx.product import multiply_blocks
from sparselab.kernels.cpu.amx.sampled import sample_connections
from sparselab.kernels.cpu.bsr import direct as block_direct
from sparselab.kernels.cpu.bsr import direct_dw as block_direct_dw
from sparselab.kernels.cpu.bsr import sddmm_dw as block_sddmm_dw
from sparselab.kernels.cpu.bsr import skinny as block_skinny
from sparselab.kernels.cpu.bsr import spmm as block_spmm
from sparselab.kernels.cpu.bsr.plan import block_plan, panel_plan
from sparselab.kernels.cpu.csr import order as row_order
from sparselab.kernels.cpu.csr import sddmm_dw as row_sddmm_dw
from sparselab.kernels.cpu.csr import skinny as row_skinny
from sparselab.kernels.cpu.csr import spmm as row_spmm
from sparselab.kernels.cpu.csr.lookup import add_up, look_up
from sparselab.kernels.cpu.csr.plan import gradient_plan, product_plan, transpose_plan
from sparselab.kernels.cpu.csr.skinny import matrix
from sparselab.kernels.cpu.csr.sparse_input import SparseTokens, multiply_sparse, sample_sparse
from sparselab.kernels.cpu.mlp import backward as mlp_backward
from sparselab.kernels.cpu.mlp import forward as mlp_forward
from sparselab.kernels.cpu.runtime import program as program_memory
from sparselab.kernels.cpu.runtime.matrix_unit import has_matrix_unit
from sparselab.kernels.layouts.topology import SparseMatrix, Topology
from sparselab.nn.ops.cpu.programs.base import Job, Programs
from sparselab.nn.ops.cpu.programs.blocks import BlockPrograms
from sparselab.nn.ops.cpu.programs.rows import RowPrograms
from tests.guards import guarded, room
from tests.kernels import narrow
from tests.kernels.two_layers import Block
from tests.shared import half

Array = np.ndarray[Any, Any]

SIZES = ((1, 1), (3, 7), (9, 33), (40, 513), (130, 65))
BLOCKS = ((4, 1), (1, 8), (4, 4), (3, 5), (32, 32))
TOKENS = (1, 2, 3, 6, 8, 15, 16, 17, 32, 33, 65)
BLOCK_TOKENS = (1, 2, 3, 9, 25, 193)


def guard_plan(plan: Any, front: bool) -> Any:
    if isinstance(plan, np.ndarray):
        return guarded(plan, front=front)
    if isinstance(plan, tuple) and hasattr(plan, "_replace"):
        return type(plan)(*(guard_plan(part, front) for part in plan))
    return plan


def guard_plans(topology: Topology, front: bool) -> None:
    """Move all that a topology keeps for its kernels."""
    topology._plans = {key: guard_plan(plan, front) for key, plan in topology.plans().items()}


def guard_scratch(front: bool) -> None:
    def scratch(n_rows: int, row_items: int, dtype: np.dtype[Any]) -> Array:
        stride = -(-row_items * dtype.itemsize // 64) * 64
        block = room(n_rows * stride, front)
        block[:] = 255  # NaN in float32 and float64
        return block.view(dtype).reshape(n_rows, stride // dtype.itemsize)

    rows, blocks = (row_spmm, row_sddmm_dw, row_skinny, row_order), (block_spmm, block_sddmm_dw, block_skinny)
    direct = block_direct, block_direct_dw
    for module in (*rows, *blocks, *direct, unit_product, unit_gradient, unit_sampled, weights_to_numbers):
        module.scratch = scratch  # type: ignore[attr-defined]
    held = []

    def lend(n_bytes: int) -> int:
        held[:] = [scratch(1, n_bytes, np.dtype(np.uint8))]
        return address(held[0])

    program_memory.lend = lend  # type: ignore[attr-defined]
    row_order.scratch_of_values = lambda n, dtype: scratch(1, n, dtype)[0]  # type: ignore[attr-defined]
    for module in (mlp_forward, mlp_backward):
        module.scratch = scratch  # type: ignore[attr-defined]
    mlp_backward.scratch_of_hidden = scratch  # type: ignore[attr-defined]


def run(drawn: SparseMatrix, topologies: list[Topology], tokens: int, order: str, front: bool) -> None:
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
        guard_plans(topology, front)
    W = drawn.with_values(guarded(drawn.values, front=front))
    operands = [guarded(array, front=front) for array in (X, Y, bias)]
    for product, right in zip(products, expected, strict=True):
        out = guarded(np.full_like(right, np.nan), front=front)
        product(W, *operands, out)
        np.testing.assert_array_equal(out, right)


def run_programs(W: Any, tokens: int, order: str, front: bool) -> None:
    """The products of a layer as programs, forward and backward, against the products one by one."""
    rng = np.random.default_rng(0)
    (rows, columns), name = W.shape, W.dtype.name
    X, DY = (np.asarray(rng.standard_normal((tokens, n)), W.dtype, order=order) for n in (columns, rows))  # type: ignore[call-overload]
    bias = np.ones(rows, W.dtype)
    expected = {
        "y": spmm(W, X.T, bias=bias).T, "dx": spmm_t(W, DY.T).T, "dw": sddmm_dw(W, DY.T, X.T), "db": DY.sum(0)
    }  # fmt: skip
    dtype, values_shape = getattr(torch, name), W.topology.values_shape
    if W.topology.layout == "csr":
        values_shape = *values_shape, 1, 1
        programs: Programs = RowPrograms(W.topology)
    else:
        programs = BlockPrograms(W.topology, W.topology.nnz / max(math.prod(W.topology.grid), 1))
    in_order = math.prod(values_shape[1:]), values_shape[2], 1
    strides = [(each.strides[0] // each.itemsize, each.strides[1] // each.itemsize) for each in (X, DY)]
    jobs = (
        Job(tokens, 1, dtype, strides[0], None, in_order, True),
        Job(tokens, 1, dtype, *strides, in_order, True),
    )
    for job in jobs:
        programs.make(job)  # makes the plans
    guard_plans(W.topology, front)
    if W.topology.layout == "bsr":
        guard_plans(W.topology.blocks, front)
    values, x, dy, offsets = (guarded(array, front=front) for array in (W.values, X, DY, bias))
    found = {
        key: guarded(np.full(right.shape, np.nan, W.dtype), front=front) for key, right in expected.items()
    }
    places = (x, values, offsets, found["y"], dy, found["dx"], found["dw"], found["db"])
    for job, keys in zip(jobs, (("y",), ("dx", "dw", "db")), strict=True):
        program = programs.make(job)
        if program is None:
            continue
        program.run(*map(address, places))
        for key in keys:
            np.testing.assert_allclose(found[key], expected[key], 1e-4, 1e-4, err_msg=key)


def run_by_number(shape: tuple[int, int], tokens: int, dtype: Any, sparsity: float, front: bool) -> None:
    """Products that read rows or columns of W by a number from outside: look-ups and sparse tokens."""
    rng = np.random.default_rng(0)
    (rows, columns), W = shape, PaddedCSR.random(shape, sparsity, 0, dtype=dtype)
    numbers, dy = rng.integers(0, rows, tokens), rng.standard_normal((tokens, rows)).astype(dtype)
    starts = np.concatenate([[0], np.cumsum(rng.integers(0, 4, tokens))])
    entries = rng.standard_normal(starts[-1]).astype(dtype)
    x = SparseTokens(starts, rng.integers(0, columns, len(entries)), entries)
    dx, bias = rng.standard_normal((tokens, columns)).astype(dtype), np.ones(rows, dtype)
    plan = transpose_plan(W.topology)
    calls: list[tuple[Callable[..., None], tuple[Any, ...], int]] = [
        (look_up, (numbers, W.indptr, W.indices, W.values, columns), tokens * columns),
        (add_up, (numbers, W.indptr, W.indices, dx.reshape(-1), columns), len(W.values)),
        (multiply_sparse, (x, W.values, W.topology.rows, plan, bias), tokens * rows),
        (sample_sparse, (x, W.topology.rows, plan, dy.reshape(-1)), len(W.values)),
    ]
    for product, operands, size in calls:
        right, out = np.zeros(size, dtype), guarded(np.zeros(size, dtype), front=front)
        product(*operands, right)
        product(*(guard_plan(each, front) for each in operands), out)
        np.testing.assert_array_equal(out, right)


def run_cast(shape: tuple[int, int], tokens: int, order: str, front: bool) -> None:
    """Products of tokens in bfloat16 with weights in float32."""
    rng = np.random.default_rng(0)
    W, blocks = PaddedCSR.random(shape, 0.8, 0), BlockCSR.random(shape, 0.5, (3, 5), 0)
    X, DY = (
        np.asarray(rng.integers(0, 1 << 14, (n, tokens)), np.uint16, order=order)  # type: ignore[call-overload]
        for n in shape[::-1]
    )
    row_plan, panels, turned = (
        product_plan(W.topology), panel_plan(blocks.topology, False), panel_plan(blocks.topology, True),
    )  # fmt: skip
    flat = blocks.values.reshape(-1)
    calls: list[tuple[Callable[..., None], Array]] = [
        (lambda x, dy, out: row_spmm.multiply(W.values, W.topology.rows.indices, row_plan, x, out), DY),
        (lambda x, dy, out: block_spmm.multiply(flat, panels, False, x, out), DY),
        (lambda x, dy, out: block_spmm.multiply(flat, turned, True, dy, out), X),
        (
            lambda x, dy, out: row_sddmm_dw.sample(
                W.topology.rows.indices, gradient_plan(W.topology), dy, x, out
            ),
            W.values,
        ),
        (
            lambda x, dy, out: block_sddmm_dw.sample(
                panels, *((x, dy) if panels.transposed else (dy, x)), out
            ),
            flat,
        ),
    ]
    for product, like in calls:
        right, out = np.zeros_like(like), guarded(np.zeros_like(like), front=front)
        product(X, DY, right)
        product(guarded(X, front=front), guarded(DY, front=front), out)
        np.testing.assert_array_equal(out, right)


def run_narrow(shape: tuple[int, int], tokens: int, dtype: str, order: str, front: bool) -> None:
    """Few tokens with weights in bfloat16 and int8, and these made float32."""
    rng = np.random.default_rng(0)
    X = np.asarray(rng.standard_normal((shape[1], tokens)), np.float32, order=order)  # type: ignore[call-overload]
    bias = np.ones(shape[0], np.float32)
    for block in ((1, 1), *BLOCKS):
        blocks = BlockCSR.random(shape, 0.5, block, 0)
        rows, end = blocks.topology.blocks.rows, blocks.indptr[1:]
        stored = narrow.draw(rng, dtype, blocks.values.size, shape[0])

        def few(
            s: Any, x: Array, b: Array, i: Array, p: Array, q: Array, y: Array, block: Any = block
        ) -> None:
            operands = address(b), narrow.FLOAT32, matrix(x), matrix(y), 2
            if block != (1, 1):
                block_skinny.multiply_skinny_blocks(s.weights, i, p, block, *operands)
            elif tokens <= row_skinny.MOST_TOKENS:
                row_skinny.multiply_skinny(s.weights, i, p[:-1], q, *operands)

        def all_of(
            s: Any, x: Array, b: Array, i: Array, p: Array, q: Array, y: Array, block: Any = block
        ) -> None:
            weights_to_numbers.expand(s.weights, p[:-1], q, block, shape[0], 2, y)

        for product, size in ((few, (shape[0], tokens)), (all_of, blocks.values.size)):
            right, out = np.zeros(size, np.float32), guarded(np.zeros(size, np.float32), front=front)
            operands = stored, X, bias, rows.indices, rows.indptr, end
            product(*operands, right)
            product(*(guard_plan(each, front) for each in operands), out)
            np.testing.assert_array_equal(out, right)


def run_by_matrix_unit(shape: tuple[int, int], tokens: int, block: tuple[int, int], front: bool) -> None:
    """Products of dense blocks in bfloat16."""
    rng = np.random.default_rng(0)
    blocks = BlockCSR.random(shape, 0.5, block, 0).topology
    values = rng.integers(0, 1 << 14, blocks.nnz * block[0] * block[1]).astype(np.uint16)
    X, DY = (rng.integers(0, 1 << 14, (tokens, n)).astype(np.uint16) for n in shape[::-1])
    plan, turned = block_plan(blocks, False), block_plan(blocks, True)

    def by_token(out: Array) -> Array:
        return out.reshape(tokens, -1)

    calls: list[tuple[Callable[..., None], Any, int, Any]] = [
        (lambda v, p, dy, x, out: multiply_blocks(v, p, x, by_token(out)), plan, tokens * shape[0], "u2"),
        (lambda v, p, dy, x, out: multiply_blocks(v, p, dy, by_token(out)), turned, tokens * shape[1], "u2"),
        (lambda v, p, dy, x, out: sample_blocks(p, dy, x, out), plan, values.size, "f4"),
    ]
    for product, operands, size, dtype in calls:
        right = np.zeros(size, dtype)
        out = guarded(right, front=front)
        product(values, operands, DY, X, right)
        product(*(guard_plan(each, front) for each in (values, operands, DY, X)), out)
        np.testing.assert_array_equal(out, right)


def run_sampled(shape: tuple[int, int], tokens: int, block: tuple[int, int], front: bool) -> None:
    """The gradient of single connections, (1, 1), and of small blocks, by the matrix unit."""
    rng = np.random.default_rng(0)
    topology: Any = PaddedCSR.random(shape, 0.5, 0).topology
    if block != (1, 1):
        topology = BlockCSR.random(shape, 0.5, block, 0).topology.blocks
    rows = topology.rows
    X, DY = (rng.integers(0, 1 << 14, (tokens, n)).astype(np.uint16) for n in shape[::-1])
    size = topology.nnz * block[0] * block[1]
    results = np.zeros(size + shape[0], np.float32)
    numbers = [rows.indices, rows.indptr[:-1].copy(), rows.indptr[1:].copy(), DY, X, results]
    for place in (np.asarray, lambda array: guarded(array, front=front)):
        *operands, out = map(place, numbers)
        sample_connections(shape, block, *operands, out[:size], out[size:])
        assert np.isfinite(out).all()


def run_two_layers(kind: Any, sizes: tuple[int, int, int], tokens: int, front: bool) -> None:
    """Two layers with a nonlinearity between them, both passes."""
    block = Block(kind, sizes, tokens)
    right = block.run("gelu")
    for W in block.matrices:
        guard_plans(W.topology, front)
    found = block.run("gelu", lambda array: guarded(array, front=front))
    for name, array in right.items():
        np.testing.assert_array_equal(found[name], array, name)


def main(side: str, how: str) -> None:
    front, combinations = side == "front", half if how == "half" else itertools.product
    if how == "overrun":
        array = guarded(np.zeros(3), front=front)
        ctypes.string_at(array.ctypes.data - front, array.nbytes + 1)
    guard_scratch(front)
    for shape, tokens, dtype, order, sparsity in combinations(
        SIZES, TOKENS, (np.float32, np.float64), "CF", (0.0, 0.8)
    ):
        rows = PaddedCSR.random(shape, sparsity, 0, dtype=dtype)
        run(rows, [rows.topology], tokens, order, front)
    for shape, tokens, dtype, order, block in combinations(
        SIZES, (1, 2, 9, 17, 33, 65, 193), (np.float32, np.float64), "CF", (None, *BLOCKS, (16, 16))
    ):
        programmed: Any = PaddedCSR.random(shape, 0.8, 0, dtype=dtype)
        if block is not None:
            programmed = BlockCSR.random(shape, 0.5, block, 0, dtype=dtype)
        run_programs(programmed, tokens, order, front)
    for shape, tokens, dtype, sparsity in combinations(SIZES, TOKENS, (np.float32, np.float64), (0.0, 0.8)):
        run_by_number(shape, tokens, dtype, sparsity, front)
    for shape, tokens, dtype, order, block in combinations(
        SIZES, BLOCK_TOKENS, (np.float32, np.float64), "CF", BLOCKS
    ):
        blocks = BlockCSR.random(shape, 0.5, block, 0, dtype=dtype)
        run(blocks, [blocks.topology, blocks.topology.blocks], tokens, order, front)
    for shape, tokens, order in combinations(SIZES, (1, 9, 33, 65, 193), "CF"):
        run_cast(shape, tokens, order, front)
    for shape, tokens, dtype, order in combinations(SIZES, TOKENS, narrow.NARROW, "CF"):
        if tokens <= block_skinny.MOST_BLOCK_TOKENS:
            run_narrow(shape, tokens, dtype, order, front)
    for shape, tokens, block in combinations(SIZES, TOKENS, ((16, 16), (32, 32), (16, 48))):
        if has_matrix_unit():
            run_by_matrix_unit(shape, tokens, block, front)
    for shape, tokens, block in combinations(SIZES, TOKENS, ((1, 1), (4, 4), (8, 2), (1, 64))):
        if has_matrix_unit():
            run_sampled(shape, tokens, block, front)
    for kind, sizes, tokens in combinations(
        (None, (4, 4), (3, 3), (8, 4)), ((1, 1, 1), (9, 37, 14), (40, 130, 65)), (1, 63, 65, 200)
    ):
        run_two_layers(kind, sizes, tokens, front)
    print("no step over an edge")


if __name__ == "__main__":
    main(*sys.argv[1:])
