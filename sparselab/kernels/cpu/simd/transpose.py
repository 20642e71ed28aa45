"""Transposing in registers, as a vector intrinsic."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sparselab.kernels.cpu.simd.bfloat16 import narrow, widen
from sparselab.kernels.cpu.simd.emit import I64, Emit, Vector, is_array, item_bytes


def _transpose(size: int) -> Any:
    """The intrinsic for blocks of so many rows and columns, a power of two."""

    @intrinsic
    def transpose(
        _: Any, source: Any, first: Any, stride: Any, target: Any, target_first: Any, target_stride: Any
    ) -> Any:
        if not (is_array(source) and is_array(target)):
            return None
        narrows = [array.dtype == types.uint16 for array in (source, target)]
        if source.dtype != target.dtype and narrows == [False, False]:
            return None
        dtype = target.dtype if narrows[0] else source.dtype
        if dtype == types.uint16:
            return None
        vector, half = Vector(dtype, size), ir.VectorType(ir.IntType(16), size)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit = Emit(context, builder, signature, args)

            def lines(array: int) -> list[Any]:
                start, step = emit.index(array + 1), emit.index(array + 2)
                offsets = [builder.add(start, builder.mul(step, ir.Constant(I64, k))) for k in range(size)]
                return [emit.at(emit.data(array), offset) for offset in offsets]

            align = item_bytes(source.dtype)
            rows = [emit.load(pointer, half if narrows[0] else vector.llvm, align) for pointer in lines(0)]
            if narrows[0]:
                rows = [widen(builder, row) for row in rows]
            for bit in (1, 2, 4)[: size.bit_length() - 1]:
                low = [size + lane - bit if lane & bit else lane for lane in range(size)]
                high = [size + lane if lane & bit else lane + bit for lane in range(size)]
                for i in range(size):
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

    return transpose


#: ``transpose8(source, first, stride, target, target_first, target_stride)``: transpose an 8 x 8 block in
#: registers, ``target[target_first + i * target_stride + j] = source[first + j * stride + i]`` for i, j < 8.
#: Three rounds of two-input shuffles, each exchanging the lanes whose index differs in one bit. Where only
#: one of the arrays holds the bits of bfloat16 (uint16), numbers are widened, or rounded to nearest even, on
#: the way. ``transpose4`` does the same to 4 x 4 blocks.
transpose8, transpose4 = _transpose(8), _transpose(4)
