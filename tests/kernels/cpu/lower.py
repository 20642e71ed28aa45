"""Writes the kernels' assembly for CPUs that need not be the host.

``python -m tests.kernels.cpu.lower record FILE`` notes the types that the kernels are launched with here.
``python -m tests.kernels.cpu.lower compile FILE DIRECTORY TRIPLE:CPU DTYPE KERNEL ...`` compiles them for
a CPU and writes one listing each, at the vector width of ``SPARSELAB_VECTOR_BYTES``. That needs a process
of its own: from the first optimisation on, LLVM is told of that CPU and never of the host, and nothing runs.
"""

from __future__ import annotations

import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

#: Dtypes of weights that are narrower than the numbers they stand for.
NARROW = "uint16", "int8"

#: A kernel that runs on CPUs with a matrix unit only, on the bits of bfloat16.
UNIT_GRADIENT = "unit gradient"


def kernels() -> dict[str, Any]:
    """The compiled functions with the loops that matter, by name."""
    from sparselab.kernels.cpu.amx import sampled as _sampled
    from sparselab.kernels.cpu.bsr import direct as _direct
    from sparselab.kernels.cpu.bsr import direct_dw as _direct_gradient
    from sparselab.kernels.cpu.bsr import sddmm_dw as _block_gradient
    from sparselab.kernels.cpu.bsr import skinny as _block_skinny
    from sparselab.kernels.cpu.bsr import spmm as _block_spmm
    from sparselab.kernels.cpu.conv import shifted as _shifted
    from sparselab.kernels.cpu.csr import sddmm_dw as _sddmm_dw
    from sparselab.kernels.cpu.csr import skinny as _skinny
    from sparselab.kernels.cpu.csr import spmm as _spmm

    return {
        "spmm": _spmm._multiply_tiles,
        "sddmm_dw": _sddmm_dw._sample_rectangles,
        "multiply_shifted": _shifted._multiply_windows,
        "sample_shifted": _shifted._sample_windows,
        "skinny": _skinny._multiply_skinny,
        "block skinny": _block_skinny._multiply_skinny_blocks,
        "block gather": _block_spmm._gather_tiles,
        "block scatter": _block_spmm._scatter_tiles,
        "block gradient": _block_gradient._sample_blocks,
        "block direct": _direct._multiply,
        "block direct gradient": _direct_gradient._sample,
        UNIT_GRADIENT: _sampled._sample_parts,
    }


def run_kernels(dtype: str) -> None:
    """Call each of the `kernels`; those for few tokens alone if weights are narrow."""
    import numpy as np

    if dtype in NARROW:
        run_narrow(dtype)
        return

    from sparselab.kernels import BlockCSR, PaddedCSR, sddmm_dw, spmm, spmm_t
    from sparselab.kernels.cpu.bsr import direct as _direct
    from sparselab.kernels.cpu.bsr import direct_dw as _direct_gradient
    from sparselab.kernels.cpu.bsr.plan import block_plan
    from sparselab.kernels.cpu.conv import shifted as _shifted
    from sparselab.kernels.cpu.conv.planes import whole_tiles
    from sparselab.kernels.cpu.csr.plan import plan_shifted

    W = PaddedCSR.random((16, 300), 0.8, 0, dtype=dtype)
    X = np.ones((300, 70), dtype)
    sddmm_dw(W, spmm(W, X), X)
    begin, starts, bias = W.indptr[:-1], np.zeros(300, np.int64), np.zeros(16, dtype)
    n_tokens = whole_tiles(70, X.itemsize)
    planes, sums = np.ones((1, n_tokens), dtype), np.empty((16, n_tokens), dtype)
    plan = plan_shifted(begin, W.row_nnz, W.indices, W.shape, 9)
    _shifted.multiply_shifted(W.values, W.indices, plan, starts, planes, sums, n_tokens, bias)
    _shifted.sample_shifted(
        W.indices, begin, W.indptr[1:], starts, sums, planes, n_tokens, np.zeros(W.nnz, dtype)
    )
    spmm(W, X[:, :1])
    blocks = BlockCSR.random((16, 300), 0.5, (4, 1), 0, dtype=dtype)
    Y = spmm(blocks, X)
    spmm(blocks, X[:, :1])
    spmm_t(blocks, Y)
    sddmm_dw(blocks, Y, X)
    wide = BlockCSR.random((64, 64), 0.5, (64, 64), 0, dtype=dtype)
    values, batch = wide.values.reshape(-1), np.ones((70, 64), dtype).T
    plan = block_plan(wide.topology, False)
    _direct.multiply_direct(values, plan, batch, batch.copy("K"))
    _direct_gradient.sample_direct(plan, batch, batch, values.copy())


