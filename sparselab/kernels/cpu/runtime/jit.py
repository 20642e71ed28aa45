"""How kernels are compiled, cached and launched: the one place that knows about Numba's settings.

A kernel is a function that computes one share of the work. `launch` calls it, or has it run its shares on
threads (`_team.spread`), so that a process which must not start threads runs the same machine code, and the
result never depends on which of the two it was.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.core import caching, config

from sparselab.kernels.cpu.runtime import target as _target
from sparselab.kernels.cpu.runtime.team import team

#: Reassociation and contraction, but neither nnan nor ninf: a NaN that goes in must come out.
FASTMATH = frozenset({"reassoc", "contract", "arcp", "nsz"})

CACHE_LINE = 64
_SMALLEST_MAPPING = 1 << 16


def _sources_digest() -> str:
    """Digest of every kernel source and of the target choice.

    Numba's cache notices an edit of the file a function is defined in, not of the files it calls into, so
    an edited intrinsic would keep running its old machine code. A directory per digest cannot go stale.
    """
    digest = hashlib.sha256()
    root = Path(__file__).parents[2]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    digest.update(f"{numba.__version__} {_target.VECTOR_BYTES} {_target.TILE_BYTES}".encode())
    return digest.hexdigest()[:16]


def cache_directory() -> Path:
    """Directory of the compiled kernels.

    ``$SPARSELAB_CACHE_DIR``, else ``$NUMBA_CACHE_DIR``, else the user's cache directory; below it one
    directory per version of the kernel sources.
    """
    if root := os.environ.get("SPARSELAB_CACHE_DIR") or os.environ.get("NUMBA_CACHE_DIR"):
        base = Path(root)
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or "~") / "sparselab"
    elif sys.platform == "darwin":
        base = Path("~/Library/Caches/sparselab")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sparselab"
    with contextlib.suppress(RuntimeError):
        base = base.expanduser()
    return base / f"kernels-{_sources_digest()}"


_CACHE_DIRECTORY = cache_directory()


class _InCacheDirectory(caching.CompileResultCacheImpl):
    # Numba's other places (beside the source, the user's cache) are not named by the digest.
    # The class lost its underscore in numba 0.67.
    _locator_classes = (
        getattr(caching, "UserProvidedCacheLocator", None) or caching._UserProvidedCacheLocator,
    )


class _KernelCache(caching.FunctionCache):
    """Numba's disk cache, except that an unreadable or unwritable one costs time and never raises."""

    _impl_class = _InCacheDirectory

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # a truncated pickle can raise nearly anything
            with contextlib.suppress(Exception):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(Exception):
            super().save_overload(sig, data)


@contextlib.contextmanager
def _numba_cache_directory(path: Path) -> Iterator[None]:
    previous = config.CACHE_DIR
    config.CACHE_DIR = str(path)
    try:
        yield
    finally:
        config.CACHE_DIR = previous


def jit(function: Callable[..., Any]) -> Any:
    """Compile a kernel, or a part of one."""
    dispatcher = numba.njit(nogil=True, no_cfunc_wrapper=True, fastmath=set(FASTMATH))(function)
    # RuntimeError: no writable place; the kernel then compiles anew in each process.
    with _numba_cache_directory(_CACHE_DIRECTORY), contextlib.suppress(RuntimeError, OSError):
        dispatcher._cache = _KernelCache(function)
    return dispatcher


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)

_launch_lock = threading.Lock()


#: Multiply-adds, and items moved, that are worth a thread of their own: 20 us. Starting one takes 3 us, but
#: milliseconds where other processes leave it no core.
_MIN_WORK = 1 << 20


def worker_count(work: int | None = None) -> int:
    """Threads that a kernel launched now would use, for so many multiply-adds if that is known."""
    n_threads = allowed(int(numba.get_num_threads()))
    return n_threads if work is None else min(n_threads, 1 + work // _MIN_WORK)


def allowed(n_threads: int) -> int:
    """As many threads as a process may use that may be a child of `os.fork`."""
    return 1 if _forked else n_threads


@functools.cache
def _is_workqueue() -> bool:
    """Whether that is the threading layer, which stays the same from the first launch on."""
    return bool(numba.threading_layer() == "workqueue")


def launch(kernel: Any, n_shares: int, *args: Any) -> None:
    """Run ``kernel(share, n_shares, *args)`` for every share, on threads where that is safe.

    There are at most `worker_count` shares. Two situations forbid a plain parallel call. A child of `os.fork`
    is killed by the OpenMP runtime when it starts threads, so there is one share. Numba's *workqueue* layer
    aborts the process when two Python threads launch at once, so under it launches take turns.
    """
    if n_shares == 1:
        kernel(0, 1, *args)
        return
    everyone = team()
    if _is_workqueue():
        with _launch_lock:
            kernel(everyone, n_shares, *args)
    else:
        kernel(everyone, n_shares, *args)


def no_turns() -> np.ndarray[Any, Any]:
    """What the workers of one launch count their turns in."""
    return np.zeros(1, np.int64)


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffer = np.empty(0, np.uint8)


_scratch = _Scratch()


def scratch(n_rows: int, row_items: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Uninitialised work memory, ``(n_rows, row_items)``, every row on a cache line.

    The memory belongs to the calling thread and is handed out again by the next call, so it must not
    outlive the kernel it was taken for. Rows start on cache lines because vector loads that straddle two
    lines run at half speed, and NumPy aligns to 16 bytes only.
    """
    stride = -(-row_items * dtype.itemsize // CACHE_LINE) * CACHE_LINE
    needed = n_rows * stride + CACHE_LINE
    if _scratch.buffer.nbytes < needed:
        _scratch.buffer = mapped_empty(needed, np.dtype(np.uint8))
    start = -_address(_scratch.buffer) % CACHE_LINE
    block = _scratch.buffer[start : start + n_rows * stride]
    return block.view(dtype).reshape(n_rows, stride // dtype.itemsize)


def _address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])  # ndarray.ctypes.data takes 6 us


def mapped_empty(n_items: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Uninitialised 1-D array in memory pages of its own, for arrays that live long.

    Plans and scratch are made in the middle of a training step. On the C heap they would come to lie between
    activations and keep the heap from shrinking when those go: the resident set of a small GPT grew by a
    fifth. Pages of their own go back to the system with the array.
    """
    n_bytes = n_items * dtype.itemsize
    if n_bytes < _SMALLEST_MAPPING:
        return np.empty(n_items, dtype)
    return np.frombuffer(mmap.mmap(-1, n_bytes), dtype, n_items)


def aligned_empty(n_items: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Uninitialised 1-D array that starts on a cache line."""
    raw = np.empty(n_items * dtype.itemsize + CACHE_LINE, np.uint8)
    start = -_address(raw) % CACHE_LINE
    return raw[start : start + n_items * dtype.itemsize].view(dtype)
