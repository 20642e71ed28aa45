"""Kernels that are called again and again with all of their arguments but a few addresses.

A small layer's kernels run for some microseconds. What Python does around a launch (looking up a plan,
cutting work, making arrays of work memory, handing twenty arguments over) takes longer. A *program* does that
once: it holds the arguments of some kernels, which follow each other, as words of memory, and is run by a
single call that brings addresses only. A run copies the words into the work memory of its thread before it
puts the addresses in, so any number of threads may run one program at a time.
"""

from __future__ import annotations

import abc
import functools
import math
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.types import BaseTuple

from sparselab.kernels.arrays import address
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import run_on_threads
from sparselab.kernels.cpu.runtime.memory import lend
from sparselab.kernels.cpu.runtime.target import CACHE_LINE
from sparselab.kernels.cpu.runtime.team import run_name, run_words, team
from sparselab.kernels.cpu.runtime.words import clear, copy, peek, poke

_WORD = 8

#: What is lent, until it is known where it begins in the work memory: for a whole run, or for one kernel.
_KEPT, _PASSING = 0, -1

#: Of the counter of a dynamic schedule, which is one word of zeros.
COUNT = np.dtype(np.int64)

_PLAIN = {int: types.int64, bool: types.boolean, type(None): numba.typeof(None)}  # type: ignore[attr-defined]

#: Addresses that a run is given, beside that of its work memory, which is number 0.
MOST_OPERANDS = 8


class StandIn(abc.ABC):
    """What stands in a program's arguments for something that each run brings."""

    @property
    @abc.abstractmethod
    def kind(self) -> Any:
        """The Numba type of what it stands for."""

    @abc.abstractmethod
    def note(self, program: Program) -> None:
        """Add the words that compiled code takes it as."""


@dataclass(frozen=True)
class Given(StandIn):
    """The address of an operand of a run, by its number from 1 on, and so many bytes more."""

    operand: int
    offset: int = 0

    @property
    def kind(self) -> Any:
        """The Numba type of an address."""
        return types.int64

    def note(self, program: Program) -> None:
        """Add the address."""
        program.note_given(self.operand, self.offset)


@dataclass(frozen=True)
class Lent(StandIn):
    """An array in memory that a run is given, or lent: where it is, its shape and dtype."""

    at: Given
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def kind(self) -> Any:
        """The Numba type of the array."""
        return _array_kind(self.dtype, len(self.shape))

    def note(self, program: Program) -> None:
        """Add the array."""
        program.note_array(self.at, self.shape, self.dtype)


#: Where a kernel finds something.
Place = int | Given


