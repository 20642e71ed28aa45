"""Which layout of connections is the fastest at equal quality: single ones, constant fan-in, blocks.

The time is that of a step of one layer, forward and backward, beside `torch.nn.Linear`; the quality what
small networks reach on MNIST and on Tiny Shakespeare (`benchmarks/quality.py`), over several seeds.
"""

from __future__ import annotations

import math
import statistics
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks import quality
from benchmarks.quality import Layout, Learn, MissingDataError
from sparselab.bench.contenders.linear import FAN_IN, OURS, Case, blocks, run_case
from sparselab.bench.measure.timing import Timing, plain_timings

DENSE, SINGLE = "dense", "single"
#: Outputs and inputs of a block.
BLOCK_SHAPES = (4, 1), (8, 1), (16, 1), (1, 4), (4, 4), (8, 8), (16, 16), (32, 32)
LAYOUTS = {
    DENSE: Layout(None),
    SINGLE: Layout({"layer": "sparse"}),
    # Growth by the gradient of a whole layer would leave rows of different lengths.
    FAN_IN: Layout({"layer": "fan_in"}, scope="row"),
    **{blocks(shape): Layout({"layer": "block", "block_shape": shape}) for shape in BLOCK_SHAPES},
}
#: in_features, out_features and tokens of the layers that are timed.
SHAPES = (768, 3072, 2048), (3072, 768, 2048)


