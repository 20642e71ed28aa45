"""Transposing in registers, as a vector intrinsic."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sparselab.kernels.cpu.simd.bfloat16 import narrow, widen
from sparselab.kernels.cpu.simd.emit import I64, Emit, Vector, is_array, item_bytes


@intrinsic
def transpose8(
    _: Any, source: Any, first: Any, stride: Any, target: Any, target_first: Any, target_stride: Any
) -> Any:
    """Transpose an 8 x 8 block in registers.

    ``target[target_first + i * target_stride + j] = source[first + j * stride + i]`` for i, j < 8. Three
    rounds of two-input shuffles, each exchanging the lanes whose index differs in one bit. Where only one of
    them holds the bits of bfloat16 (uint16), numbers are widened, or rounded to nearest even, on the way.
    """
    if not (is_array(source) and is_array(target)):
        return None
    narrows = [array.dtype == types.uint16 for array in (source, target)]
    if source.dtype != target.dtype and narrows == [False, False]:
        return None
    dtype = target.dtype if narrows[0] else source.dtype
    if dtype == types.uint16:
        return None
    vector, half = Vector(dtype, 8), ir.VectorType(ir.IntType(16), 8)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)

        def lines(array: int) -> list[Any]:
            start, step = emit.index(array + 1), emit.index(array + 2)
            offsets = [builder.add(start, builder.mul(step, ir.Constant(I64, k))) for k in range(8)]
            return [emit.at(emit.data(array), offset) for offset in offsets]

        size = item_bytes(source.dtype)
        rows = [emit.load(pointer, half if narrows[0] else vector.llvm, size) for pointer in lines(0)]
        if narrows[0]:
            rows = [widen(builder, row) for row in rows]
        for bit in (1, 2, 4):
            low = [8 + lane - bit if lane & bit else lane for lane in range(8)]
            high = [8 + lane if lane & bit else lane + bit for lane in range(8)]
            for i in range(8):
                if not i & bit:
                    a, b = rows[i], rows[i + bit]
                    rows[i], rows[i + bit] = emit.shuffle(a, b, low), emit.shuffle(a, b, high)
        if narrows[1]:
            rows = [narrow(builder, row) for row in rows]
        for row, pointer in zip(rows, lines(3), strict=True):
            emit.store(row, pointer, item_bytes(target.dtype))
        return emit.nothing()

    return (
        types.void(source, first, stride, target, target_first, target_stride),
        codegen,
    )
