"""Memory of this process as the system sees it."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import psutil


def resident_bytes() -> int:
    """What this process has resident now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The most memory this process ever had resident.

    On Linux ``ru_maxrss`` starts from the parent's size at fork, so the kernel's mark of this process alone
    is read there.
    """
    status = Path("/proc/self/status")
    if status.exists():
        marks = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if marks:
            return int(marks[0].split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back_freed_memory(n_bytes: int = 1 << 20) -> bool:
    """Let blocks of so many bytes and more go back to the system as soon as they are freed; whether it can.

    On Linux the C library keeps blocks of up to 32 MiB for later. Activations that come and go between
    weights and plans, which stay, leave holes there: the resident set of a GPT with 9M live weights was up to
    twice as large.
    """
    if not sys.platform.startswith("linux"):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    m_mmap_threshold = -3
    return set_option is not None and set_option(m_mmap_threshold, n_bytes) == 1
