"""Dots of tile rows, several at a time: the arithmetic of `sddmm_dw` as vector intrinsics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparselab.kernels.cpu.runtime.target import TILE_BYTES, VECTOR_BYTES
from sparselab.kernels.cpu.simd.emit import FLAGS, I32, I64, Emit, Vector, item_bytes


def register_lanes(dtype: types.Type) -> int:
    """Values of `dtype` in one vector register."""
    return VECTOR_BYTES // item_bytes(dtype)


def sum_lanes(emit: Emit, partials: list[Any]) -> Any:
    """Sum the lanes of each of 2^n vectors: lane k of the result is the sum of ``partials[k]``.

    A tree of pairwise shuffles and additions: about three operations per vector, where a horizontal sum of
    one vector alone takes two per halving. Every shuffle is one that CPUs have as a single instruction.
    """
    builder = emit.builder
    count, lanes = len(partials), partials[0].type.count
    bit = 1
    while len(partials) > 1:
        low = [lanes + lane - bit if lane & bit else lane for lane in range(lanes)]
        high = [lanes + lane if lane & bit else lane + bit for lane in range(lanes)]
        if bit == 1 and isinstance(partials[0].type.element, ir.FloatType):
            # Interleave the lower and the upper halves of each four lanes (x86 unpack, NEON zip): exchanging
            # neighbours instead would take two instructions on x86.
            low = [lane // 4 * 4 + lane % 4 // 2 + lane % 2 * lanes for lane in range(lanes)]
            high = [lane + 2 for lane in low]
        partials = [
            builder.fadd(emit.shuffle(a, b, low), emit.shuffle(a, b, high), flags=FLAGS)
            for a, b in zip(partials[::2], partials[1::2], strict=True)
        ]
        bit *= 2
    total = partials[0]
    while lanes > count:
        lanes //= 2
        lower, upper = list(range(lanes)), list(range(lanes, 2 * lanes))
        total = builder.fadd(
            emit.shuffle(total, total, lower), emit.shuffle(total, total, upper), flags=FLAGS
        )
    return total


@intrinsic
def sum_of(_: Any, vector: Any) -> Any:
    """The sum of the lanes of one vector."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total = sum_lanes(Emit(context, builder, signature, args), [args[0]])
        return builder.extract_element(total, ir.Constant(I32, 0))

    return vector.dtype(vector), codegen


def _products(
    emit: Emit, rows: Any, row: Any, tile: Any, offsets: list[Any], register: Any, count: int
) -> list[Any]:
    """A row times the rows at some offsets in a tile: their first `count` registers, which are added up."""

    def parts(array: Any, start: Any) -> list[Any]:
        lanes = register.count
        places = [emit.builder.add(start, ir.Constant(I64, lanes * j)) for j in range(count)]
        return [emit.load(emit.at(array, place), register, VECTOR_BYTES) for place in places]

    left, partials = parts(rows, row), []
    for offset in offsets:
        right = parts(tile, offset)
        partial = emit.builder.fmul(left[0], right[0], flags=FLAGS)
        for a, b in zip(left[1:], right[1:], strict=True):
            partial = emit.fmuladd(a, b, partial)
        partials.append(partial)
    return partials


def _either(
    builder: Any, is_first: Any, first: Callable[[], list[Any]], second: Callable[[], list[Any]]
) -> list[Any]:
    """Values that are computed in one of two ways when the code runs."""
    with builder.if_else(is_first) as (then, otherwise):
        with then:
            some, some_block = first(), builder.block
        with otherwise:
            others, others_block = second(), builder.block
    found = []
    for one, other in zip(some, others, strict=True):
        value = builder.phi(one.type)
        value.add_incoming(one, some_block)
        value.add_incoming(other, others_block)
        found.append(value)
    return found


