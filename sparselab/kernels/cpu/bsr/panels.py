"""Vector operations of the block kernels: a *row* of tokens as a tuple of vector registers.

Four rows of sums must stay in registers beside a row of operands and a weight: three registers each of the 16
that AVX2 has, four of the 32 of AVX-512 and NEON. A tuple, since LLVM has no vectors of three registers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparselab.kernels.cpu.runtime.target import VECTOR_BYTES
from sparselab.kernels.cpu.simd.dots import register_lanes, sum_lanes
from sparselab.kernels.cpu.simd.vectors import FLAGS, I32, I64, Emit, Vector, item_bytes

#: Registers of one row of tokens.
PARTS = 3 if VECTOR_BYTES == 32 else 4

#: Columns of a strip whose dots are made together.
TOGETHER = 3

#: Rows of a strip, which share their columns: a loaded row of tokens serves as many multiply-adds.
HEIGHT = 4


def _zeros(parts: int) -> Any:
    @intrinsic
    def zeros(_: Any, array: Any) -> Any:
        vector = Vector(array.dtype, register_lanes(array.dtype))
        row = types.UniTuple(vector, parts)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return cgutils.pack_array(builder, [ir.Constant(vector.llvm, [0] * vector.lanes)] * parts)

        return row(array), codegen

    return zeros


#: ``wide_row(array)`` and ``narrow_row(array)``: rows of zeros of the array's dtype, in `PARTS` registers and
#: in one. As `like` they tell the functions below how long a row is.
wide_row, narrow_row = _zeros(PARTS), _zeros(1)


@intrinsic
def row_width(_: Any, like: Any) -> Any:
    """Tokens of a row, as a constant of the compiled code."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.intp, like.count * like.dtype.lanes)

    return types.intp(like), codegen


def _places(emit: Emit, array: int, index: int, row: Any) -> list[Any]:
    """Pointers to the parts of the row that starts at an index."""
    start = emit.index(index)
    offsets = [emit.builder.add(start, ir.Constant(I64, k * row.dtype.lanes)) for k in range(row.count)]
    return [emit.at(emit.data(array), offset) for offset in offsets]


@intrinsic
def load_parts(_: Any, tile: Any, index: Any, like: Any) -> Any:
    """The row that starts at ``tile[index]``, on a multiple of the size of a register."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        places = _places(emit, 0, 1, like)
        return cgutils.pack_array(
            builder, [emit.load(place, like.dtype.llvm, VECTOR_BYTES) for place in places]
        )

    return like(tile, index, like), codegen


@intrinsic
def store_parts(_: Any, tile: Any, index: Any, row: Any) -> Any:
    """Store a row at ``tile[index]``, on a multiple of the size of a register."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        parts = cgutils.unpack_tuple(builder, args[2], row.count)
        for part, place in zip(parts, _places(emit, 0, 1, row), strict=True):
            emit.store(part, place, VECTOR_BYTES)
        return emit.nothing()

    return types.void(tile, index, row), codegen


def _splat(emit: Emit, value: Any, vector: Vector) -> Any:
    undefined = ir.Constant(vector.llvm, ir.Undefined)
    one = emit.builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return emit.shuffle(one, undefined, [0] * vector.lanes)


@intrinsic
def splat_parts(_: Any, value: Any, like: Any) -> Any:
    """A row whose every token is `value`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        part = _splat(Emit(context, builder, signature, args), args[0], like.dtype)
        return cgutils.pack_array(builder, [part] * like.count)

    return like(value, like), codegen


@intrinsic
def fma_parts(_: Any, value: Any, row: Any, total: Any) -> Any:
    """``value * row + total`` for a number, or one vector, `value`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        factor = args[0] if isinstance(value, Vector) else _splat(emit, args[0], row.dtype)
        rows, totals = (cgutils.unpack_tuple(builder, args[k], row.count) for k in (1, 2))
        return cgutils.pack_array(
            builder, [emit.fmuladd(factor, a, b) for a, b in zip(rows, totals, strict=True)]
        )

    return total(value, row, total), codegen


@intrinsic
def load_one(_: Any, tile: Any, index: Any) -> Any:
    """The vector register at ``tile[index]``, on a multiple of its size."""
    vector = Vector(tile.dtype, register_lanes(tile.dtype))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        return emit.load(emit.at(emit.data(0), emit.index(1)), vector.llvm, VECTOR_BYTES)

    return vector(tile, index), codegen


@intrinsic
def load_three(_: Any, tile: Any, a: Any, b: Any, c: Any) -> Any:
    """Three vector registers from places of a tile."""
    vector = Vector(tile.dtype, register_lanes(tile.dtype))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        places = [emit.at(emit.data(0), emit.index(k)) for k in (1, 2, 3)]
        return cgutils.pack_array(builder, [emit.load(place, vector.llvm, VECTOR_BYTES) for place in places])

    return types.UniTuple(vector, TOGETHER)(tile, a, b, c), codegen


@intrinsic
def three_zeros(_: Any, array: Any) -> Any:
    """Three vector registers of zeros."""
    vector = Vector(array.dtype, register_lanes(array.dtype))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return cgutils.pack_array(builder, [ir.Constant(vector.llvm, [0] * vector.lanes)] * TOGETHER)

    return types.UniTuple(vector, TOGETHER)(array), codegen


@intrinsic
def add_sums(_: Any, s0: Any, s1: Any, s2: Any, s3: Any, out: Any, at: Any) -> Any:
    """``out[at + 4 * k + r] +=`` the lanes of ``s_r[k]`` summed, for the four rows r and three columns k."""
    vector = s0.dtype

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        sums = [cgutils.unpack_tuple(builder, args[k], TOGETHER) for k in range(HEIGHT)]
        group = min(HEIGHT, vector.lanes)
        for k in range(TOGETHER):
            for r in range(0, HEIGHT, group):
                total = sum_lanes(emit, [sums[i][k] for i in range(r, r + group)])
                offset = builder.add(emit.index(5), ir.Constant(I64, HEIGHT * k + r))
                place = emit.at(emit.data(4), offset)
                before = emit.load(place, total.type, item_bytes(vector.dtype))
                emit.store(builder.fadd(before, total, flags=FLAGS), place, item_bytes(vector.dtype))
        return emit.nothing()

    return types.void(s0, s1, s2, s3, out, at), codegen
