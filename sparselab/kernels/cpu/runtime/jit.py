"""How kernels are compiled and where they are kept: the one place that knows about Numba's settings."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba.core import caching, compiler_lock, config

from sparselab.kernels.cpu.runtime.target import HAS_FAST_GATHERS, TILE_BYTES, VECTOR_BYTES

if config.DISABLE_JIT:
    raise ImportError(
        "sparselab's kernels exist only as compiled code: NUMBA_DISABLE_JIT must be unset or 0, got "
        f"{os.environ.get('NUMBA_DISABLE_JIT', config.DISABLE_JIT)}"
    )

#: Reassociation and contraction, but neither nnan nor ninf: a NaN that goes in must come out.
FASTMATH = frozenset({"reassoc", "contract", "arcp", "nsz"})

if hasattr(os, "register_at_fork"):
    # A child forked while another thread compiles would wait for that thread, which it does not have.
    _lock = compiler_lock.global_compiler_lock
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


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
    digest.update(f"{numba.__version__} {VECTOR_BYTES} {TILE_BYTES} {HAS_FAST_GATHERS}".encode())
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
    """Compile a kernel, or a part of one; it allocates nothing.

    Without Numba's runtime, which counts references to arrays by atomic operations wherever LLVM leaves a
    call a call: threads wait for each other there, for a tenth to a fifth of a product.
    """
    dispatcher = numba.njit(nogil=True, no_cfunc_wrapper=True, fastmath=set(FASTMATH), _nrt=False)(function)
    # RuntimeError: no writable place; the kernel then compiles anew in each process.
    with _numba_cache_directory(_CACHE_DIRECTORY), contextlib.suppress(RuntimeError, OSError):
        dispatcher._cache = _KernelCache(function)
    return dispatcher
