"""Nonlinearities of vectors in float32, and their derivatives.

They are made of multiply-adds, one division and shuffles of no kind: ``exp`` of a number that is not positive
by a polynomial of degree 6 between powers of two (relative error 2e-9), the normal distribution's tail by
``t P(t) exp(-x^2 / 2)`` with ``t = 1 / (1 + p |x|)``, after Abramowitz and Stegun, Handbook of Mathematical
Functions, 26.2.17, with P of degree 9 in place of 5 (4e-9 in place of 7.5e-8, and of the tail itself, however
small). What is left is the rounding of a few operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparselab.kernels.cpu.simd.emit import I32, Emit, Vector

#: The nonlinearities by name; kernels know them by their number.
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")

_EXP = (1.000000001, 1.000000036, 0.4999999149, 0.1666642081, 0.04166835816, 0.008374773043, 0.00138294184)
_TAIL = (
    0.09238521864, 0.09297584196, 0.08219803199, 0.1057433582, -0.03290842275, 0.264637707, -0.296396736,
    0.3257143018, -0.1636041977, 0.02925489619,
)  # fmt: skip
_TAIL_STEP = 0.2316419

#: Adding it to a number below 2^22 leaves the nearest integer in the lowest bits.
_ROUNDER = 12582912.0
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4

#: Where the exponential function of float32 would become subnormal; it is 0 below.
_LOWEST = -87.3


class _Numbers:
    """A vector of float32 in LLVM, with Python's operators."""

    def __init__(self, emit: Emit, value: Any) -> None:
        self.emit, self.value = emit, value

    def of(self, number: Any) -> _Numbers:
        """The number in every lane, if it is one."""
        if isinstance(number, _Numbers):
            return number
        kind: Any = self.value.type
        numbers: Any = [float(number)] * kind.count
        return _Numbers(self.emit, ir.Constant(kind, numbers))

    def _apply(self, operation: str, a: Any, b: Any) -> _Numbers:
        return _Numbers(self.emit, getattr(self.emit.builder, operation)(self.of(a).value, self.of(b).value))

    def __add__(self, other: Any) -> _Numbers:
        return self._apply("fadd", self, other)

    def __sub__(self, other: Any) -> _Numbers:
        return self._apply("fsub", self, other)

    def __rsub__(self, other: Any) -> _Numbers:
        return self._apply("fsub", other, self)

    def __mul__(self, other: Any) -> _Numbers:
        return self._apply("fmul", self, other)

    def __rtruediv__(self, other: Any) -> _Numbers:
        return self._apply("fdiv", other, self)

    def fma(self, factor: Any, term: Any) -> _Numbers:
        """``self * factor + term``."""
        operands = self.value, self.of(factor).value, self.of(term).value
        return _Numbers(self.emit, self.emit.fmuladd(*operands))

    def polynomial(self, coefficients: Sequence[float]) -> _Numbers:
        """Of this variable; the constant term comes first."""
        total = self.of(coefficients[-1])
        for each in coefficients[-2::-1]:
            total = total.fma(self, each)
        return total

    def where(self, comparison: str, bound: float, a: Any, b: Any) -> _Numbers:
        """a where the numbers compare with the bound, b elsewhere and where they are NaN."""
        builder = self.emit.builder
        holds = builder.fcmp_ordered(comparison, self.value, self.of(bound).value)
        return _Numbers(self.emit, builder.select(holds, self.of(a).value, self.of(b).value))

    def bits(self, change: Callable[[Any, Callable[[int], Any]], Any]) -> _Numbers:
        """The numbers of changed bits; `change` is given them, and what makes constants."""
        builder, count = self.emit.builder, self.value.type.count
        words = ir.VectorType(I32, count)
        changed = change(builder.bitcast(self.value, words), lambda bits: ir.Constant(words, [bits] * count))
        return _Numbers(self.emit, builder.bitcast(changed, self.value.type))

    def minus_magnitude(self) -> _Numbers:
        """``-|x|``."""
        return self.bits(lambda bits, constant: self.emit.builder.or_(bits, constant(-(1 << 31))))

    def exp(self) -> _Numbers:
        """The exponential function of numbers that are not positive."""
        builder = self.emit.builder
        shifted = self.fma(_LOG2_E, _ROUNDER)
        power = shifted - _ROUNDER
        rest = power.fma(-_LN2_LOW, power.fma(-_LN2_HIGH, self))
        scale = shifted.bits(
            lambda bits, constant: builder.add(builder.shl(bits, constant(23)), constant(127 << 23))
        )
        return self.where("<", _LOWEST, 0.0, rest.polynomial(_EXP) * scale)

    def sigmoid(self) -> tuple[_Numbers, _Numbers]:
        """``1 / (1 + exp(-x))``, and 1 less that, neither of them a difference."""
        small = self.minus_magnitude().exp()
        upper = 1.0 / (small + 1.0)
        lower = small * upper
        return self.where("<", 0.0, lower, upper), self.where("<", 0.0, upper, lower)


