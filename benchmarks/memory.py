"""Memory of a training step, twice: bytes of the tensors, and resident set of a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import psutil
import torch
from torch import nn

import sparselab

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
