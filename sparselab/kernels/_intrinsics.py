"""Vector operations for Numba kernels: one LLVM operation each, or one fixed pattern of them.

`Vector` is a Numba type for LLVM's ``<lanes x float>``. A *tile row* is a vector of `TILE_BYTES`, several
machine registers wide; LLVM splits it for the host (4 zmm, 4 ymm or 8 NEON registers), so the kernels are
written once. None of these check bounds, and none run outside compiled code: `reference` carries the meaning.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model
from numba.np.arrayobj import populate_array

from sparselab.kernels._jit import FASTMATH
from sparselab.kernels._target import TILE_BYTES, VECTOR_BYTES

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_FLAGS = tuple(sorted(FASTMATH))
_NAMES = {types.float32: "f32", types.float64: "f64"}


class Vector(types.Type):
    """LLVM vector of `lanes` values of `dtype` (float32 or float64)."""

    def __init__(self, dtype: types.Type, lanes: int) -> None:
        if dtype not in _NAMES:
            raise TypeError(f"dtype must be float32 or float64, got {dtype}")
        self.dtype = dtype
        self.lanes = lanes
        super().__init__(name=f"Vector({dtype}, {lanes})")

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(_element(self.dtype), self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


def _element(dtype: types.Type) -> ir.Type:
    return ir.FloatType() if dtype == types.float32 else ir.DoubleType()


def _itemsize(dtype: types.Type) -> int:
    return int(dtype.bitwidth) // 8


def tile_row(dtype: types.Type) -> Vector:
    """The vector type of one tile row."""
    return Vector(dtype, TILE_BYTES // _itemsize(dtype))


def _is_array(value: types.Type) -> bool:
    return isinstance(value, types.Array) and value.ndim == 1 and value.layout == "C"


class _Emit:
    """The few LLVM idioms that the intrinsics share, bound to one call site."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        self.context, self.builder, self.signature, self.args = context, builder, signature, args

    def data(self, k: int) -> Any:
        """Pointer to the first element of array argument k."""
        array = self.context.make_array(self.signature.args[k])(self.context, self.builder, self.args[k])
        return array.data

    def index(self, k: int) -> Any:
        """Integer argument k, widened to 64 bits."""
        return self.context.cast(self.builder, self.args[k], self.signature.args[k], types.intp)

    def at(self, pointer: Any, offset: Any) -> Any:
        return self.builder.gep(pointer, [offset])

    def load(self, pointer: Any, vector: ir.VectorType, align: int) -> Any:
        return self.builder.load(self.builder.bitcast(pointer, vector.as_pointer()), align=align)

    def store(self, value: Any, pointer: Any, align: int) -> None:
        self.builder.store(value, self.builder.bitcast(pointer, value.type.as_pointer()), align=align)

    def shuffle(self, a: Any, b: Any, lanes: list[int]) -> Any:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))

    def fmuladd(self, a: Any, b: Any, c: Any) -> Any:
        # fmuladd, not fma: without FMA hardware the latter becomes one libm call per lane.
        name = "f32" if isinstance(a.type.element, ir.FloatType) else "f64"
        function = cgutils.get_or_insert_function(
            self.builder.module,
            ir.FunctionType(a.type, [a.type] * 3),
            f"llvm.fmuladd.v{a.type.count}{name}",
        )
        return self.builder.call(function, [a, b, c])

    def nothing(self) -> Any:
        return self.context.get_dummy_value()


