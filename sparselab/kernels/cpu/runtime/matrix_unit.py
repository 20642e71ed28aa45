"""Whether this process may use the matrix unit of the CPU (Intel AMX, with products of bfloat16)."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys

from llvmlite import binding
from numba.core import config

from sparselab.kernels.cpu.runtime.target import VECTOR_BYTES

#: Linux: `arch_prctl`, its request for a state of the CPU, and the state of the tiles.
_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA = 158, 0x1023, 18


@functools.cache
def has_matrix_unit() -> bool:
    """Whether there is one, and the system lets this process have the memory of its tiles.

    Not asked of kernels that are compiled for another CPU or for narrower vectors than the host has.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64" or VECTOR_BYTES < 64:
        return False
    features = binding.get_host_cpu_features()
    if config.CPU_NAME or config.CPU_FEATURES or not (features.get("amx-tile") and features.get("amx-bf16")):
        return False
    system_call = ctypes.CDLL(None).syscall
    system_call.argtypes = ctypes.c_long, ctypes.c_ulong, ctypes.c_ulong
    return bool(system_call(_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA) == 0)


def require_matrix_unit() -> None:
    """Raise RuntimeError unless `has_matrix_unit`: the CPU would end the process."""
    if not has_matrix_unit():
        raise RuntimeError(
            "this needs a CPU with AMX for bfloat16, and a system that lets the process use it"
        )
