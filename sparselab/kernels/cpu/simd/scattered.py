"""Vectors of numbers that lie apart."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparselab.kernels.cpu.simd.emit import I32, I64, Emit, Vector, is_array, item_bytes


@intrinsic
def gather(_: Any, array: Any, start: Any, indices: Any, at: Any, like: Any) -> Any:
    """A vector of ``array[start + indices[at + lane]]``; `indices` are not negative."""
    if not (is_array(array) and is_array(indices) and isinstance(like, Vector)):
        return None
    if not (isinstance(start, types.Integer) and isinstance(at, types.Integer)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        bits, lanes = int(indices.dtype.bitwidth), like.lanes
        places = emit.load(
            emit.at(emit.data(2), emit.index(3)), ir.VectorType(ir.IntType(bits), lanes), bits // 8
        )
        wide = ir.VectorType(I64, lanes)
        offsets = builder.zext(places, wide) if bits < 64 else places
        # llvmlite has no pointers that are vectors to start from.
        size = item_bytes(like.dtype)
        base = builder.ptrtoint(emit.at(emit.data(0), emit.index(1)), I64)
        undefined = ir.Constant(wide, ir.Undefined)
        bases = emit.shuffle(builder.insert_element(undefined, base, I32(0)), undefined, [0] * lanes)
        scale = ir.Constant(wide, [size] * lanes)
        addresses = builder.add(bases, builder.mul(offsets, scale))
        pointers = builder.inttoptr(addresses, ir.VectorType(emit.data(0).type, lanes))
        mask = ir.Constant(ir.VectorType(ir.IntType(1), lanes), [1] * lanes)
        kind = ir.FunctionType(like.llvm, [pointers.type, I32, mask.type, like.llvm])
        element = "f32" if like.dtype == types.float32 else "f64"
        function = cgutils.get_or_insert_function(
            builder.module, kind, f"llvm.masked.gather.v{lanes}{element}.v{lanes}p0"
        )
        nothing = ir.Constant(like.llvm, ir.Undefined)
        return builder.call(function, [pointers, I32(size), mask, nothing])

    return like(array, start, indices, at, like), codegen
