"""Memory of this process as the system sees it."""

from __future__ import annotations

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
