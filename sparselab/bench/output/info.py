"""``python -m sparselab info``: what the kernels found on this machine and where they are kept."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numba
import torch

from sparselab.bench.measure import machine
from sparselab.kernels.cpu.csr.skinny import MOST_TOKENS
from sparselab.kernels.cpu.csr.skinny_dw import MOST_SAMPLED_TOKENS
from sparselab.kernels.cpu.runtime.jit import cache_directory
from sparselab.kernels.cpu.runtime.matrix_unit import has_matrix_unit
from sparselab.kernels.cpu.runtime.target import HAS_FAST_GATHERS, TARGET
from sparselab.nn.ops.cpu.threads import use_torch_threads

_SETTINGS = ("SPARSELAB_", "NUMBA_")


def collect() -> dict[str, dict[str, Any]]:
    """Everything that is printed, by section. Starts Numba's threads, to know what they are."""
    return {
        "cpu": {
            "name": machine.cpu_name(),
            "cores": os.cpu_count() or 1,
            **{name.replace("_", " "): size for name, size in asdict(TARGET).items()},
            "fast gathers": HAS_FAST_GATHERS,
            "bfloat16 instructions": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
            "matrix unit for blocks in bfloat16": has_matrix_unit(),
        },
        "why": {name.replace("_", " "): reason for name, reason in TARGET.why().items()}
        | {
            "most tokens without tiles": f"{MOST_TOKENS}, {MOST_SAMPLED_TOKENS} in gradients by the values, "
            f"as gathers are {'fast' if HAS_FAST_GATHERS else 'slow'}"
        },
        "threads": {
            "torch": torch.get_num_threads(),
            "at most in Numba": numba.config.NUMBA_NUM_THREADS,
            "Numba threading layer": _threading_layer(),
        },
        "compiled kernels": compiled(cache_directory()),
        "versions": machine.versions(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_SETTINGS)},
    }


def _threading_layer() -> str:
    try:
        use_torch_threads()
        return numba.threading_layer()
    except ValueError as error:  # the layer that the user chose is not there
        return f"none: {str(error).splitlines()[0]}"


def compiled(directory: Path) -> dict[str, Any]:
    """Number and bytes of what is in the cache for this version of the kernels."""
    sizes = {path: path.stat().st_size for path in directory.rglob("*") if path.is_file()}
    return {
        "directory": str(directory),
        "kernels": sum(path.suffix == ".nbc" for path in sizes),
        "MB": round(sum(sizes.values()) / 1e6, 2),
    }


def main(arguments: Sequence[str]) -> int:
    """Print what there is to know, or write it as JSON; returns the exit status.

    Raises
    ------
    SystemExit
        With status 2 if an option is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sparselab info",
        description="CPU, vector width in use, threads, cache of compiled kernels, versions, settings.",
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="JSON instead of a table, to FILE if given"
    )
    options = parser.parse_args(arguments)
    found = collect()
    if options.json is None:
        _show(found)
        return 0
    text = json.dumps(found, indent=1)
    if options.json == "-":
        print(text)
        return 0
    try:
        Path(options.json).write_text(text + "\n")
    except OSError as error:
        parser.error(f"argument --json: {error}")
    return 0


def _show(found: dict[str, dict[str, Any]]) -> None:
    for section, entries in found.items():
        print(f"{section}:")
        if not entries:
            print("  (nothing set)")
        width = max((len(name) for name in entries), default=0)
        for name, value in entries.items():
            print(f"  {name.ljust(width)}  {value}")
