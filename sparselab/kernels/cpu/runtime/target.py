"""What the host CPU offers, and the sizes of tiles and blocks that follow from it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from llvmlite import binding
from numba.core import config

CACHE_LINE = 64


@dataclass(frozen=True)
class Target:
    """A CPU as the kernels see it, and the sizes they use on it.

    Parameters
    ----------
    vector_bytes : int
        Of one vector register: 64 (AVX-512), 32 (AVX2) or 16 (NEON, SSE).
    l1d_bytes, l2_bytes : int
        First-level data cache and second-level cache of one core.
    tile_bytes : int
        One tile row, the unit of all arithmetic: one value in one vector type. Compiled into the kernels.
    block_columns : int
        Columns of one block of X in the products of single connections.
    cache_budget_bytes : int
        How much a worker plans to keep in caches of its own.
    """

    vector_bytes: int
    l1d_bytes: int
    l2_bytes: int
    tile_bytes: int
    block_columns: int
    cache_budget_bytes: int

    @classmethod
    def of(cls, vector_bytes: int, l1d_bytes: int, l2_bytes: int) -> Target:
        """The target with the sizes that suit such a CPU.

        Notes
        -----
        Two tile rows of sums must fit in registers next to the operands: 8 of 32 zmm, 8 of 16 ymm, 16 of 32
        NEON registers.

        A block of X stays in the first-level cache, beside sums and connections, where that is large enough
        (48 KiB) and alone can deliver two vectors of 64 bytes a cycle. Other cores load 64 bytes a cycle or
        less, of which the second level delivers most: there longer segments gain more than the first level
        would. A block of just the 32 KiB of a first level has neither advantage (see benchmarks/LOG.md).

        Most of a large second level is a worker's own. Where that is small, the CPUs known have a third level
        of 2 MiB or more a core that streams about as fast.
        """
        tile_bytes = 256 if vector_bytes == 64 else 128
        block_bytes = 32 << 10 if _lives_in_first_level(vector_bytes, l1d_bytes) else 48 << 10
        budget = max(l2_bytes * 9 // 10, 2 << 20)
        return cls(vector_bytes, l1d_bytes, l2_bytes, tile_bytes, block_bytes // tile_bytes, budget)

    def why(self) -> dict[str, str]:
        """What was chosen, and why, in words: by the name of the size."""
        registers = 16 if self.vector_bytes == 32 else 32
        first, block = self.l1d_bytes >> 10, self.block_columns * self.tile_bytes >> 10
        if _lives_in_first_level(self.vector_bytes, self.l1d_bytes):
            place = f"{block} KiB stay in the first level of {first} KiB, which loads two vectors a cycle"
        else:
            place = f"{block} KiB: long runs of connections gain more here than a first level of {first} KiB"
        if self.cache_budget_bytes == self.l2_bytes * 9 // 10:
            budget = "nine tenths of the second level"
        else:
            budget = f"2 MiB at least, for a second level of {self.l2_bytes >> 10} KiB has a third behind it"
        tile = f"{self.tile_bytes // 4} tokens in float32"
        return {
            "tile_bytes": f"{tile}: two rows of sums fit {registers} registers beside what they are made of",
            "block_columns": place,
            "cache_budget_bytes": budget,
        }


def _lives_in_first_level(vector_bytes: int, l1d_bytes: int) -> bool:
    """Whether a block of packed tokens is one that the first-level cache keeps."""
    return vector_bytes == 64 and l1d_bytes >= 48 << 10


def host() -> Target:
    """The CPU that kernels are compiled for, by what it or the environment says.

    ``$SPARSELAB_VECTOR_BYTES`` overrides the width of vectors, for tests and for CPUs that clock down on wide
    ones. Any value is correct on any CPU, since LLVM splits vectors the CPU lacks; only speed differs.

    Raises
    ------
    ValueError
        If the variable is set to anything but 16, 32 or 64.
    """
    vector_bytes = _vector_bytes()
    return Target.of(
        vector_bytes,
        _cache_bytes(1, "SC_LEVEL1_DCACHE_SIZE") or (48 if vector_bytes == 64 else 32) << 10,
        _cache_bytes(2, "SC_LEVEL2_CACHE_SIZE") or 1 << 20,
    )


def _vector_bytes() -> int:
    if text := os.environ.get("SPARSELAB_VECTOR_BYTES"):
        if text not in ("16", "32", "64"):
            raise ValueError(f"SPARSELAB_VECTOR_BYTES must be 16, 32 or 64, got {text!r}")
        return int(text)
    if config.CPU_NAME or config.CPU_FEATURES:  # the user compiles for another CPU than the host
        return 64 if "+avx512f" in (config.CPU_FEATURES or "") else 32
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx2") else 16


def _cache_bytes(level: int, name: str, caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the data cache of this level, from Linux or from the C library; 0 if neither tells."""
    for cache in sorted(caches.glob("index*")):
        try:
            kind, its_level, size = ((cache / file).read_text().strip() for file in ("type", "level", "size"))
            if its_level == str(level) and kind in ("Data", "Unified"):
                return int(size.removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    try:
        return max(os.sysconf(name), 0)
    except (AttributeError, OSError, ValueError):
        return 0


def _has_fast_gathers(cpu: str, vector_bytes: int) -> bool:
    """By LLVM's name of the CPU: those of AMD take apart a gather into dozens of operations."""
    return vector_bytes == 64 and not cpu.startswith("znver")


#: What kernels are compiled and planned for.
TARGET = host()

#: Its constants of the compiled code.
VECTOR_BYTES, TILE_BYTES = TARGET.vector_bytes, TARGET.tile_bytes

#: Whether vectors are gathered from scattered places about as fast as these could be loaded one by one.
HAS_FAST_GATHERS = _has_fast_gathers(config.CPU_NAME or binding.get_host_cpu_name(), VECTOR_BYTES)  # type: ignore[attr-defined]
