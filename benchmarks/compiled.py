"""Training steps of a transformer under `torch.compile` beside eager ones, dense and sparse."""

from __future__ import annotations

import copy
import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters

import sparselab
from benchmarks.models import UPDATE_FREQ, Size, Trainer, gate, make_models, sizes
from sparselab.bench.measure.timing import Timing, interleave


@dataclass(frozen=True)
class Arm:
    """How a model trains: `graphs` that were compiled, topology updates included, `breaks` between them."""

    step_ms: Timing
    graphs: int
    breaks: int
    compile_seconds: float


def run(size: Size, rounds: int, label: str = "model", backend: str = "inductor") -> dict[str, Arm]:
    """Measure one size, all four arms in turns in this process.

    Parameters
    ----------
    size : Size
    rounds : int
        Steps of each arm that count, none of which updates the topology.
    label : str
        What the progress bar says.
    backend : str
        Of `torch.compile`.

    Returns
    -------
    dict
        Results by "dense", "dense compiled", "sparse" and "sparse compiled".

    Raises
    ------
    AssertionError
        If the sparse model does not compute what its weights say.

    Notes
    -----
    Compiling is timed as the first step. Graphs are counted over it and seven more, of which one updates the
    topology of the sparse model.
    """
    dense, sparse = make_models(size)
    gate(sparse, size)
    trainers: dict[str, Trainer] = {}
    costs: dict[str, tuple[int, int, float]] = {}
    torch._dynamo.reset()
    for name, model in (("dense", dense), ("sparse", sparse)):
        for compiled in (False, True):
            counters.clear()
            own = copy.deepcopy(model)
            algorithm = sparselab.RigL(update_freq=UPDATE_FREQ) if name == "sparse" else None
            if algorithm is not None:
                own.apply(algorithm)
            trainer = Trainer(own, size, fused=False, algorithm=algorithm)
            if compiled:
                trainer.model = torch.compile(own, backend=backend)
            start = time.perf_counter()
            trainer.step()
            seconds = time.perf_counter() - start
            for update in (False, True):
                if algorithm is not None:
                    trainer.seconds_of_two_steps(update)
            trainer.step()
            graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
            key = f"{name} compiled" if compiled else name
            trainers[key], costs[key] = trainer, (graphs, breaks, seconds if compiled else 0.0)
    steps = interleave({name: trainer.step for name, trainer in trainers.items()}, rounds, label)
    return {name: Arm(steps[name], *costs[name]) for name in trainers}


def report(options: Namespace, console: Console) -> list[dict[str, Any]]:
    """The subcommand: run, print a table; returns the rows for ``--json``."""
    table = Table(title="training steps on random tokens, eager and under torch.compile (and share of dense)")
    for column in ("model", "ms per step", "first step, s", "graphs", "graph breaks"):
        table.add_column(column, justify="left" if column == "model" else "right")
    rows = []
    for name, size in sizes(options.models, options.batch, options.context).items():
        arms = run(size, options.rounds, name)
        for which, arm in arms.items():
            share = arm.step_ms.median / arms["dense"].step_ms.median
            table.add_row(
                f"{name} {which}, {size.batch}x{size.context}",
                f"{arm.step_ms.median:.1f} ({share:.0%})",
                f"{arm.compile_seconds:.1f}" if arm.graphs else "",
                str(arm.graphs) if arm.graphs else "",
                str(arm.breaks) if arm.graphs else "",
            )
            rows.append({"model": name, "arm": which, "size": asdict(size), **asdict(arm)})
    console.print(table)
    return rows
