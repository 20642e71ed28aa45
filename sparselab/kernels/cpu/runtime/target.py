"""What the host CPU offers: vector width, and the sizes that follow from it."""

from __future__ import annotations

import os
from pathlib import Path

from llvmlite import binding
from numba.core import config


def _vector_bytes() -> int:
    """Bytes of one vector register: 64 (AVX-512), 32 (AVX2) or 16 (NEON, SSE).

    ``$SPARSELAB_VECTOR_BYTES`` overrides it, for tests and for CPUs that clock down on wide vectors. Any
    value is correct on any CPU, since LLVM splits vectors the CPU lacks; only speed differs.
    """
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


def _l2_bytes() -> int:
    """Second-level cache of one core, where Linux tells it; else 1 MiB."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 1 << 20


VECTOR_BYTES = _vector_bytes()

#: Bytes of one tile row, the unit of all arithmetic: one value in one vector type. Two rows' sums must fit
#: in registers next to the operands: 8 of 32 zmm, 8 of 16 ymm, 16 of 32 NEON registers.
TILE_BYTES = 256 if VECTOR_BYTES == 64 else 128

#: Columns of one block of X in the products. With AVX-512 the block (32 KiB) stays in a first-level cache of
#: 48 KiB. Narrower vectors ask for half as many bytes a cycle, which the second level almost delivers: there
#: longer segments gain more than the first level would (48 KiB; see benchmarks/LOG.md).
BLOCK_COLUMNS = 128 if VECTOR_BYTES == 64 else 384

#: How much a worker plans to keep in caches of its own: most of a large second level. Where that is small,
#: the CPUs known have a third level of 2 MiB or more a core that streams about as fast.
CACHE_BUDGET_BYTES = max(_l2_bytes() * 9 // 10, 2 << 20)
