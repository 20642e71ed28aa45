"""What the vector intrinsics are written with: the type of a vector, and a few LLVM idioms."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import register_model
from numba.np.arrayobj import populate_array

from sparselab.kernels.cpu.runtime.jit import FASTMATH

I1 = ir.IntType(1)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
FLAGS = tuple(sorted(FASTMATH))
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
        """The same type in LLVM."""
        return ir.VectorType(_element(self.dtype), self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


def _element(dtype: types.Type) -> ir.Type:
    return ir.FloatType() if dtype == types.float32 else ir.DoubleType()


def item_bytes(dtype: types.Type) -> int:
    """Bytes of one value of a Numba type."""
    return int(dtype.bitwidth) // 8


def is_array(value: types.Type) -> bool:
    """Whether values of a Numba type are 1-D arrays in C order."""
    return isinstance(value, types.Array) and value.ndim == 1 and value.layout == "C"


class Emit:
    """The few LLVM idioms that the intrinsics share, bound to one call site."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        self.context, self.builder, self.signature, self.args = context, builder, signature, args

    def data(self, k: int) -> Any:
        """Pointer to the first element of array argument k."""
        array = self.context.make_array(self.signature.args[k])(self.context, self.builder, self.args[k])
        return array.data

    def array(self, array_type: types.Array, pointer: Any) -> Any:
        """A 1-D array of that type whose first element is at a pointer; its length is not known."""
        array = self.context.make_array(array_type)(self.context, self.builder)
        size = self.context.get_constant(types.intp, item_bytes(array_type.dtype))
        populate_array(
            array,
            data=self.builder.bitcast(pointer, array.data.type),
            shape=cgutils.pack_array(self.builder, [self.context.get_constant(types.intp, 1)]),
            strides=cgutils.pack_array(self.builder, [size]),
            itemsize=size,
            meminfo=None,
        )
        return array._getvalue()

    def index(self, k: int) -> Any:
        """Integer argument k, widened to 64 bits."""
        return self.context.cast(self.builder, self.args[k], self.signature.args[k], types.intp)

    def at(self, pointer: Any, offset: Any) -> Any:
        """The pointer moved by so many elements."""
        return self.builder.gep(pointer, [offset])

    def load(self, pointer: Any, vector: ir.VectorType, align: int) -> Any:
        """The vector at a pointer that is a multiple of `align` bytes."""
        return self.builder.load(self.builder.bitcast(pointer, vector.as_pointer()), align=align)

    def store(self, value: Any, pointer: Any, align: int) -> None:
        """Write a vector to a pointer that is a multiple of `align` bytes."""
        self.builder.store(value, self.builder.bitcast(pointer, value.type.as_pointer()), align=align)

    def shuffle(self, a: Any, b: Any, lanes: list[int]) -> Any:
        """The vector of these lanes of `a` and `b`, numbered through."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    def splat(self, value: Any, lanes: int) -> Any:
        """A vector of so many lanes, all of them `value`."""
        undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        one = self.builder.insert_element(undefined, value, ir.Constant(I32, 0))
        return self.shuffle(one, undefined, [0] * lanes)

    def fmuladd(self, a: Any, b: Any, c: Any) -> Any:
        """``a * b + c``, in one operation where the CPU has one."""
        # fmuladd, not fma: without FMA hardware the latter becomes one libm call per lane.
        name = "f32" if isinstance(a.type.element, ir.FloatType) else "f64"
        function = cgutils.get_or_insert_function(
            self.builder.module,
            ir.FunctionType(a.type, [a.type] * 3),
            f"llvm.fmuladd.v{a.type.count}{name}",
        )
        return self.builder.call(function, [a, b, c])

    def nothing(self) -> Any:
        """What an intrinsic without a result returns."""
        return self.context.get_dummy_value()
