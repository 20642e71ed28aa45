"""Comparing many integers at once, and going through those that were found."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sparselab.kernels.cpu.simd.emit import I32, I64, Emit, is_array

#: Numbers that `above` compares at once, whatever the width of a register.
COMPARED = 16


@intrinsic
def above(_: Any, numbers: Any, index: Any, mask: Any, bound: Any) -> Any:
    """A bit for each of the `COMPARED` integers from an index on: whether ``number & mask > bound``."""
    if not (is_array(numbers) and isinstance(index, types.Integer) and mask == bound == types.int64):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        width = int(numbers.dtype.bitwidth)
        vector = ir.VectorType(ir.IntType(width), COMPARED)
        some = emit.load(emit.at(emit.data(0), emit.index(1)), vector, width // 8)

        def everywhere(value: Any) -> Any:
            one = value if width == 64 else builder.trunc(value, ir.IntType(width))
            undefined = ir.Constant(vector, ir.Undefined)
            return emit.shuffle(builder.insert_element(undefined, one, I32(0)), undefined, [0] * COMPARED)

        found = builder.icmp_signed(">", builder.and_(some, everywhere(args[2])), everywhere(args[3]))
        return builder.zext(builder.bitcast(found, ir.IntType(COMPARED)), I64)

    return types.int64(numbers, index, mask, bound), codegen


@intrinsic
def lowest_bit(_: Any, bits: Any) -> Any:
    """The place of the lowest bit that is set, of at least one."""
    if bits != types.int64:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(1))

    return types.int64(bits), codegen
