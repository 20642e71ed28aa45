"""``python -m sparselab warmup``: fill the cache of compiled kernels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from sparselab._warmup import warmup
from sparselab.bench.output.info import compiled
from sparselab.kernels.cpu.runtime.jit import cache_directory

_DTYPES = ("float32", "float64", "bfloat16", "float16")


def main(arguments: Sequence[str]) -> int:
    """Compile what is not in the cache yet, and say where it is; returns the exit status.

    Raises
    ------
    SystemExit
        With status 2 if an option is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sparselab warmup",
        description="Compile the kernels of linear layers into the cache ($SPARSELAB_CACHE_DIR, else the "
        "user's), where later processes find them. A copy of the directory, also a read-only one, serves "
        "other machines with the same CPU and versions, wherever the package is installed. NUMBA_CPU_NAME "
        "and NUMBA_CPU_FEATURES, set the same there, compile for another CPU that this one can stand in for.",
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=_DTYPES, default=["float32"], help="of weights (default: float32)"
    )
    parser.add_argument("--inference", action="store_true", help="forward passes only")
    options = parser.parse_args(arguments)
    for name in options.dtypes:
        seconds = warmup(getattr(torch, name), training=not options.inference)
        print(f"{name}: {seconds:.1f} s")
    found = compiled(cache_directory())
    print(f"{found['kernels']} kernels in {found['directory']}")
    return 0
