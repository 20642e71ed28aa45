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
from numba.extending import intrinsic

from sparselab.kernels.cpu.runtime.target import CACHE_LINE, TILE_BYTES, VECTOR_BYTES
from sparselab.kernels.cpu.simd.emit import FLAGS, I32, I64, Emit, Vector, is_array, item_bytes
from sparselab.kernels.cpu.simd.narrow import number_type, numbers


@intrinsic
def get(_: Any, array: Any, index: Any) -> Any:
    """``array[index]`` without the wrap-around of negative indices, which costs four operations a load."""
    if not (is_array(array) and isinstance(index, types.Integer)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        return builder.load(emit.at(emit.data(0), emit.index(1)))

    return array.dtype(array, index), codegen


@intrinsic
def weight(_: Any, values: Any, index: Any) -> Any:
    """``values[index]`` as a number to multiply by; a uint16 array holds the bits of bfloat16 values."""
    if not (is_array(values) and isinstance(index, types.Integer)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        return numbers(builder, builder.load(emit.at(emit.data(0), emit.index(1))), values.dtype)

    return number_type(values.dtype)(values, index), codegen


@intrinsic
def put(_: Any, array: Any, index: Any, value: Any) -> Any:
    """``array[index] = value`` without the wrap-around of negative indices; integers of any width."""
    if not (is_array(array) and isinstance(index, types.Integer)):
        return None
    if value != array.dtype and not all(isinstance(each, types.Integer) for each in (value, array.dtype)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        stored = context.cast(builder, args[2], value, array.dtype)
        builder.store(stored, emit.at(emit.data(0), emit.index(1)))
        return emit.nothing()

    return types.void(array, index, value), codegen


@intrinsic
def view_at(_: Any, address: Any, like: Any) -> Any:
    """1-D array over the memory at an address, of the dtype of `like`; its length is not known.

    Kernels take matrices of any strides, read-only or not, this way: as array arguments each combination
    would be a Numba type of its own and compile the kernel again.
    """
    if not (isinstance(address, types.Integer) and is_array(like)):
        return None
    array_type = types.Array(like.dtype, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        item = context.get_data_type(array_type.dtype)
        return emit.array(array_type, builder.inttoptr(emit.index(0), item.as_pointer()))

    return array_type(address, like), codegen


def _items_in(n_bytes: int) -> Any:
    @intrinsic
    def items(_: Any, array: Any) -> Any:
        if not isinstance(array, types.Array):
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return context.get_constant(types.intp, n_bytes // item_bytes(array.dtype))

        return types.intp(array), codegen

    return items


#: ``tile_width(array)`` and ``line_width(array)``: values of the array's dtype in a row of a tile and in a
#: cache line, as constants of the compiled code. ``TILE_BYTES // array.itemsize`` would be read from the
#: array: a multiplication for each row of a tile, and loops that are not unrolled.
tile_width, line_width = _items_in(TILE_BYTES), _items_in(CACHE_LINE)


def _zeros(lanes: int = 0, n_bytes: int = 0, registers: int = 0) -> Any:
    """An intrinsic that makes zeros: so many lanes, so many bytes, or a tuple of so many registers."""

    @intrinsic
    def zeros(_: Any, array: Any) -> Any:
        vector = Vector(array.dtype, lanes or (n_bytes or VECTOR_BYTES) // item_bytes(array.dtype))
        row = types.UniTuple(vector, registers) if registers else vector

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            zero = ir.Constant(vector.llvm, [0] * vector.lanes)
            return _join(builder, [zero] * (registers or 1), row)

        return row(array), codegen

    return zeros


def _vector(row: Any) -> Vector:
    """The vector type of a row, which is a vector or a tuple of equal ones."""
    vector: Vector = row if isinstance(row, Vector) else row.dtype
    return vector


def _is_row(value: Any) -> bool:
    return isinstance(value, Vector) or (
        isinstance(value, types.UniTuple) and isinstance(value.dtype, Vector)
    )


def _split(builder: Any, value: Any, row: Any) -> list[Any]:
    """The vectors of a row."""
    return [value] if isinstance(row, Vector) else cgutils.unpack_tuple(builder, value, row.count)


def _join(builder: Any, vectors: list[Any], row: Any) -> Any:
    """The row of these vectors."""
    return vectors[0] if isinstance(row, Vector) else cgutils.pack_array(builder, vectors)


#: ``zeros4(array)``, ``zeros8(array)``, ``zeros16(array)``: vectors of so many zeros of the array's dtype. As
#: `like` they tell the functions below what to work on.
zeros4, zeros8, zeros16 = _zeros(4), _zeros(8), _zeros(16)

#: A row of two such vectors of 16.
zeros_twice16 = _zeros(16, registers=2)

#: The same as long as a row of a tile, a vector register, and parts of a cache line.
zeros_tile, zeros_register = _zeros(n_bytes=TILE_BYTES), _zeros(n_bytes=VECTOR_BYTES)
quarter_line, half_line = _zeros(n_bytes=CACHE_LINE // 4), _zeros(n_bytes=CACHE_LINE // 2)
whole_line = _zeros(n_bytes=CACHE_LINE)


def zero_registers(count: int) -> Any:
    """An intrinsic of an array that makes a tuple of so many vector registers of zeros of its dtype.

    LLVM keeps each of them in a register of its own; it has no vectors of three registers.
    """
    return _zeros(registers=count)


@intrinsic
def lanes_of(_: Any, like: Any) -> Any:
    """Numbers in a row, as a constant of the compiled code."""
    if not _is_row(like):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.intp, _vector(like).lanes * getattr(like, "count", 1))

    return types.intp(like), codegen


def _alignment(vector: Vector, aligned: bool) -> int:
    item = item_bytes(vector.dtype)
    return min(CACHE_LINE, vector.lanes * item) if aligned else item


def _places(emit: Emit, row: Any) -> list[Any]:
    """Pointers to the vectors of a row at the index that is argument 1 in the array that is argument 0."""
    start, lanes = emit.index(1), _vector(row).lanes
    offsets = [emit.builder.add(start, I64(k * lanes)) for k in range(getattr(row, "count", 1))]
    return [emit.at(emit.data(0), offset) for offset in offsets]


def _load(aligned: bool) -> Any:
    @intrinsic
    def load(_: Any, array: Any, index: Any, like: Any) -> Any:
        if not (is_array(array) and isinstance(index, types.Integer) and _is_row(like)):
            return None
        vector = _vector(like)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit = Emit(context, builder, signature, args)
            align = _alignment(vector, aligned)
            return _join(builder, [emit.load(at, vector.llvm, align) for at in _places(emit, like)], like)

        return like(array, index, like), codegen

    return load


def _store(aligned: bool) -> Any:
    @intrinsic
    def store(_: Any, array: Any, index: Any, row: Any) -> Any:
        if not (is_array(array) and isinstance(index, types.Integer) and _is_row(row)):
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit = Emit(context, builder, signature, args)
            for vector, place in zip(_split(builder, args[2], row), _places(emit, row), strict=True):
                emit.store(vector, place, _alignment(_vector(row), aligned))
            return emit.nothing()

        return types.void(array, index, row), codegen

    return store


@intrinsic
def stream(_: Any, array: Any, index: Any, vector: Any) -> Any:
    """As `store` of one vector, past the caches: for what nobody reads soon, of whole cache lines."""
    if not (is_array(array) and isinstance(index, types.Integer) and isinstance(vector, Vector)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        pointer = emit.at(emit.data(0), emit.index(1))
        place = builder.bitcast(pointer, args[2].type.as_pointer())
        stored = builder.store(args[2], place, align=_alignment(vector, True))
        stored.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))
        return emit.nothing()

    return types.void(array, index, vector), codegen


#: ``load(array, index, like)`` and ``store(array, index, row)``: a row at ``array[index]``, a place that is
#: aligned to the size of the row's vectors or to a cache line; the others work at any place.
load, load_unaligned = _load(aligned=True), _load(aligned=False)
store, store_unaligned = _store(aligned=True), _store(aligned=False)


@intrinsic
def splat(_: Any, value: Any, like: Any) -> Any:
    """A row like `like` whose every number is `value`."""
    if not (_is_row(like) and value == _vector(like).dtype):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        one = Emit(context, builder, signature, args).splat(args[0], _vector(like).lanes)
        return _join(builder, [one] * getattr(like, "count", 1), like)

    return like(value, like), codegen


@intrinsic
def add(_: Any, a: Any, b: Any) -> Any:
    """``a + b``, lane by lane."""
    if not (_is_row(a) and a == b):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pairs = zip(_split(builder, args[0], a), _split(builder, args[1], a), strict=True)
        return _join(builder, [builder.fadd(*pair, flags=FLAGS) for pair in pairs], a)

    return a(a, b), codegen


@intrinsic
def fma(_: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, lane by lane; `a` is a row like the others, one of their vectors, or a number."""
    if not (_is_row(b) and b == c and a in (b, _vector(b), _vector(b).dtype)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        rows, totals = (_split(builder, args[k], c) for k in (1, 2))
        if a == b:
            factors = _split(builder, args[0], a)
        else:
            factors = [args[0] if isinstance(a, Vector) else emit.splat(args[0], _vector(b).lanes)] * len(
                rows
            )
        return _join(builder, [emit.fmuladd(*each) for each in zip(factors, rows, totals, strict=True)], c)

    return c(a, b, c), codegen


@intrinsic
def next_item(_: Any, counter: Any) -> Any:
    """The next work item of a dynamic schedule, whose workers share the counter (see `new_counter`).

    Workers are seldom equally fast, where other processes run or cores are of two kinds.
    """
    if not (is_array(counter) and counter.dtype == types.int64):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", Emit(context, builder, signature, args).data(0), I64(1), "monotonic")

    return types.int64(counter), codegen


def _prefetch(to_write: bool, locality: int = 3) -> Any:
    @intrinsic
    def prefetch(_: Any, array: Any, index: Any) -> Any:
        if not (is_array(array) and isinstance(index, types.Integer)):
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit = Emit(context, builder, signature, args)
            pointer = builder.bitcast(emit.at(emit.data(0), emit.index(1)), ir.IntType(8).as_pointer())
            kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            builder.call(function, [pointer, *(ir.Constant(I32, k) for k in (int(to_write), locality, 1))])
            return emit.nothing()

        return types.void(array, index), codegen

    return prefetch


#: ``prefetch(array, index)`` and ``prefetch_to_write(array, index)``: ask for the cache line of
#: ``array[index]``, which need not exist; `prefetch_far` for the second-level cache only.
prefetch, prefetch_to_write = _prefetch(to_write=False), _prefetch(to_write=True)
prefetch_far = _prefetch(to_write=False, locality=2)
