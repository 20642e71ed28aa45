"""Writes the kernels' assembly for other CPUs: ``python -m tests.kernels.lower DIRECTORY TRIPLE:CPU ...``.

Run in a process of its own, with its own cache directory: what a cache holds was compiled before, and its
intermediate code is not kept.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import binding
from numba.core import codegen


def keep_optimized_code() -> None:
    """Make every compiled library keep its optimised LLVM module, just before it becomes machine code."""
    finalize = codegen.CPUCodeLibrary._finalize_final_module

    def keep(library: Any) -> None:
        library.optimized = str(library._final_module)
        finalize(library)

    codegen.CPUCodeLibrary._finalize_final_module = keep


def for_any_cpu(module: str) -> str:
    """The module without its target, and without the bodies of Numba's reference counting (inline x86)."""
    module = re.sub(r'target (triple|datalayout) = ".*"', "", module)
    module = re.sub(r'"(target-cpu|target-features|prefer-vector-width)"="[^"]*"', "", module)
    return re.sub(r"(define [^\n]*@NRT_[^\n]*\{)\n.*?\n\}", r"\1\n  unreachable\n}", module, flags=re.DOTALL)


def lower(module: str, triple: str, cpu: str) -> str:
    """Assembly of an optimised module, with comments."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    machine.set_asm_verbosity(True)
    return str(machine.emit_assembly(binding.parse_assembly(for_any_cpu(module))))


def main(directory: str, *targets: str) -> None:
    keep_optimized_code()
    import numba

    from sparselab.kernels import BlockCSR, PaddedCSR, sddmm_dw, spmm, spmm_t
    from sparselab.kernels.cpu.bsr import products as _block_products
    from sparselab.kernels.cpu.bsr import sddmm_dw as _block_gradient
    from sparselab.kernels.cpu.bsr import skinny as _block_few_tokens
    from sparselab.kernels.cpu.conv import shifted as _shifted
    from sparselab.kernels.cpu.conv.planes import whole_tiles
    from sparselab.kernels.cpu.csr import sddmm_dw as _sddmm_dw
    from sparselab.kernels.cpu.csr import spmm as _spmm
    from sparselab.kernels.cpu.csr.plan import plan_shifted

    numba.set_num_threads(1)
    for dtype in ("float32", "float64"):
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
        blocks = BlockCSR.random((16, 300), 0.5, (4, 1), 0, dtype=dtype)
        Y = spmm(blocks, X)
        spmm(blocks, X[:, :1])
        spmm_t(blocks, Y)
        sddmm_dw(blocks, Y, X)
    kernels = {
        "spmm": _spmm._multiply_share,
        "sddmm_dw": _sddmm_dw._sample_share,
        "multiply_shifted": _shifted._multiply_share,
        "sample_shifted": _shifted._sample_share,
        "block few tokens": _block_few_tokens._multiply_share,
        "block gather": _block_products._gather_share,
        "block scatter": _block_products._scatter_share,
        "block gradient": _block_gradient._sample_share,
    }
    for name, dispatcher in kernels.items():
        for signature, compiled in dispatcher.overloads.items():
            dtype = "float64" if "float64" in str(signature) else "float32"
            for target in targets:
                triple, cpu = target.split(":")
                listing = lower(compiled.library.optimized, triple, cpu)
                (Path(directory) / f"{name}-{dtype}-{cpu}.s").write_text(listing)


if __name__ == "__main__":
    main(*sys.argv[1:])
