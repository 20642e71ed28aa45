"""Seconds until a fresh process has imported, has run its first forward pass, has compiled everything."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.turns import TurnError

ROOT = Path(__file__).parents[1]

_FORWARD = """
import sparselab
sparselab.SparseLinear(768, 3072)(torch.ones(128, 768))
"""


@dataclass(frozen=True)
class Start:
    """What a fresh process does: `before` untimed, then `timed`.

    A cold one finds an empty kernel cache; the others share one that holds what `sparselab.warmup` compiles.
    """

    name: str
    timed: str
    before: str = ""
    cold: bool = False


STARTS = [
    Start("import torch", "import torch"),
    Start("import sparselab.kernels", "import sparselab.kernels"),
    Start("import sparselab", "import sparselab"),
    Start("import and first forward, beyond torch", _FORWARD, "import torch"),
    Start("warmup()", "sparselab.warmup()", "import torch, sparselab"),
    Start("import and first forward, beyond torch", _FORWARD, "import torch", cold=True),
    Start("warmup()", "sparselab.warmup()", "import torch, sparselab", cold=True),
]


def seconds(start: Start, cache: Path, threads: int) -> float:
    """Seconds that the timed part takes in a fresh process.

    Raises
    ------
    TurnError
        If the process fails.
    """
    code = (
        f"import time\n{start.before}\nbegin = time.perf_counter()\n{start.timed}\n"
        "print(time.perf_counter() - begin)"
    )
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, **limits, "PYTHONPATH": str(ROOT), "SPARSELAB_CACHE_DIR": str(cache)},
    )  # fmt: skip
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TurnError(f"a process for {start.name!r} ended with status {done.returncode}: {last}")
    return float(done.stdout)


def run(processes: int, threads: int, starts: Sequence[Start] = STARTS) -> list[list[float]]:
    """Seconds of each start in so many processes, in turns; one process before them fills the cache."""
    found: list[list[float]] = [[] for _ in starts]
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder) / "shared"
        seconds(Start("filling the cache", "import sparselab; sparselab.warmup()"), shared, threads)
        for turn in range(processes):
            for k, start in enumerate(starts):
                cache = Path(folder) / f"{turn}-{k}" if start.cold else shared
                found[k].append(seconds(start, cache, threads))
    return found


def report(options: Namespace, console: Console) -> list[dict[str, Any]]:
    """The subcommand: run, print a table; returns the rows for ``--json``."""
    table = Table(title=f"seconds, median of {options.processes} fresh processes (least, most)")
    for column in ("what", "kernel cache", "seconds"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    rows = []
    for start, each in zip(STARTS, run(options.processes, options.threads), strict=True):
        cache = "empty" if start.cold else "full"
        median = statistics.median(each)
        table.add_row(start.name, cache, f"{median:.2f} ({min(each):.2f}, {max(each):.2f})")
        rows.append({"what": start.name, "cache": cache, "median_s": median, "seconds": each})
    console.print(table)
    return rows