@dataclass(frozen=True)
class Runs:
    """How well networks of one layout did, one number for each seed."""

    scores: Sequence[float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.scores)

    @property
    def std(self) -> float:
        """Standard deviation of a sample; 0 of a single run."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.std / math.sqrt(len(self.scores))


class Task(NamedTuple):
    """What networks learn: the title of its column, how a score is shown, and whether more is better.

    `load` makes what trains a network from the options of the command.
    """

    title: str
    scale: float
    decimals: int
    more_is_better: bool
    load: Callable[[Namespace], Learn]

    def show(self, runs: Runs) -> str:
        """Mean and standard deviation, the latter of more runs than one."""
        mean, std = (f"{self.scale * value:.{self.decimals}f}" for value in (runs.mean, runs.std))
        return mean if len(runs.scores) == 1 else f"{mean} ± {std}"

    def as_good(self, runs: Runs, reference: Runs) -> bool:
        """Whether a mean is not worse than another by more than two standard errors of their difference."""
        worse = reference.mean - runs.mean if self.more_is_better else runs.mean - reference.mean
        return worse <= 2 * math.hypot(runs.error, reference.error)


TASKS = {
    "mnist": Task("MNIST, %", 100, 2, True, lambda options: quality.digits(options.sparsity, options.epochs)),
    "text": Task(
        "Shakespeare, nats", 1, 4, False, lambda options: quality.text(options.sparsity, options.steps)
    ),
}
PARTS = ("speed", *TASKS)


@dataclass
class Row:
    """What was found of a layout: times by layer, a text saying why there is none, and runs by task."""

    layout: str
    step_ms: dict[str, Timing | str] = field(default_factory=dict)
    runs: dict[str, Runs] = field(default_factory=dict)

    @property
    def total_ms(self) -> float | None:
        """Milliseconds of a step of all layers; None if one was not timed."""
        timings = [timing for timing in self.step_ms.values() if isinstance(timing, Timing)]
        whole = timings and len(timings) == len(self.step_ms)
        return sum(timing.median for timing in timings) if whole else None

    def plain(self, dense: Row) -> dict[str, Any]:
        """As data for JSON; `times_dense` says how many times as fast as dense layers these are."""
        tasks = {
            name: {**asdict(runs), "mean": runs.mean, "std": runs.std} for name, runs in self.runs.items()
        }
        speed = {"step_ms": plain_timings(self.step_ms), "times_dense": times_dense(self, dense)}
        return {"layout": self.layout, **(speed if self.step_ms else {}), **tasks}


def times_dense(row: Row, dense: Row) -> float | None:
    """How many times as fast as dense layers those of a row are, all together; None if not all were timed."""
    if row.total_ms is None or dense.total_ms is None:
        return None
    return dense.total_ms / row.total_ms


def time_layers(rows: Mapping[str, Row], sparsity: float, rounds: int, threads: int) -> None:
    """Time a step of each layer in all layouts, in turns.

    Single connections and those of constant fan-in are the same matrix, and outputs and gradients of each
    layout are checked first.
    """
    contenders = {OURS if name == SINGLE else name: row for name, row in rows.items()}
    for in_features, out_features, tokens in SHAPES:
        case = Case(in_features, out_features, tokens, sparsity)
        (result,) = run_case(case, ["forward + backward"], contenders, rounds, [threads])
        for name, timing in result.timings.items():
            contenders[name].step_ms[f"{in_features} -> {out_features}"] = timing


def train(rows: Mapping[str, Row], task: str, learn: Learn, seeds: int) -> None:
    """Train networks in all layouts, each from the seeds 1, 2, ..."""
    for name, row in rows.items():
        labels = {seed: f"{task}, {name}, seed {seed}" for seed in range(1, seeds + 1)}
        row.runs[task] = Runs([learn(LAYOUTS[name], seed, label) for seed, label in labels.items()])


def fastest(rows: Mapping[str, Row], tasks: Collection[str]) -> tuple[str | None, list[str]]:
    """The fastest sparse layout that is as good as single connections in all tasks, and all that are.

    None is the fastest if nothing was timed.
    """
    single = rows[SINGLE]
    equal = [
        name
        for name, row in rows.items()
        if name != DENSE and all(TASKS[task].as_good(row.runs[task], single.runs[task]) for task in tasks)
    ]
    timed = {name: rows[name].total_ms for name in equal}
    known = {name: total for name, total in timed.items() if total is not None}
    return min(known, key=known.__getitem__, default=None), equal


def draw(rows: Mapping[str, Row], parts: Collection[str], sparsity: float) -> Table:
    """A table with a row for each layout."""
    dense = rows[DENSE]
    table = Table(title=f"layouts at {sparsity:.4g} sparsity: forward + backward, and what networks reach")
    table.add_column("layout")
    layers = list(dense.step_ms)
    tasks = [name for name in TASKS if name in parts]
    titles = [*(f"{layer}, ms" for layer in layers), *(["times dense"] if layers else [])]
    for title in (*titles, *(TASKS[name].title for name in tasks)):
        table.add_column(title, justify="right")
    for name, row in rows.items():
        timings = [row.step_ms[layer] for layer in layers]
        cells = [f"{each.median:.2f}" if isinstance(each, Timing) else "cannot run" for each in timings]
        if layers:
            ratio = times_dense(row, dense)
            cells.append("-" if ratio is None else f"{ratio:.2f}x")
        scores = (TASKS[task].show(row.runs[task]) if task in row.runs else "no data" for task in tasks)
        table.add_row(name, *cells, *scores)
    return table


def conclude(rows: Mapping[str, Row]) -> list[str]:
    """For each task, and for all of them, which layouts are as good as single connections."""
    tasks = list(rows[SINGLE].runs)
    lines = []
    for each in [*([task] for task in tasks), *([tasks] if len(tasks) > 1 else [])]:
        best, equal = fastest(rows, each)
        line = f"as good as single connections ({' and '.join(each)}): {', '.join(equal)}"
        lines.append(line if best is None else f"{line}; the fastest is {best}")
    return lines


def report(options: Namespace, console: Console) -> list[dict[str, Any]]:
    """The subcommand: run, print a table; returns the rows for ``--json``."""
    rows = {name: Row(name) for name in LAYOUTS}
    reasons = []
    if "speed" in options.parts:
        time_layers(rows, options.sparsity, options.rounds, options.threads)
        timings = [(name, each) for name, row in rows.items() for each in row.step_ms.values()]
        reasons += [f"{name} {each}" for name, each in timings if isinstance(each, str)]
    for name, task in TASKS.items():
        if name in options.parts:
            try:
                learn = task.load(options)
            except MissingDataError as error:
                reasons.append(f"{task.title}: no data: {error}")
            else:
                train(rows, name, learn, options.seeds)
    console.print(draw(rows, options.parts, options.sparsity))
    for line in (*reasons, *conclude(rows)):
        console.print(line, markup=False)
    if rows[SINGLE].runs:
        console.print("as good: the mean is not worse by more than two standard errors of the difference")
    settings = {name: getattr(options, name) for name in ("sparsity", "epochs", "steps")}
    return [{**row.plain(rows[DENSE]), **settings} for row in rows.values()]
