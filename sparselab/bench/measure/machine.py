"""What a result was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import llvmlite
import numba
import numpy as np
import torch

import sparselab
from sparselab.kernels.cpu.runtime import target as _target


def cpu_name() -> str:
    """The CPU's own name for itself, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe() -> dict[str, str | int | float]:
    """Machine, versions and thread count, for the head of a table."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "vector_bytes": _target.VECTOR_BYTES,
        "tile_bytes": _target.TILE_BYTES,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else "unknown",
        "bfloat16_instructions": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "bfloat16_matrix_units": bool(torch.cpu._is_amx_tile_supported()),
        **versions(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of what the package runs on."""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "torch": torch.__version__,
        "sparselab": sparselab.__version__,
    }
