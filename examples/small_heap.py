"""Imported before torch: blocks of 1 MiB and more go back to the system as soon as they are freed.

The C library of Linux keeps blocks of up to 32 MiB for later. Activations that come and go between weights
and plans, which stay, leave holes there: a GPT with 9M live weights had 1.1 GiB resident where 0.7 do. What
goes back is paid for when it comes again, a page of 4 KiB at a time; so torch is told to ask for pages of
2 MiB, which it gets where ``/sys/kernel/mm/transparent_hugepage/enabled`` is ``madvise`` or ``always``.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_MMAP_THRESHOLD = -3

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if sys.platform.startswith("linux"):
    _set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if _set_option is not None:
        _set_option(_M_MMAP_THRESHOLD, 1 << 20)
