"""bfloat16 by its bits, which Numba and NumPy have no type for: the upper half of a float32."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sparselab.kernels.cpu.simd.emit import I32, Emit, Vector, is_array, item_bytes

_I16 = ir.IntType(16)


def _of(element: ir.Type, like: Any) -> Any:
    """The element type, or a vector of as many as another type has."""
    return ir.VectorType(element, like.count) if isinstance(like, ir.VectorType) else element


def _constant(kind: Any, number: int) -> ir.Constant:
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def widen(builder: Any, bits: Any) -> Any:
    """float32 numbers, or a vector of them, of their upper halves."""
    words = _of(I32, bits.type)
    wide = builder.shl(builder.zext(bits, words), _constant(words, 16))
    return builder.bitcast(wide, _of(ir.FloatType(), bits.type))


def narrow(builder: Any, numbers: Any) -> Any:
    """The bits of the bfloat16 nearest to float32 numbers, of two the even one; a NaN stays one."""
    words = _of(I32, numbers.type)
    bits = builder.bitcast(numbers, words)
    high = builder.lshr(bits, _constant(words, 16))
    odd = builder.and_(high, _constant(words, 1))
    rounded = builder.lshr(
        builder.add(builder.add(bits, _constant(words, 0x7FFF)), odd), _constant(words, 16)
    )
    is_nan = builder.fcmp_unordered("uno", numbers, numbers)
    result = builder.select(is_nan, builder.or_(high, _constant(words, 0x40)), rounded)
    return builder.trunc(result, _of(_I16, numbers.type))


@intrinsic
def put_number(_: Any, array: Any, index: Any, value: Any) -> Any:
    """``array[index] = value``, rounded if the array holds the bits of bfloat16 (uint16)."""
    is_narrow = is_array(array) and array.dtype == types.uint16 and value == types.float32
    if not (is_array(array) and isinstance(index, types.Integer) and (is_narrow or value == array.dtype)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        stored = narrow(builder, args[2]) if is_narrow else args[2]
        builder.store(stored, emit.at(emit.data(0), emit.index(1)))
        return emit.nothing()

    return types.void(array, index, value), codegen


@intrinsic
def load_numbers(_: Any, array: Any, index: Any, like: Any) -> Any:
    """A vector like `like` from any place of an array of its dtype, or of the bits of bfloat16 (uint16)."""
    if not (is_array(array) and isinstance(index, types.Integer) and isinstance(like, Vector)):
        return None
    is_narrow = array.dtype == types.uint16
    if not (array.dtype == like.dtype or (is_narrow and like.dtype == types.float32)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        kind = ir.VectorType(_I16, like.lanes) if is_narrow else like.llvm
        found = emit.load(emit.at(emit.data(0), emit.index(1)), kind, item_bytes(array.dtype))
        return widen(builder, found) if is_narrow else found

    return like(array, index, like), codegen