def _dots(count: int, clamped: bool = False, partly: bool = False) -> Any:
    @intrinsic
    def dots(
        _: Any, rows: Any, row: Any, tile: Any, columns: Any, slot: Any, bound: Any, column0: Any,
        is_half: Any, out: Any,
    ) -> Any:  # fmt: skip
        dtype = tile.dtype
        lanes = register_lanes(dtype)
        group = min(count, lanes)
        part = Vector(dtype, lanes)
        width = TILE_BYTES // item_bytes(dtype)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit = Emit(context, builder, signature, args)
            row_start, slot0, limit, origin = (emit.index(k) for k in (1, 4, 5, 6))

            def constant(value: int) -> ir.Constant:
                return ir.Constant(I64, value)

            offsets = []
            for k in range(group):
                place = builder.add(slot0, constant(k))
                if clamped:
                    inside = builder.icmp_signed("<", place, limit)
                    place = builder.select(inside, place, limit)
                column = builder.load(emit.at(emit.data(3), place))
                column = context.cast(builder, column, signature.args[3].dtype, types.intp)
                offsets.append(builder.mul(builder.sub(column, origin), constant(width)))
            operands = emit, emit.data(0), row_start, emit.data(2), offsets, part.llvm
            partials = _either(
                builder, args[7], lambda: _products(*operands, max(width // lanes // 2, 1)),
                lambda: _products(*operands, width // lanes),
            )  # fmt: skip
            sums = sum_lanes(emit, partials)
            target = emit.at(emit.data(8), constant(0) if clamped else slot0)
            if partly:
                wanted = [
                    builder.icmp_signed(">=", builder.add(slot0, constant(k)), limit) for k in range(group)
                ]
                mask = ir.Constant(ir.VectorType(ir.IntType(1), group), ir.Undefined)
                for k, bit in enumerate(wanted):
                    mask = builder.insert_element(mask, bit, ir.Constant(I32, k))
                sums = builder.select(mask, sums, ir.Constant(sums.type, [0] * group))
            if not clamped:
                sums = builder.fadd(emit.load(target, sums.type, item_bytes(dtype)), sums, flags=FLAGS)
            emit.store(sums, target, item_bytes(dtype))
            return emit.nothing()

        return types.void(rows, row, tile, columns, slot, bound, column0, is_half, out), codegen

    return dots


#: Most dots that one call of `add_dots` and `some_dots` computes (fewer where a register has fewer lanes).
DOTS = 8
SOME_DOTS = 4

#: ``add_dots(rows, row, tile, columns, slot, bound, column0, is_half, out)``: for the `DOTS` slots from
#: `slot` on, add to ``out[slot]`` the dot of the tile row ``rows[row:]`` with that of the slot's column in
#: `tile`, whose first row is column `column0`; of their first halves alone, if `is_half` (bool).
add_dots = _dots(DOTS)

#: As `add_dots`, only for the slots from `bound` on.
add_last_dots = _dots(DOTS, partly=True)

#: As `add_dots` for up to `SOME_DOTS` slots, none read past `bound`; the dots are stored at ``out[0:]``.
some_dots = _dots(SOME_DOTS, clamped=True)


@intrinsic
def add_sums(_: Any, out: Any, first: Any, end: Any, rows: Any) -> Any:
    """Add the sums of the lanes of some registers to ``out[first : min(first + count, end)]``.

    Their number is a multiple of 4, or of 8 to make the best of registers of 8 lanes and more.
    """
    if not (isinstance(rows, types.UniTuple) and isinstance(rows.dtype, Vector) and rows.count % 4 == 0):
        return None
    group = min(rows.dtype.lanes, 4 if rows.count % 8 else 8)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        vectors = cgutils.unpack_tuple(builder, args[3], rows.count)
        sums = [sum_lanes(emit, vectors[k : k + group]) for k in range(0, rows.count, group)]
        start, limit = emit.index(1), emit.index(2)
        size = item_bytes(out.dtype)
        whole = builder.icmp_signed("<=", builder.add(start, I64(rows.count)), limit)
        with builder.if_else(whole) as (then, otherwise):
            with then:
                for k, total in enumerate(sums):
                    place = emit.at(emit.data(0), builder.add(start, I64(k * group)))
                    before = emit.load(place, total.type, size)
                    emit.store(builder.fadd(before, total, flags=FLAGS), place, size)
            with otherwise:
                for k in range(rows.count - 1):
                    at = builder.add(start, I64(k))
                    with builder.if_then(builder.icmp_signed("<", at, limit)):
                        place = emit.at(emit.data(0), at)
                        one = builder.extract_element(sums[k // group], I32(k % group))
                        builder.store(builder.fadd(builder.load(place), one, flags=FLAGS), place)
        return emit.nothing()

    return types.void(out, first, end, rows), codegen
