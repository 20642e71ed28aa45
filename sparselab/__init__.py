"""Truly sparse neural network training in PyTorch, on any CPU.

The names below load what they need when they are first used, so that ``import sparselab`` and
``import sparselab.kernels`` cost neither torch nor Numba more than asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparselab import dst, kernels, nn
    from sparselab._warmup import warmup
    from sparselab.dst import (
        DSR,
        GMP,
        GSE,
        MEST,
        SET,
        SNFS,
        CHTs,
        CHTss,
        Constant,
        Cosine,
        DeepR,
        GraNet,
        Group,
        Monitor,
        RigL,
        SRigL,
        Static,
        TopKAST,
    )
    from sparselab.kernels import PaddedCSR
    from sparselab.nn import (
        BlockSparseLinear,
        MaskedLinear,
        SparseLinear,
        SparseMultiheadAttention,
        densify,
        load_model,
        materialize,
        measure_sparsity,
        memory_report,
        plan_sparsify,
        save_model,
        sparsify,
    )

__version__ = "0.1.0"

__all__ = [
    "DSR",
    "GMP",
    "GSE",
    "MEST",
    "SET",
    "SNFS",
    "BlockSparseLinear",
    "CHTs",
    "CHTss",
    "Constant",
    "Cosine",
    "DeepR",
    "GraNet",
    "Group",
    "MaskedLinear",
    "Monitor",
    "PaddedCSR",
    "RigL",
    "SRigL",
    "SparseLinear",
    "SparseMultiheadAttention",
    "Static",
    "TopKAST",
    "densify",
    "dst",
    "kernels",
    "load_model",
    "materialize",
    "measure_sparsity",
    "memory_report",
    "nn",
    "plan_sparsify",
    "save_model",
    "sparsify",
    "warmup",
]

_HOMES = {
    "BlockSparseLinear": "nn",
    "CHTs": "dst",
    "CHTss": "dst",
    "Constant": "dst",
    "Cosine": "dst",
    "DSR": "dst",
    "DeepR": "dst",
    "GMP": "dst",
    "GSE": "dst",
    "GraNet": "dst",
    "Group": "dst",
    "MEST": "dst",
    "MaskedLinear": "nn",
    "Monitor": "dst",
    "PaddedCSR": "kernels",
    "RigL": "dst",
    "SET": "dst",
    "SNFS": "dst",
    "SRigL": "dst",
    "SparseLinear": "nn",
    "SparseMultiheadAttention": "nn",
    "Static": "dst",
    "TopKAST": "dst",
    "densify": "nn",
    "load_model": "nn",
    "materialize": "nn",
    "measure_sparsity": "nn",
    "memory_report": "nn",
    "plan_sparsify": "nn",
    "save_model": "nn",
    "sparsify": "nn",
    "warmup": "_warmup",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"sparselab.{_HOMES[name]}"), name)
    if name in ("dst", "kernels", "nn"):
        return import_module(f"sparselab.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
