"""The table of the transformers example."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparselab.bench.measure.machine import cpu_name, versions

Result = dict[str, Any]


def _megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.1f}"


def _number(value: float) -> str:
    return f"{value:,}"


def _loss(value: float) -> str:
    return f"{value:.3f}"


def _time(value: float) -> str:
    return f"{value:,.1f}"


#: Label, key, how to print it.
ROWS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("parameters live", "parameters_live", _number),
    ("weights, MB", "weight_bytes", _megabytes),
    ("  topology, MB", "topology_bytes", _megabytes),
    ("  gradients, MB", "gradient_bytes", _megabytes),
    ("  kernel plans, MB", "plan_bytes", _megabytes),
    ("  optimizer state, MB", "optimizer_bytes", _megabytes),
    ("training, all of these, MB", "training_bytes", _megabytes),
    ("resident memory before the model, MB", "resident_before", _megabytes),
    ("  growth until after the last step, MB", "resident_growth", _megabytes),
    ("  peak, MB", "resident_peak", _megabytes),
    ("ms per step, median", "step_ms", _time),
    ("  mean, updates of RigL included", "mean_ms", _time),
    ("loss of the first step, nats", "first_loss", _loss),
    ("  of the last step", "last_loss", _loss),
    ("validation loss, nats", "validation", _loss),
    ("ms per byte written", "token_ms", _time),
]
#: Rows without a ratio.
_ALONE = ("topology_bytes", "plan_bytes", "resident_before", "first_loss", "last_loss", "validation")


def summed_up(result: Result, untimed_steps: int) -> Result:
    """What came of an arm, with its steps in numbers."""
    timed = result["seconds"][untimed_steps:] or result["seconds"]
    return {
        **result,
        "step_ms": 1000 * statistics.median(timed),
        "mean_ms": 1000 * statistics.fmean(timed),
        "first_loss": result["losses"][0],
        "last_loss": result["losses"][-1],
    }


def make_table(name: str, results: dict[str, Result], untimed_steps: int) -> Table:
    """Both arms and their ratio."""
    dense, sparse = (summed_up(results[arm], untimed_steps) for arm in ("dense", "sparse"))
    used = {**versions(), "transformers": transformers.__version__}
    about = ", ".join(f"{package} {used[package]}" for package in ("torch", "numba", "transformers"))
    table = Table(title=f"{name}: {dense['threads']} threads of {cpu_name()}; {about}")
    for column in ("", "dense", "sparse", "sparse / dense"):
        table.add_column(column, justify="right" if column else "left")
    for label, key, form in ROWS:
        if key in dense:
            ratio = "" if key in _ALONE else f"{sparse[key] / dense[key]:.2f}"
            table.add_row(label, form(dense[key]), form(sparse[key]), ratio)
    return table


def show(name: str, results: dict[str, Result], untimed_steps: int) -> None:
    """Print what a model writes, if it writes, and the table."""
    console = Console()
    for arm, result in results.items():
        if "sample" in result:
            console.print(f"\n[bold]{arm}, a sample[/bold]\n{escape(result['sample'])}", highlight=False)
    console.print()
    console.print(make_table(name, results, untimed_steps))
