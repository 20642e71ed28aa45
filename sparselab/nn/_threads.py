"""One thread count for torch and for the kernels."""

from __future__ import annotations

import threading

import numba
import torch


class _Count(threading.local):
    """What this Python thread asked Numba for last; 0 before its first time."""

    asked = 0


_count = _Count()


def use_torch_threads() -> None:
    """Let kernels launched by this Python thread use as many threads as torch does now.

    Called before every launch, because Numba keeps its count per Python thread. Numba's first use starts its
    thread pool, which overwrites torch's count (numba issue 9387); it is put back. A count that was set with
    `numba.set_num_threads` itself stays until torch's count changes, since Numba is not asked each time.
    """
    wanted = torch.get_num_threads()
    if wanted == _count.asked:
        return
    numba.get_num_threads()
    torch.set_num_threads(wanted)
    numba.set_num_threads(min(wanted, numba.config.NUMBA_NUM_THREADS))
    _count.asked = wanted
