"""Memory as words of 64 bits, by address."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_I8, _I64 = ir.IntType(8), ir.IntType(64)


@intrinsic
def peek(_: Any, at: Any) -> Any:
    """The word at an address."""
    if at != types.int64:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], _I64.as_pointer()))

    return types.int64(at), codegen


@intrinsic
def poke(_: Any, at: Any, word: Any) -> Any:
    """Write a word to an address."""
    if not (at == types.int64 and isinstance(word, types.Integer)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = context.cast(builder, args[1], word, types.int64)
        builder.store(wide, builder.inttoptr(args[0], _I64.as_pointer()))
        return context.get_dummy_value()

    return types.void(at, word), codegen


@intrinsic
def clear(_: Any, at: Any, n_bytes: Any) -> Any:
    """Set so many bytes to 0."""
    if not (at == types.int64 and n_bytes == types.int64):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I8, _I64, ir.IntType(1)])
        function = builder.module.declare_intrinsic("llvm.memset", (pointer.type, _I64), kind)
        builder.call(function, [pointer, _I8(0), args[1], ir.IntType(1)(0)])
        return context.get_dummy_value()

    return types.void(at, n_bytes), codegen


@intrinsic
def copy(_: Any, target: Any, source: Any, n_bytes: Any) -> Any:
    """Copy so many bytes from one address to another; the two places do not overlap."""
    if not (target == source == n_bytes == types.int64):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, at = (builder.inttoptr(each, _I8.as_pointer()) for each in args[:2])
        kind = ir.FunctionType(ir.VoidType(), [to.type, at.type, _I64, ir.IntType(1)])
        function = builder.module.declare_intrinsic("llvm.memcpy", (to.type, at.type, _I64), kind)
        builder.call(function, [to, at, args[2], ir.IntType(1)(0)])
        return context.get_dummy_value()

    return types.void(target, source, n_bytes), codegen
