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
        ConstantSchedule,
        CosineSchedule,
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
        FanInLinear,
        MaskedConv2d,
        MaskedLinear,
        SparseConv2d,
        SparseLinear,
        SparseMultiheadAttention,
        condense,
        densify,
        load_model,
        materialize,
        measure_sparsity,
        memory_report,
        plan_sparsify,
        save_model,
        sparsify,
        tune,
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
    "ConstantSchedule",
    "CosineSchedule",
    "DeepR",
    "FanInLinear",
    "GraNet",
    "Group",
    "MaskedConv2d",
    "MaskedLinear",
    "Monitor",
    "PaddedCSR",
    "RigL",
    "SRigL",
    "SparseConv2d",
    "SparseLinear",
    "SparseMultiheadAttention",
    "Static",
    "TopKAST",
    "condense",
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
    "tune",
    "warmup",
]

_HOMES = {
    "BlockSparseLinear": "nn",
    "CHTs": "dst",
    "CHTss": "dst",
    "ConstantSchedule": "dst",
    "CosineSchedule": "dst",
    "DSR": "dst",
    "DeepR": "dst",
    "FanInLinear": "nn",
    "GMP": "dst",
    "GSE": "dst",
    "GraNet": "dst",
    "Group": "dst",
    "MEST": "dst",
    "MaskedConv2d": "nn",
    "MaskedLinear": "nn",
    "Monitor": "dst",
    "PaddedCSR": "kernels",
    "RigL": "dst",
    "SET": "dst",
    "SNFS": "dst",
    "SRigL": "dst",
    "SparseConv2d": "nn",
    "SparseLinear": "nn",
    "SparseMultiheadAttention": "nn",
    "Static": "dst",
    "TopKAST": "dst",
    "condense": "nn",
    "densify": "nn",
    "load_model": "nn",
    "materialize": "nn",
    "measure_sparsity": "nn",
    "memory_report": "nn",
    "plan_sparsify": "nn",
    "save_model": "nn",
    "sparsify": "nn",
    "tune": "nn",
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