def _relu(x: _Numbers, grad: _Numbers) -> tuple[_Numbers, _Numbers]:
    return x.where("<", 0.0, 0.0, x), x.where("<=", 0.0, 0.0, grad)


def _gelu(x: _Numbers, grad: _Numbers) -> tuple[_Numbers, _Numbers]:
    bell = (x * x * -0.5).exp()
    t = 1.0 / x.minus_magnitude().fma(-_TAIL_STEP, 1.0)
    tail = t.polynomial(_TAIL) * t * bell
    below = x.where("<", 0.0, tail, 1.0 - tail)
    return x * below, grad * (x * 0.3989422804014327).fma(bell, below)


def _gelu_tanh(x: _Numbers, grad: _Numbers) -> tuple[_Numbers, _Numbers]:
    twice = 2 * 0.7978845608028654
    square = x * x
    gate, rest = (x * square.fma(0.044715 * twice, twice)).sigmoid()
    slope = x * square.fma(3 * 0.044715 * twice, twice)
    return x * gate, grad * (slope * gate).fma(rest, gate)


def _silu(x: _Numbers, grad: _Numbers) -> tuple[_Numbers, _Numbers]:
    gate, rest = x.sigmoid()
    return x * gate, grad * gate * x.fma(rest, 1.0)


_FUNCTIONS = {"relu": _relu, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "silu": _silu}


def _results(emit: Emit, kind: Any, x: Any, grad: Any, wanted: tuple[int, ...]) -> list[Any]:
    """What the function of that number returns, of both results those that are wanted."""
    builder = emit.builder
    before = builder.block
    after = builder.append_basic_block("activated")
    found: list[tuple[Any, list[Any]]] = []
    blocks = []
    for name in ACTIVATIONS:
        block = builder.append_basic_block(name)
        blocks.append(block)
        builder.position_at_end(block)
        both = _FUNCTIONS[name](_Numbers(emit, x), _Numbers(emit, grad))
        found.append((builder.block, [both[k].value for k in wanted]))
        builder.branch(after)
    builder.position_at_end(before)
    switch = builder.switch(kind, blocks[0])
    for number, block in enumerate(blocks[1:], 1):
        switch.add_case(ir.Constant(kind.type, number), block)
    builder.position_at_end(after)
    results = []
    for k in range(len(wanted)):
        phi = builder.phi(x.type)
        for block, values in found:
            phi.add_incoming(values[k], block)
        results.append(phi)
    return results


def _is_vector(value: Any) -> bool:
    return isinstance(value, Vector) and value.dtype == types.float32


@intrinsic
def activation(_: Any, kind: Any, x: Any) -> Any:
    """The function of that number (see `ACTIVATIONS`) of every lane."""
    if not (kind == types.int64 and _is_vector(x)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        return _results(emit, args[0], args[1], args[1], (0,))[0]

    return x(kind, x), codegen


@intrinsic
def activation_and_gradient(_: Any, kind: Any, x: Any, grad: Any) -> Any:
    """The function of every lane, and its derivative times `grad`: a pair of vectors."""
    if not (kind == types.int64 and _is_vector(x) and x == grad):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, signature, args)
        return cgutils.pack_array(builder, _results(emit, args[0], args[1], args[2], (0, 1)))

    return types.UniTuple(x, 2)(kind, x, grad), codegen
