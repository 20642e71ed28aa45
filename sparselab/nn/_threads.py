"""One thread count for torch and for the kernels."""

from __future__ import annotations

import numba
import torch

_started = False


def use_torch_threads() -> None:
    """Let kernels launched by this Python thread use as many threads as torch does now.

    Called before every launch, because Numba keeps its count per Python thread. Numba's first use starts its
    thread pool, which overwrites torch's count (numba issue 9387); it is put back.
    """
    global _started
    wanted = torch.get_num_threads()
    if not _started:
        numba.get_num_threads()
        torch.set_num_threads(wanted)
        _started = True
    numba.set_num_threads(min(wanted, numba.config.NUMBA_NUM_THREADS))
