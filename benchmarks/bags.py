"""Bags of words in CSR through a first layer: torch's, ours with the bags made dense, ours by entries."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from sparselab import SparseLinear
from sparselab.bench.measure.timing import Timing, interleave
from sparselab.bench.output import tables
from sparselab.nn.ops.cpu import sparse_input

ARMS = "nn.Linear", "sparse, made dense", "sparse, by entries"


class Bags(NamedTuple):
    """A layer of 90% sparsity, and a batch of bags of so many words each."""

    words: int
    out_features: int
    tokens: int
    entries: int

    def __str__(self) -> str:
        return f"{self.words}->{self.out_features}, {self.tokens} bags of {self.entries}"


CASES = (
    Bags(10_000, 256, 64, 60), Bags(10_000, 256, 256, 60), Bags(50_000, 256, 256, 60),
    Bags(1000, 1000, 512, 60), Bags(1000, 1000, 512, 100),
)  # fmt: skip


def draw(case: Bags) -> Tensor:
    """The batch, in CSR."""
    x = torch.zeros(case.tokens, case.words)
    drawn = torch.randint(0, case.words, (case.tokens, case.entries))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        return x.scatter_(1, drawn, torch.rand(case.tokens, case.entries)).to_sparse_csr()


@contextmanager
def entries_below(density: float) -> Iterator[None]:
    """Let products go by entries below a density of the tokens, in place of the rule."""
    before, sparse_input.DENSE_FROM = sparse_input.DENSE_FROM, density
    try:
        yield
    finally:
        sparse_input.DENSE_FROM = before


def run(case: Bags, rounds: int) -> dict[str, Timing]:
    """Steps without an optimizer, forward and backward, all in turns."""
    torch.manual_seed(0)
    x = draw(case)
    dense = nn.Linear(case.words, case.out_features)
    layer = SparseLinear(case.words, case.out_features, sparsity=0.9)

    def step(module: nn.Module, density: float) -> None:
        module.zero_grad()
        with entries_below(density):
            module(x).sum().backward()

    calls = [lambda: step(dense, 0.0), lambda: step(layer, 0.0), lambda: step(layer, 2.0)]
    return interleave(dict(zip(ARMS, calls, strict=True)), rounds, str(case))


def report(options: Namespace, console: Console) -> list[dict[str, Any]]:
    """The subcommand: run, print a table; returns the rows for ``--json``."""
    rows = []
    for case in CASES:
        timings = run(case, options.rounds)
        rows.append({"case": str(case), **{name: timing.median for name, timing in timings.items()}})
    lines = [[row["case"], *(f"{row[name]:.2f}" for name in ARMS)] for row in rows]
    title = "bags of words in CSR, forward + backward, ms, median"
    console.print(tables.plain(title, ["layer", *ARMS], lines))
    return rows
