"""Weights of fewer bits than the numbers they stand for: bfloat16 by its bits (uint16), and int8.

Each row of the latter has a scale, which multiplies the sums of the row. Where such weights are met is known
when a kernel is compiled: those of kernels for other weights are left out of the machine code.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparselab.kernels.cpu.simd.bfloat16 import widen
from sparselab.kernels.cpu.simd.emit import I1, I64, Emit, Vector, is_array, item_bytes


def _from_integers(builder: Any, stored: Any) -> Any:
    number = ir.FloatType()
    kind = ir.VectorType(number, stored.type.count) if isinstance(stored.type, ir.VectorType) else number
    return builder.sitofp(stored, kind)


#: What makes numbers of weights that are not stored as such.
_NARROW: dict[types.Type, Any] = {types.uint16: widen, types.int8: _from_integers}


def number_type(dtype: types.Type) -> types.Type:
    """The type of what weights that are stored so stand for."""
    return types.float32 if dtype in _NARROW else dtype


def numbers(builder: Any, stored: Any, dtype: types.Type) -> Any:
    """What a stored weight, or a vector of them, stands for; of int8 in units of the row's scale."""
    return _NARROW[dtype](builder, stored) if dtype in _NARROW else stored


@intrinsic
def is_scaled(_: Any, values: Any) -> Any:
    """Whether rows of these weights have scales, as a constant of the compiled code."""
    if not is_array(values):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(I1, int(values.dtype == types.int8))

    return types.boolean(values), codegen


@intrinsic
def numbers_of(_: Any, values: Any, converted: Any) -> Any:
    """The array of weights itself if it holds numbers, else the one into which they are converted."""
    if not (is_array(values) and is_array(converted) and number_type(values.dtype) == converted.dtype):
        return None
    which = 0 if values.dtype == converted.dtype else 1

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[which]

    return converted(values, converted), codegen


@intrinsic
def moved(_: Any, array: Any, index: Any) -> Any:
    """1-D array whose entry k is ``array[index + k]``; the index may be negative."""
    if not (is_array(array) and isinstance(index, types.Integer)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        return emit.array(array, emit.at(emit.data(0), emit.index(1)))

    return array(array, index), codegen


@intrinsic
def load_weights(_: Any, values: Any, index: Any, like: Any) -> Any:
    """A vector like `like` of the numbers that the weights from ``values[index]`` on stand for."""
    if not (
        is_array(values)
        and isinstance(index, types.Integer)
        and isinstance(like, Vector)
        and number_type(values.dtype) == like.dtype
    ):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        place = emit.at(emit.data(0), emit.index(1))
        kind = ir.VectorType(place.type.pointee, like.lanes)
        return numbers(builder, emit.load(place, kind, item_bytes(values.dtype)), values.dtype)

    return like(values, index, like), codegen


@intrinsic
def four_weights(_: Any, values: Any, index: Any, like: Any) -> Any:
    """Four vectors for a row like `like`: every number of vector k is the weight ``values[index + k]``.

    Narrow ones are loaded and converted together, and spread from a register each: converted one by one they
    would take two operations more, on the one port that has them.
    """
    vector = like if isinstance(like, Vector) else like.dtype
    if not (
        is_array(values) and isinstance(index, types.Integer) and number_type(values.dtype) == vector.dtype
    ):
        return None
    row = types.UniTuple(vector, 4)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        place = emit.at(emit.data(0), emit.index(1))
        if values.dtype in _NARROW:
            stored = emit.load(place, ir.VectorType(place.type.pointee, 4), item_bytes(values.dtype))
            four = _fenced(builder, numbers(builder, stored, values.dtype))
            vectors = [emit.shuffle(four, four, [k] * vector.lanes) for k in range(4)]
        else:
            vectors = [emit.splat(builder.load(emit.at(place, I64(k))), vector.lanes) for k in range(4)]
        return cgutils.pack_array(builder, vectors)

    return row(values, index, like), codegen


def _fenced(builder: Any, four: Any) -> Any:
    """The same numbers. LLVM would put their conversion behind the shuffles, where it costs more."""
    kind = ir.FunctionType(four.type, [four.type])
    return builder.call(
        cgutils.get_or_insert_function(builder.module, kind, "llvm.arithmetic.fence.v4f32"), [four]
    )