class Program:
    """Kernels that run one after the other, each with the workers and the arguments it was added with.

    In place of an address or an array of work memory an argument may be what `Given` and `lend` stand for.
    All arrays are held, so their addresses stay true. A program belongs to the thread count it was made for.
    """

    def __init__(self) -> None:
        self._held: list[Any] = []
        self._words: list[int] = []
        self._patches: list[tuple[int, int]] = []
        self._zeros: list[tuple[int, int]] = []
        self._copies: list[tuple[int, int]] = []
        self._steps: list[tuple[int, int]] = []
        self._kept = self._passing = self._most_passing = 0
        self._on_threads = False
        self._at = 0
        #: Bytes of work memory.
        self.n_bytes = 0

    def lend(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Lent:
        """Uninitialised work memory that the kernels of a run share; the last dimension may get longer."""
        place, n_bytes = _cut(shape, dtype, Given(_KEPT, self._kept))
        self._kept += n_bytes
        return place

    def zeros(self, n_items: int, dtype: np.dtype[Any]) -> Lent:
        """As `lend`, of one dimension, which is 0 before the kernels run."""
        place = self.lend((n_items,), dtype)
        self.clear(place.at, n_items * dtype.itemsize)
        return place

    def work(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Lent:
        """As `lend`, for the next kernel alone: the one after it may get the same memory."""
        place, n_bytes = _cut(shape, dtype, Given(_PASSING, self._passing))
        self._passing += n_bytes
        self._most_passing = max(self._most_passing, self._passing)
        return place

    def clear(self, place: Given, n_bytes: int) -> None:
        """Set so many bytes to 0 before the kernels run."""
        self._zeros.append((len(self._words), n_bytes))
        self._note(place)

    def copy(self, source: Given, target: Given, n_bytes: int) -> None:
        """Copy so many bytes before the kernels run, after memory was set to 0."""
        self._copies.append((len(self._words), n_bytes))
        self._note(source)
        self._note(target)

    def add(self, kernel: Any, n_workers: int, *args: Any) -> None:
        """Let a kernel follow, compiled for these arguments if it is not yet."""
        run, n_words = _entry(kernel, (types.int64, types.int64, *map(_kind, args)))
        start = len(self._words)
        self._on_threads |= n_workers > 1
        for each in (team() if n_workers > 1 else 0, n_workers, *args):
            self._note(each)
        assert len(self._words) - start == n_words, kernel
        self._steps.append((run, start))
        self._passing = 0

    def ready(self) -> Program:
        """The program itself, which gets no more kernels."""
        # The words are copied into the work memory, behind the operands and in front of what is lent.
        n_words = 1 + MOST_OPERANDS + len(self._words)
        start = {_KEPT: _lines(n_words * _WORD)}
        start[_PASSING] = start[_KEPT] + self._kept
        for place, operand in self._patches:
            self._words[place] += start.get(operand, 0)
        patches = [(place, max(operand, 0)) for place, operand in self._patches]
        tables = patches, self._zeros, self._copies, self._steps
        head = [len(self._words), *map(len, tables)]
        pairs = [word for table in tables for pair in table for word in pair]
        whole = np.array([*head, *pairs, *self._words], np.int64)
        self._held.append(whole)
        self._at = address(whole)
        self.n_bytes = start[_PASSING] + self._most_passing
        return self

    def run(self, *operands: int) -> None:
        """Run the kernels with operands at these `MOST_OPERANDS` addresses, 0 for those not needed."""
        if self._on_threads:
            run_on_threads(_run, self._at, lend(self.n_bytes), *operands)
        else:
            _run(self._at, lend(self.n_bytes), *operands)

    def _note(self, value: Any) -> None:
        """Keep an argument as the words that compiled code takes it as."""
        if type(value) is int:  # most of them
            self._words.append(value)
        elif isinstance(value, np.ndarray):
            self._held.append(value)
            self.note_array(address(value), value.shape, value.dtype)
        elif isinstance(value, tuple):
            for each in value:
                self._note(each)
        elif isinstance(value, StandIn):
            value.note(self)
        else:
            self._words.append(0 if value is None else int(value))

    def note_given(self, operand: int, offset: int) -> None:
        """Add a word: where an operand is, and so many bytes more."""
        self._patches.append((len(self._words), operand))
        self._words.append(offset)

    def note_array(self, at: Place, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Add the words of a contiguous array, as Numba lays one out."""
        steps, step = [], dtype.itemsize
        for n in reversed(shape):
            steps.append(step)
            step *= n
        n_items = step // dtype.itemsize
        self._words += (0, 0, n_items, dtype.itemsize)
        self._note(at)
        self._words += (*shape, *reversed(steps))


def _lines(n_bytes: int) -> int:
    """Bytes of whole cache lines."""
    return -(-n_bytes // CACHE_LINE) * CACHE_LINE


def _cut(shape: tuple[int, ...], dtype: np.dtype[Any], at: Given) -> tuple[Lent, int]:
    """Memory of that shape whose rows begin on cache lines, and its bytes."""
    row = _lines(shape[-1] * dtype.itemsize)
    return Lent(at, (*shape[:-1], row // dtype.itemsize), dtype), math.prod(shape[:-1]) * row


@functools.cache
def _entry(kernel: Any, signature: tuple[Any, ...]) -> tuple[int, int]:
    """Where the function is that calls a kernel with words from memory, and how many these are."""
    kernel.compile(signature)
    compiled = kernel.overloads[signature]
    descriptor, convention = compiled.fndesc, compiled.target_context.call_conv
    found = compiled.library.get_pointer_to_function(run_name(descriptor.llvm_func_name))
    if not found:
        raise TypeError(f"arguments must be integers and arrays, or tuples of them, got {signature}")
    return found, len(convention.get_function_type(descriptor.restype, descriptor.argtypes).args) - 2


def _kind(value: Any) -> Any:
    """The Numba type of an argument, as `numba.typeof` finds it in ten times the time."""
    found = _PLAIN.get(type(value))
    if found is not None:
        return found
    if isinstance(value, tuple):
        return BaseTuple.from_types([_kind(each) for each in value], type(value))  # type: ignore[no-untyped-call]
    if isinstance(value, np.ndarray):
        if not (value.flags.c_contiguous and value.flags.writeable):
            raise ValueError("arrays of a program must be contiguous, and not marked as read-only")
        return _array_kind(value.dtype, value.ndim)
    return value.kind if isinstance(value, StandIn) else numba.typeof(value)  # type: ignore[attr-defined]


@functools.cache
def _array_kind(dtype: np.dtype[Any], ndim: int) -> Any:
    return numba.typeof(np.empty((0,) * ndim, dtype))  # type: ignore[attr-defined]


@jit
def _run(program, memory, a, b, c, d, e, f, g, h):  # type: ignore[no-untyped-def]
    """Copy a program's words into work memory, put addresses and zeros where they belong, run its kernels."""
    n_words, n_patches, n_zeros = peek(program), peek(program + 8), peek(program + 16)
    n_copies, n_steps = peek(program + 24), peek(program + 32)
    patches = program + 40
    zeros = patches + n_patches * 16
    copies = zeros + n_zeros * 16
    steps = copies + n_copies * 16
    words = steps + n_steps * 16
    poke(memory, memory)
    poke(memory + 8, a)
    poke(memory + 16, b)
    poke(memory + 24, c)
    poke(memory + 32, d)
    poke(memory + 40, e)
    poke(memory + 48, f)
    poke(memory + 56, g)
    poke(memory + 64, h)
    block = memory + 72
    for k in range(n_words):
        poke(block + k * 8, peek(words + k * 8))
    for k in range(n_patches):
        place = block + peek(patches + k * 16) * 8
        poke(place, peek(place) + peek(memory + peek(patches + k * 16 + 8) * 8))
    for k in range(n_zeros):
        clear(peek(block + peek(zeros + k * 16) * 8), peek(zeros + k * 16 + 8))
    for k in range(n_copies):
        pair = block + peek(copies + k * 16) * 8
        copy(peek(pair + 8), peek(pair), peek(copies + k * 16 + 8))
    for k in range(n_steps):
        if run_words(peek(steps + k * 16), block + peek(steps + k * 16 + 8) * 8) != 0:
            raise RuntimeError("a kernel of a program failed")
