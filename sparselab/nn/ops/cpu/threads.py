"""One thread count for torch and for the kernels."""

from __future__ import annotations

import threading

import numba
import torch

from sparselab.kernels.cpu.runtime.launch import allowed


class _Count(threading.local):
    """What this Python thread asked Numba for last, and got; 0 before its first time."""

    asked = granted = 0


_count = _Count()


def use_torch_threads() -> int:
    """Let kernels launched by this Python thread use as many threads as torch does now; how many these are.

    Called before every launch, because Numba keeps its count per Python thread. Numba's first use starts its
    thread pool, which overwrites torch's count (numba issue 9387); it is put back. A count that was set with
    `numba.set_num_threads` itself stays until torch's count changes, since Numba is not asked each time.
    """
    wanted = torch.get_num_threads()
    if wanted == _count.asked:
        return allowed(_count.granted)
    numba.get_num_threads()
    torch.set_num_threads(wanted)
    granted = min(wanted, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(granted)
    _count.asked, _count.granted = wanted, granted
    return allowed(granted)