@intrinsic
def get(_: Any, array: Any, index: Any) -> Any:
    """``array[index]`` without the wrap-around of negative indices, which costs four operations a load."""
    if not (_is_array(array) and isinstance(index, types.Integer)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = _Emit(context, builder, signature, args)
        return builder.load(emit.at(emit.data(0), emit.index(1)))

    return array.dtype(array, index), codegen


@intrinsic
def put(_: Any, array: Any, index: Any, value: Any) -> Any:
    """``array[index] = value`` without the wrap-around of negative indices."""
    if not (_is_array(array) and isinstance(index, types.Integer) and value == array.dtype):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = _Emit(context, builder, signature, args)
        builder.store(args[2], emit.at(emit.data(0), emit.index(1)))
        return emit.nothing()

    return types.void(array, index, value), codegen


@intrinsic
def view_at(_: Any, address: Any, like: Any) -> Any:
    """1-D array over the memory at an address, of the dtype of `like`; its length is not known.

    Kernels take matrices of any strides, read-only or not, this way: as array arguments each combination
    would be a Numba type of its own and compile the kernel again.
    """
    if not (isinstance(address, types.Integer) and _is_array(like)):
        return None
    array_type = types.Array(like.dtype, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = _Emit(context, builder, signature, args)
        array = context.make_array(array_type)(context, builder)
        size = context.get_constant(types.intp, _itemsize(array_type.dtype))
        populate_array(
            array,
            data=builder.inttoptr(emit.index(0), array.data.type),
            shape=cgutils.pack_array(builder, [context.get_constant(types.intp, 1)]),
            strides=cgutils.pack_array(builder, [size]),
            itemsize=size,
            meminfo=None,
        )
        return array._getvalue()

    return array_type(address, like), codegen


@intrinsic
def tile_width(_: Any, array: Any) -> Any:
    """Values in one row of a tile of the array's dtype, as a constant of the compiled code.

    ``TILE_BYTES // array.itemsize`` would be read from the array: a multiplication for each row of a tile.
    """
    if not isinstance(array, types.Array):
        return None
    width = TILE_BYTES // _itemsize(array.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.intp, width)

    return types.intp(array), codegen


@intrinsic
def load_row(_: Any, tile: Any, index: Any) -> Any:
    """The tile row that starts at ``tile[index]``; the place must lie on a cache line."""
    if not (_is_array(tile) and isinstance(index, types.Integer)):
        return None
    vector = tile_row(tile.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = _Emit(context, builder, signature, args)
        return emit.load(emit.at(emit.data(0), emit.index(1)), vector.llvm, 64)

    return vector(tile, index), codegen


@intrinsic
def store_row(_: Any, tile: Any, index: Any, row: Any) -> Any:
    """Store a tile row at ``tile[index]``; the place must lie on a cache line."""
    if not (_is_array(tile) and isinstance(index, types.Integer) and isinstance(row, Vector)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = _Emit(context, builder, signature, args)
        emit.store(args[2], emit.at(emit.data(0), emit.index(1)), 64)
        return emit.nothing()

    return types.void(tile, index, row), codegen


@intrinsic
def splat_row(_: Any, value: Any) -> Any:
    """A tile row whose every lane is `value`."""
    if value not in _NAMES:
        return None
    vector = tile_row(value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = _Emit(context, builder, signature, args)
        undefined = ir.Constant(vector.llvm, ir.Undefined)
        one = builder.insert_element(undefined, args[0], ir.Constant(_I32, 0))
        return emit.shuffle(one, undefined, [0] * vector.lanes)

    return vector(value), codegen


@intrinsic
def fma_row(_: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, lane by lane."""
    if not (isinstance(a, Vector) and a == b == c):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _Emit(context, builder, signature, args).fmuladd(*args)

    return a(a, b, c), codegen


@intrinsic
def transpose8(
    _: Any, source: Any, first: Any, stride: Any, target: Any, target_first: Any, target_stride: Any
) -> Any:
    """Transpose an 8 x 8 block in registers.

    ``target[target_first + i * target_stride + j] = source[first + j * stride + i]`` for i, j < 8. Three
    rounds of two-input shuffles, each exchanging the lanes whose index differs in one bit.
    """
    if not (_is_array(source) and _is_array(target) and source.dtype == target.dtype):
        return None
    vector = Vector(source.dtype, 8)
    itemsize = _itemsize(source.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = _Emit(context, builder, signature, args)

        def lines(array: int) -> list[Any]:
            start, step = emit.index(array + 1), emit.index(array + 2)
            offsets = [builder.add(start, builder.mul(step, ir.Constant(_I64, k))) for k in range(8)]
            return [emit.at(emit.data(array), offset) for offset in offsets]

        rows = [emit.load(pointer, vector.llvm, itemsize) for pointer in lines(0)]
        for bit in (1, 2, 4):
            low = [8 + lane - bit if lane & bit else lane for lane in range(8)]
            high = [8 + lane if lane & bit else lane + bit for lane in range(8)]
            for i in range(8):
                if not i & bit:
                    a, b = rows[i], rows[i + bit]
                    rows[i], rows[i + bit] = emit.shuffle(a, b, low), emit.shuffle(a, b, high)
        for row, pointer in zip(rows, lines(3), strict=True):
            emit.store(row, pointer, itemsize)
        return emit.nothing()

    return (
        types.void(source, first, stride, target, target_first, target_stride),
        codegen,
    )


def register_lanes(dtype: types.Type) -> int:
    """Values of `dtype` in one vector register."""
    return VECTOR_BYTES // _itemsize(dtype)


def _sum_lanes(emit: _Emit, partials: list[Any]) -> Any:
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
            builder.fadd(emit.shuffle(a, b, low), emit.shuffle(a, b, high), flags=_FLAGS)
            for a, b in zip(partials[::2], partials[1::2], strict=True)
        ]
        bit *= 2
    total = partials[0]
    while lanes > count:
        lanes //= 2
        lower, upper = list(range(lanes)), list(range(lanes, 2 * lanes))
        total = builder.fadd(
            emit.shuffle(total, total, lower), emit.shuffle(total, total, upper), flags=_FLAGS
        )
    return total


def _dots(count: int, clamped: bool = False, partly: bool = False) -> Any:
    @intrinsic
    def dots(
        _: Any, rows: Any, row: Any, tile: Any, columns: Any, slot: Any, bound: Any, column0: Any, out: Any
    ) -> Any:
        dtype = tile.dtype
        lanes = register_lanes(dtype)
        group = min(count, lanes)
        part = Vector(dtype, lanes)
        width = TILE_BYTES // _itemsize(dtype)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit = _Emit(context, builder, signature, args)
            row_start, slot0, limit, origin = (emit.index(k) for k in (1, 4, 5, 6))

            def constant(value: int) -> ir.Constant:
                return ir.Constant(_I64, value)

            def parts(array: Any, start: Any) -> list[Any]:
                places = [builder.add(start, constant(lanes * j)) for j in range(width // lanes)]
                return [emit.load(emit.at(array, place), part.llvm, VECTOR_BYTES) for place in places]

            left = parts(emit.data(0), row_start)
            partials = []
            for k in range(group):
                place = builder.add(slot0, constant(k))
                if clamped:
                    inside = builder.icmp_signed("<", place, limit)
                    place = builder.select(inside, place, limit)
                column = builder.load(emit.at(emit.data(3), place))
                column = context.cast(builder, column, signature.args[3].dtype, types.intp)
                offset = builder.mul(builder.sub(column, origin), constant(width))
                right = parts(emit.data(2), offset)
                partial = builder.fmul(left[0], right[0], flags=_FLAGS)
                for a, b in zip(left[1:], right[1:], strict=True):
                    partial = emit.fmuladd(a, b, partial)
                partials.append(partial)
            sums = _sum_lanes(emit, partials)
            target = emit.at(emit.data(7), constant(0) if clamped else slot0)
            if partly:
                wanted = [
                    builder.icmp_signed(">=", builder.add(slot0, constant(k)), limit) for k in range(group)
                ]
                mask = ir.Constant(ir.VectorType(ir.IntType(1), group), ir.Undefined)
                for k, bit in enumerate(wanted):
                    mask = builder.insert_element(mask, bit, ir.Constant(_I32, k))
                sums = builder.select(mask, sums, ir.Constant(sums.type, None))
            if not clamped:
                sums = builder.fadd(emit.load(target, sums.type, _itemsize(dtype)), sums, flags=_FLAGS)
            emit.store(sums, target, _itemsize(dtype))
            return emit.nothing()

        return types.void(rows, row, tile, columns, slot, bound, column0, out), codegen

    return dots


#: Most dots that one call of `add_dots` and `some_dots` computes (fewer where a register has fewer lanes).
DOTS = 8
SOME_DOTS = 4

#: ``add_dots(rows, row, tile, columns, slot, bound, column0, out)``: for the `DOTS` slots from `slot` on, add
#: to ``out[slot]`` the dot of the tile row ``rows[row:]`` with that of the slot's column in `tile`, whose
#: first row is column `column0`.
add_dots = _dots(DOTS)

#: As `add_dots`, only for the slots from `bound` on.
add_last_dots = _dots(DOTS, partly=True)

#: As `add_dots` for up to `SOME_DOTS` slots, none read past `bound`; the dots are stored at ``out[0:]``.
some_dots = _dots(SOME_DOTS, clamped=True)
