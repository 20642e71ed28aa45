"""How kernels are compiled and where they are kept: the one place that knows about Numba's settings."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable
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


_ROOT = Path(__file__).resolve().parents[2]

#: The class lost its underscore in numba 0.67.
_NumbaLocator: Any = getattr(caching, "UserProvidedCacheLocator", None) or caching._UserProvidedCacheLocator


def _sources_digest() -> str:
    """Digest of every kernel source and of the target choice.

    Numba's cache notices an edit of the file a function is defined in, not of the files it calls into, so
    an edited intrinsic would keep running its old machine code. A directory per digest cannot go stale.
    """
    digest = hashlib.sha256()
    for path in sorted(_ROOT.rglob("*.py")):
        digest.update(path.relative_to(_ROOT).as_posix().encode())
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


class _Locator(_NumbaLocator):  # type: ignore[misc]
    """Where the machine code of a kernel is kept.

    The directory is named by what kernels are compiled from, so neither the place nor the time of the
    installation matters: a directory that was filled elsewhere, as in the making of an image, serves any
    process on the same CPU, also where nobody may write to it. Functions outside `sparselab.kernels` are told
    apart as Numba does it.
    """

    def __init__(self, py_func: Any, py_file: str) -> None:
        source = Path(py_file).resolve()
        self._is_kernel = source.is_relative_to(_ROOT)
        if self._is_kernel:
            folder = ".".join(source.relative_to(_ROOT).parent.parts) or "kernels"
        else:
            folder = self.get_suitable_cache_subpath(py_file)
        self._py_file, self._lineno = py_file, py_func.__code__.co_firstlineno
        self._cache_path = str(_CACHE_DIRECTORY / folder)

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _Locator | None:
        """The place, if it is there or can be made."""
        found = cls(py_func, py_file)
        with contextlib.suppress(OSError):
            os.makedirs(found._cache_path, exist_ok=True)
        return found if os.path.isdir(found._cache_path) else None

    def get_source_stamp(self) -> Any:
        """What the source must have been like for its machine code to be used."""
        return _CACHE_DIRECTORY.name if self._is_kernel else super().get_source_stamp()


class _InCacheDirectory(caching.CompileResultCacheImpl):
    _locator_classes = (_Locator,)


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


def jit(function: Callable[..., Any]) -> Any:
    """Compile a kernel, or a part of one; it allocates nothing.

    Without Numba's runtime, which counts references to arrays by atomic operations wherever LLVM leaves a
    call a call: threads wait for each other there, for a tenth to a fifth of a product.
    """
    dispatcher = numba.njit(nogil=True, no_cfunc_wrapper=True, fastmath=set(FASTMATH), _nrt=False)(function)
    # RuntimeError: no writable place; the kernel then compiles anew in each process.
    with contextlib.suppress(RuntimeError, OSError):
        dispatcher._cache = _KernelCache(function)
    return dispatcher
