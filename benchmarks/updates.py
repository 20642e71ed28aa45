"""What an update of RigL takes beside a step: two layers with a nonlinearity between, AdamW."""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from typing import Any

import torch
from rich.console import Console
from torch import nn

import sparselab
from sparselab.bench.output import tables

#: Steps from one update to the next; the steps before those that count, in updates.
PERIOD, WARM = 10, 4


def run(width: int, tokens: int, sparsity: float, updates: int) -> dict[str, float]:
    """Median milliseconds of a step, of one that ends with an update, and of the one after it.

    Parameters
    ----------
    width : int
        Inputs and outputs of both layers.
    tokens : int
    sparsity : float
    updates : int
        How many updates count.
    """
    torch.manual_seed(0)
    first, second = (sparselab.SparseLinear(width, width, sparsity=sparsity) for _ in range(2))
    model = nn.Sequential(first, nn.ReLU(), second)
    optimizer = torch.optim.AdamW(model.parameters())
    sparselab.RigL(update_freq=PERIOD, stop=1 << 30).attach(model, optimizer)
    x = torch.randn(tokens, width)
    seconds: dict[str, list[float]] = {"step": [], "step with an update": [], "step after it": []}
    for step in range(1, PERIOD * (WARM + updates + 1)):
        start = time.perf_counter()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        kind = {0: "step with an update", 1: "step after it"}.get(step % PERIOD, "step")
        if step >= PERIOD * (WARM + 1):
            seconds[kind].append(time.perf_counter() - start)
    return {kind: 1e3 * statistics.median(each) for kind, each in seconds.items()}


def report(options: Namespace, console: Console) -> list[dict[str, Any]]:
    """The subcommand: run, print a table; returns the rows for ``--json``."""
    found = run(options.width, options.tokens, options.sparsity, options.updates)
    title = (
        f"RigL, two layers {options.width} x {options.width}, {options.tokens} tokens, "
        f"{options.sparsity:.0%} sparse, AdamW: milliseconds, median"
    )
    console.print(tables.plain(title, list(found), [[f"{value:.2f}" for value in found.values()]]))
    return [{"width": options.width, "tokens": options.tokens, "sparsity": options.sparsity, **found}]
