"""The instructions of Intel's matrix unit (AMX) as intrinsics, and 16-bit words by vectors.

A thread has eight tiles of up to 16 rows of 64 bytes. ``dot(c, a, b)`` adds to the 16 x 16 float32 sums in
tile c the product of a (16 rows of bfloat16) and b, in which each row holds *pairs*: row r has, for each
column of sums, the entries ``2 r`` and ``2 r + 1`` of that column. It rounds to nearest even, takes subnormal
numbers for 0, and passes NaN and infinity on.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparselab.kernels.cpu.simd.bfloat16 import narrow
from sparselab.kernels.cpu.simd.emit import Emit, is_array, item_bytes

_I8, _I16 = ir.IntType(8), ir.IntType(16)
_BYTES = _I8.as_pointer()


def _call(builder: Any, name: str, *operands: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), operands)


def _instruction(name: str, *tiles: int, n_arguments: int = 0) -> Any:
    """An intrinsic for some tiles, and for the address and the step between rows where it has arguments."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        numbers = [ir.Constant(_I8, tile) for tile in tiles]
        operands = [emit.index(k) for k in range(n_arguments)]
        if operands:
            operands[0] = builder.inttoptr(operands[0], _BYTES)
        _call(builder, name, *numbers, *operands)
        return emit.nothing()

    if n_arguments == 2:

        @intrinsic
        def with_step(_: Any, address: Any, step: Any) -> Any:
            return types.void(address, step), generate

        return with_step
    if n_arguments == 1:

        @intrinsic
        def with_address(_: Any, address: Any) -> Any:
            return types.void(address), generate

        return with_address

    @intrinsic
    def alone(_: Any) -> Any:
        return types.void(), generate

    return alone


#: ``configure(address)`` of 64 bytes that say how large the tiles are, by each thread; `release` ends that.
configure = _instruction("ldtilecfg", n_arguments=1)
release = _instruction("tilerelease")


def zero(tile: int) -> Any:
    """An intrinsic that makes a tile 0."""
    return _instruction("tilezero", tile)


def load_tile(tile: int) -> Any:
    """An intrinsic of the address of the first row and of the bytes from row to row."""
    return _instruction("tileloadd64", tile, n_arguments=2)


def store_tile(tile: int) -> Any:
    """The same, to memory."""
    return _instruction("tilestored64", tile, n_arguments=2)


def dot(sums: int, rows: int, pairs: int) -> Any:
    """An intrinsic that adds the product of two tiles to a third."""
    return _instruction("tdpbf16ps", sums, rows, pairs)


@intrinsic
def interleave(_: Any, source: Any, first: Any, second: Any, target: Any, at: Any) -> Any:
    """``target[at + 2 k + i] = source[(first, second)[i] + k]`` for k < 16 words of 16 bits, i < 2.

    Numbers in float32 are rounded to the words of bfloat16.
    """
    if not (is_array(source) and is_array(target) and target.dtype == types.uint16):
        return None
    if source.dtype not in (types.uint16, types.float32):
        return None
    is_wide = source.dtype == types.float32
    row = ir.VectorType(ir.FloatType() if is_wide else _I16, 16)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        rows = [
            emit.load(emit.at(emit.data(0), emit.index(k)), row, item_bytes(source.dtype)) for k in (1, 2)
        ]
        a, b = (narrow(builder, each) for each in rows) if is_wide else rows
        both = emit.shuffle(a, b, [lane // 2 + lane % 2 * 16 for lane in range(32)])
        emit.store(both, emit.at(emit.data(3), emit.index(4)), 2)
        return emit.nothing()

    return types.void(source, first, second, target, at), codegen


@intrinsic
def store_rounded(_: Any, source: Any, first: Any, offset: Any, begin: Any, target: Any, at: Any) -> Any:
    """``target[at + k] = bfloat16(source[first + k] + offset[begin + k])`` for k < 16, to nearest even."""
    if not (is_array(source) and source.dtype == offset.dtype == types.float32):
        return None
    wide = ir.VectorType(ir.FloatType(), 16)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        sums, offsets = (emit.load(emit.at(emit.data(k), emit.index(k + 1)), wide, 4) for k in (0, 2))
        rounded = narrow(builder, builder.fadd(sums, offsets))
        emit.store(rounded, emit.at(emit.data(4), emit.index(5)), 2)
        return emit.nothing()

    return types.void(source, first, offset, begin, target, at), codegen