def run_narrow(dtype: str) -> None:
    """Call the kernels for few tokens with weights of few bits."""
    import numpy as np

    from sparselab.kernels import BlockCSR, PaddedCSR
    from sparselab.kernels.arrays import address
    from sparselab.kernels.cpu.amx.sampled import sample_connections
    from sparselab.kernels.cpu.bsr.skinny import multiply_skinny_blocks
    from sparselab.kernels.cpu.csr.skinny import matrix, multiply_skinny
    from sparselab.kernels.cpu.runtime.matrix_unit import has_matrix_unit
    from tests.kernels.narrow import FLOAT32, draw

    W, blocks = PaddedCSR.random((16, 300), 0.8, 0), BlockCSR.random((16, 300), 0.5, (4, 1), 0)
    X, Y, bias = np.ones((300, 3), np.float32), np.empty((16, 3), np.float32), np.zeros(16, np.float32)
    operands = address(bias), FLOAT32, matrix(X), matrix(Y), 1
    few, several = (draw(np.random.default_rng(0), dtype, each.values.size, 16) for each in (W, blocks))
    rows, grid = W.topology.rows, blocks.topology.blocks.rows
    multiply_skinny(few.weights, rows.indices, rows.indptr[:-1], rows.indptr[1:], *operands)
    multiply_skinny_blocks(several.weights, grid.indices, grid.indptr, blocks.block_shape, *operands)
    if dtype == "uint16" and has_matrix_unit():
        tokens = np.ones((40, 300), np.uint16)
        begin, end = rows.indptr[:-1], rows.indptr[1:]
        sample_connections(
            W.shape, (1, 1), rows.indices, begin, end, tokens[:, :16], tokens, np.zeros(W.nnz, np.float32)
        )


def record(file: str) -> None:
    """Write the types that each kernel is called with; none of them is compiled for that."""
    from sparselab.kernels.cpu.runtime.launch import launch

    names = {kernel: name for name, kernel in kernels().items()}
    found: dict[tuple[str, str], set[Any]] = {}

    def note(kernel: Any, n_workers: int, *arguments: Any) -> None:
        if name := names.get(kernel):
            types = tuple(map(kernel.typeof_pyval, (0, n_workers, *arguments)))
            found.setdefault((name, dtype), set()).add(types)
        else:  # of a plan
            launch(kernel, n_workers, *arguments)

    for module in [each for name, each in sys.modules.items() if name.startswith("sparselab.kernels.cpu.")]:
        if getattr(module, "launch", None) is launch:
            module.launch = note  # type: ignore[attr-defined]
    for dtype in ("float32", "float64", *NARROW):
        run_kernels(dtype)
    single = {}
    for key, types in found.items():
        (single[key],) = types
    Path(file).write_bytes(pickle.dumps(single))


def compile_only_for(triple: str, cpu: str) -> None:
    """Make Numba optimise for a CPU, and keep each library's optimised module in place of machine code."""
    from llvmlite import binding
    from numba.core import codegen
    from numba.core.cpu import CPUContext
    from numba.core.registry import cpu_target
    from numba.core.runtime import rtsys

    context = cpu_target.target_context
    rtsys.initialize(context)  # this part runs here
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    machine.set_asm_verbosity(True)
    generator = context.codegen()
    generator._tm, generator._data_layout = machine, str(machine.target_data)
    make_empty = generator._create_empty_module

    def make_module(name: str) -> Any:
        module = make_empty(name)
        module.triple = triple
        return module

    def finalize(library: Any) -> None:
        module = for_that_cpu(str(library._final_module))
        library.listing = lambda: str(machine.emit_assembly(binding.parse_assembly(module)))
        library._finalized = True

    generator._create_empty_module = make_module
    codegen.CPUCodeLibrary._finalize_final_module = finalize
    CPUContext.create_cpython_wrapper = lambda *_, **__: None  # Python calls none of them
    # The dispatcher wants a builtin function, and finds each function it compiled by that object.
    CPUContext.get_executable = lambda *_: [].append


def for_that_cpu(module: str) -> str:
    """The module without the bodies of Numba's reference counting, which are the host's inline assembly."""
    module = re.sub(r'target (triple|datalayout) = ".*"', "", module)
    return re.sub(r"(define [^\n]*@NRT_[^\n]*\{)\n.*?\n\}", r"\1\n  unreachable\n}", module, flags=re.DOTALL)


def compile_kernels(file: str, directory: str, target: str, dtype: str, *names: str) -> None:
    """Write the listings of some kernels."""
    from numba.core.compiler_lock import global_compiler_lock

    os.environ["SPARSELAB_CACHE_DIR"] = os.devnull  # what a cache holds was compiled before
    signatures = pickle.loads(Path(file).read_bytes())
    compile_only_for(*target.split(":"))
    for name in names:
        dispatcher = kernels()[name]
        dispatcher.compile(signatures[name, dtype])
        (compiled,) = dispatcher.overloads.values()
        with global_compiler_lock:
            compiled.library.finalize()
        (Path(directory) / f"{name}-{dtype}.s").write_text(compiled.library.listing())


if __name__ == "__main__":
    {"record": record, "compile": compile_kernels}[sys.argv[1]](*sys.argv[2:])
