"""Memory of a training step, twice: bytes of the tensors, and resident set of a fresh process.

Of a stack of layers here, and by cause of whole models in `benchmarks.scale`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from typing import Any

import psutil
import torch
from rich.console import Console
from torch import nn

import sparselab
from benchmarks import scale
from sparselab.bench.output import tables

WIDTH, HIDDEN, LAYERS, TOKENS, STEPS = 1024, 4096, 4, 256, 3


def build(arm: str, sparsity: float) -> nn.Module:
    """A stack of feed-forward blocks, built sparse from the start in the sparse arm."""

    def linear(inputs: int, outputs: int) -> nn.Module:
        if arm == "dense":
            return nn.Linear(inputs, outputs)
        return sparselab.SparseLinear(inputs, outputs, sparsity=sparsity)

    blocks = [nn.Sequential(linear(WIDTH, HIDDEN), nn.GELU(), linear(HIDDEN, WIDTH)) for _ in range(LAYERS)]
    return nn.Sequential(*blocks)


def measure(arm: str, sparsity: float) -> dict[str, Any]:
    """Run in a fresh process: train a few steps and count."""
    process = psutil.Process()
    # A small layer first, so that code, kernels and thread pools are not charged to the model.
    warm = build(arm, sparsity)[0][0] if arm == "dense" else sparselab.SparseLinear(256, 256)
    warm(torch.randn(64, warm.in_features, requires_grad=True)).sum().backward()
    del warm
    before = process.memory_info().rss
    model = build(arm, sparsity)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(TOKENS, WIDTH)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    report = sparselab.memory_report(model, optimizer)
    return {
        "arm": arm,
        "weight_bytes": report.weight_bytes,
        "training_bytes": report.training_bytes,
        "rss_growth": process.memory_info().rss - before,
    }


def run(sparsities: list[float], threads: int) -> list[dict[str, Any]]:
    """One fresh process per arm."""
    rows = []
    for arm, sparsity in [("dense", 0.0), *(("sparse", s) for s in sparsities)]:
        code = (
            "import json, torch; from benchmarks import memory; "
            f"torch.set_num_threads({threads}); print(json.dumps(memory.measure({arm!r}, {sparsity})))"
        )
        output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        rows.append({**json.loads(output.stdout), "sparsity": sparsity})
    return rows


def report(options: Namespace, console: Console) -> list[dict[str, Any]]:
    """The subcommand: run, print tables; returns the rows for ``--json``."""
    found = run(options.sparsity, options.threads)
    dense = found[0]
    rows = []
    for row in found:
        name = row["arm"] if row["arm"] == "dense" else f"sparse {row['sparsity']:.0%}"
        shares = (
            f"{row[key] / 2**20:.1f} ({row[key] / dense[key]:.0%})"
            for key in ("weight_bytes", "training_bytes", "rss_growth")
        )
        rows.append([name, *shares])
    columns = ["arm", "weights", "training state", "resident set growth"]
    console.print(tables.plain("MiB after three AdamW steps (and share of dense)", columns, rows))
    return [*found, *scale.report(options.models, options.tokens, options.threads, options.blocks, console)]
