"""Running every worker of a kernel on Numba's threads, from inside the kernel.

A function with a ``prange`` around the kernel would optimise the kernel's loops once more, and be compiled
even where threads are not worth it. Instead a kernel that is called with a *team* in place of a worker's
number gives itself to Numba's thread pool, which calls it back for each worker: the same machine code, on
threads or not.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numba
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.callconv import RETCODE_USEREXC
from numba.extending import intrinsic

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()
_WORDS = _I64.as_pointer()
#: What the pool calls: ``loop(args, counts, steps, data)``, as NumPy calls a generalised ufunc.
_LOOP = ir.FunctionType(ir.VoidType(), [_BYTES.as_pointer(), _WORDS, _WORDS, _BYTES])
#: The pool: ``parallel_for(loop, args, counts, steps, data, inner dimensions, arguments, threads)``.
_PARALLEL_FOR = ir.FunctionType(ir.VoidType(), [_BYTES] * 5 + [_I64, _I64, _I32])
_GET_NUM_THREADS = ir.FunctionType(_I32, [])
_RUN = ir.FunctionType(_I32, [_WORDS])

# Kernels read these addresses when they run. In their code they would keep kernels from being cached, and as
# symbols from being loaded by a process that must not start threads.
_SYMBOLS = "numba_parallel_for", "get_num_threads"
_addresses = (ctypes.c_int64 * 2)()


@functools.cache
def team() -> int:
    """What to call a kernel with in place of a worker's number, to run them all; starts the thread pool."""
    numba.get_num_threads()
    _addresses[:] = [binding.address_of_symbol(name) for name in _SYMBOLS]
    return -ctypes.addressof(_addresses)


@intrinsic
def spread(_: Any, worker: Any, n_workers: Any) -> Any:
    """Run all workers on threads if `worker` is a `team`; False, and nothing else, if it is a number.

    The first statement of a kernel, which is a function without a result whose first two parameters these
    are::

        if spread(worker, n_workers):
            return

    Threads are as many as `numba.get_num_threads` says. The error of a worker is raised when all are done.
    """
    if not (worker == types.int64 and n_workers == types.int64):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _by_words(builder.module, builder.function)
        asked = builder.icmp_signed("<", args[0], _I64(0))
        with builder.if_then(asked, likely=False):
            kernel = builder.function
            job = _store_job(builder, kernel)
            n_threads, parallel_for = _pool(builder, args[0])
            threads = builder.sext(n_threads, _I64)
            # An index for each thread or worker, for one of the pools gives its last thread what it cannot
            # divide. The pool adds it to the address of the one argument, 0, and so hands over the worker.
            most = builder.select(builder.icmp_signed("<", threads, args[1]), args[1], threads)
            first, count, step = (
                cgutils.alloca_once_value(builder, value)
                for value in (ir.Constant(_BYTES, None), most, _I64(1))
            )
            pointers = _loop(builder.module, kernel, job.type), first, count, step, job
            operands = [builder.bitcast(pointer, _BYTES) for pointer in pointers]
            builder.call(parallel_for, [*operands, _I64(0), _I64(1), n_threads])
            error = builder.load(cgutils.gep_inbounds(builder, job, 0, 0))
            with builder.if_then(cgutils.is_not_null(builder, error), likely=False):
                builder.store(error, kernel.args[1])
                builder.ret(RETCODE_USEREXC)
        return asked

    return types.boolean(worker, n_workers), codegen


def _store_job(builder: Any, kernel: Any) -> Any:
    """Pointer to what the kernel's calls share: where an error goes, and the arguments after the workers."""
    _, error_place, _, *arguments = kernel.args
    values = [ir.Constant(error_place.type.pointee, None), *arguments]
    job = cgutils.alloca_once(builder, ir.LiteralStructType([value.type for value in values]))
    for k, value in enumerate(values):
        builder.store(value, cgutils.gep_inbounds(builder, job, 0, k))
    return job


def _pool(builder: Any, team: Any) -> tuple[Any, Any]:
    """How many threads to use, and the function that uses them."""
    addresses = builder.inttoptr(builder.neg(team), _WORDS)
    parallel_for, get_num_threads = (
        builder.inttoptr(builder.load(cgutils.gep_inbounds(builder, addresses, k)), function.as_pointer())
        for k, function in enumerate((_PARALLEL_FOR, _GET_NUM_THREADS))
    )
    return builder.call(get_num_threads, []), parallel_for


def _loop(module: Any, kernel: Any, job_type: Any) -> Any:
    """The function that a thread runs: `kernel` for each of its workers."""
    loop = ir.Function(module, _LOOP, f"{kernel.name}.loop")
    loop.linkage = "internal"
    builder = ir.IRBuilder(loop.append_basic_block())
    job = builder.bitcast(loop.args[3], job_type)
    _, n_workers, *arguments = (
        builder.load(cgutils.gep_inbounds(builder, job, 0, k)) for k in range(len(job_type.pointee.elements))
    )
    result, error = (cgutils.alloca_once(builder, place.type.pointee) for place in kernel.args[:2])
    first = builder.ptrtoint(builder.load(loop.args[0]), _I64)
    with cgutils.for_range(builder, builder.load(loop.args[1])) as index:
        worker = builder.add(first, index.index)
        with builder.if_then(builder.icmp_signed("<", worker, n_workers)):
            code = builder.call(kernel, [result, error, worker, n_workers, *arguments])
            with builder.if_then(builder.icmp_signed(">=", code, RETCODE_USEREXC), likely=False):
                builder.store(builder.load(error), cgutils.gep_inbounds(builder, job, 0, 0))
    builder.ret_void()
    return loop


def run_name(kernel: str) -> str:
    """Symbol of the function that calls a kernel of that name with arguments from memory."""
    return f"{kernel}.by_words"


def _by_words(module: Any, kernel: Any) -> None:
    """Add the function ``run(words)``, which calls `kernel` with arguments in memory and returns its status.

    Each argument is a word of 64 bits: an integer, or a pointer. Kernels that take others have none.
    """
    if not all(each.type.is_pointer or isinstance(each.type, ir.IntType) for each in kernel.args):
        return
    run = ir.Function(module, _RUN, run_name(kernel.name))
    builder = ir.IRBuilder(run.append_basic_block())
    places = [
        cgutils.alloca_once_value(builder, ir.Constant(each.type.pointee, None)) for each in kernel.args[:2]
    ]
    arguments = []
    for k, argument in enumerate(kernel.args[2:]):
        word, kind = builder.load(builder.gep(run.args[0], [_I64(k)])), argument.type
        if kind.is_pointer:
            word = builder.inttoptr(word, kind)
        elif kind != _I64:
            word = builder.trunc(word, kind)
        arguments.append(word)
    builder.ret(builder.call(kernel, [*places, *arguments]))


@intrinsic
def run_words(_: Any, run: Any, words: Any) -> Any:
    """Call what `run_name` names, by its address, with the words at another; 0 unless it failed."""
    if not (run == words == types.int64):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = builder.inttoptr(args[0], _RUN.as_pointer())
        code = builder.call(function, [builder.inttoptr(args[1], _WORDS)])
        return builder.sext(code, _I64)

    return types.int64(run, words), codegen
