"""Running a kernel on threads, as many as its work is worth and the process may have.

A kernel is a function ``kernel(worker, n_workers, ...)`` that computes the part of one worker. Workers divide
the work in one of two ways. In a *static* schedule each has a contiguous part that follows from its number.
In a *dynamic* schedule the work is cut into more items than there are workers, and each takes the next one
from a common counter when it is done with the last (`new_counter`, `next_item`).
"""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

import numba
import numpy as np

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.runtime.team import team

#: Multiply-adds, and items moved, that are worth a thread of their own: 20 us. Starting one takes 3 us, but
#: milliseconds where other processes leave it no core.
_MIN_WORK = 1 << 20

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)

_launch_lock = threading.Lock()


def worker_count(work: int | None = None) -> int:
    """Workers that a kernel launched now should have, for so many multiply-adds if that is known."""
    n_threads = allowed(int(numba.get_num_threads()))
    return n_threads if work is None else min(n_threads, 1 + work // _MIN_WORK)


def allowed(n_threads: int) -> int:
    """As many threads as this process may use: one in a child of `os.fork`."""
    return 1 if _forked else n_threads


@functools.cache
def _is_workqueue() -> bool:
    """Whether that is the threading layer, which stays the same from the first launch on."""
    return bool(numba.threading_layer() == "workqueue")


def launch(kernel: Any, n_workers: int, *args: Any) -> None:
    """Run ``kernel(worker, n_workers, *args)`` for every worker, on threads where that is safe.

    It is not safe in a child of `os.fork`: the OpenMP runtime ends a child that starts threads, so workers
    follow each other there. Numba's *workqueue* layer ends a process in which two Python threads launch at
    once, so under it they wait for each other.
    """
    if n_workers == 1 or _forked:
        for worker in range(n_workers):
            kernel(worker, n_workers, *args)
        return
    everyone = team()
    if _is_workqueue():
        with _launch_lock:
            kernel(everyone, n_workers, *args)
    else:
        kernel(everyone, n_workers, *args)


def run_on_threads(run: Any, *args: int) -> None:
    """Call compiled code that starts threads by itself; a process that may not has none of that kind."""
    if _is_workqueue():
        with _launch_lock:
            run(*args)
    else:
        run(*args)


def new_counter() -> Array:
    """The counter of a dynamic schedule, at its first item."""
    return np.zeros(1, np.int64)
