"""Two revisions of this repository, timed in turns: each from its own worktree, with its own kernel cache.

The cases are those that changes of the kernels and of the way to them are judged by, in one run. What differs
between revisions (names, arguments) is asked for in `benchmarks/driver.py`.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import turns
from benchmarks.models import SIZES, SPARSITY, Size
from benchmarks.turns import Contest, Driver, Timings, TurnError
from sparselab.bench.contenders.linear import SHAPES, Case
from sparselab.bench.measure.timing import Timing, plain_timings

ROOT = Path(__file__).resolve().parents[1]
#: A case counts as slower from so many times the time of the first revision.
SLOWER = 1.03


@dataclass(frozen=True)
class Layer:
    """One layer: single connections, or blocks of a shape."""

    case: Case
    block_shape: tuple[int, int] | None = None

    def __str__(self) -> str:
        blocks = "" if self.block_shape is None else ", blocks {}x{}".format(*self.block_shape)
        return f"{self.case}{blocks}"

    def compare(self, drivers: Mapping[str, Driver], folder: Path, n_turns: int, calls: int) -> Timings:
        """Milliseconds by operation and driver."""
        return turns.compare(self.case, drivers, folder, n_turns, calls, block_shape=self.block_shape)


@dataclass(frozen=True)
class Model:
    """The whole training step of a transformer: forward, loss, backward, AdamW, RigL between its updates."""

    name: str
    size: Size

    def __str__(self) -> str:
        return f"{self.name} transformer, {self.size.batch}x{self.size.context}"

    def compare(self, drivers: Mapping[str, Driver], folder: Path, n_turns: int, calls: int) -> Timings:
        """Milliseconds by operation and driver."""
        contest = Contest(drivers)
        source = str(ROOT / "examples" / "gpt_model.py")
        for name in drivers:
            contest.ask(name, "load_model", source=source, size=asdict(self.size), rules=SPARSITY)
        return contest.time(["training step"], n_turns, calls, str(self))


Work = Layer | Model

#: The layers of MNIST-sized networks and one of few tokens, ``(in_features, out_features, tokens)``.
SMALL = ((784, 512, 128), (784, 300, 100), (256, 256, 64), (64, 64, 32), (1024, 1024, 16))


def groups(sparsities: Sequence[float]) -> dict[str, list[Work]]:
    """All cases, by the names that ``--cases`` takes."""
    shapes = [(*shape, tokens) for shape, tokens in SHAPES.items()]
    cases = turns.cases(shapes, sparsities)
    return {
        "layers": [Layer(case) for case in cases],
        "token": [Layer(case) for case in turns.cases([(3072, 768, 1)], sparsities)],
        "blocks": [Layer(case, (4, 4)) for case in cases],
        "small": [Layer(case) for case in turns.cases(SMALL, sparsities)],
        "small blocks": [
            Layer(case, (side, side))
            for case in turns.cases(SMALL, sparsities)
            for side in (4, 16)
            if case.out_features % side == case.in_features % side == 0
        ],
        "model": [Model("10M", SIZES["10M"])],
    }


def git(repository: Path, *arguments: str) -> str:
    """Output of a git command, without the line break at its end.

    Raises
    ------
    TurnError
        If git is not there or refuses.
    """
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise TurnError(f"git cannot be started: {error}") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise TurnError(f"git {arguments[0]}: {lines[-1]}")
    return done.stdout.strip()


def commit_of(repository: Path, revision: str) -> str:
    """The commit that a branch, tag, ``HEAD~3`` or hash names.

    Raises
    ------
    TurnError
        If git is not there, this is no git checkout, or it has no such commit.
    """
    git(repository, "rev-parse", "--git-dir")
    try:
        return git(
            repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"
        )
    except TurnError:
        raise TurnError(f"a revision must name a commit of {repository}, got {revision!r}") from None


@contextmanager
def worktree(repository: Path, commit: str, folder: Path) -> Iterator[Path]:
    """Check a commit out into a new folder, and forget it again, whatever happens in between."""
    git(repository, "worktree", "add", "--quiet", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        git(repository, "worktree", "remove", "--force", str(folder))


def is_checkout(what: str) -> bool:
    """Whether this is a folder with the package in it, and not a revision."""
    return bool(what) and (Path(what) / "sparselab").is_dir()


@contextmanager
def checkout(repository: Path, what: str, folder: Path) -> Iterator[Path]:
    """A folder as it is, or a revision of the repository, checked out into a new folder."""
    if is_checkout(what):
        yield Path(what).resolve()
    else:
        with worktree(repository, commit_of(repository, what), folder) as tree:
            yield tree


@contextmanager
def start(name: str, tree: Path, folder: Path, threads: int) -> Iterator[Driver]:
    """A driver that has imported sparselab from a checkout.

    Raises
    ------
    TurnError
        If it imports another one, or none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"PYTHONPATH": str(tree), "SPARSELAB_CACHE_DIR": str(folder / "cache")}
    with turns.start(name, "this_sparselab", folder / "run", threads, environment=environment) as driver:
        origin = driver.ask("begin", threads=threads)["file"]
        if tree.resolve() not in Path(origin).resolve().parents:
            raise TurnError(f"{name}: sparselab was imported from {origin}, not from {tree}")
        yield driver


def run(
    revisions: Sequence[str],
    works: Iterable[Work],
    threads: int,
    n_turns: int,
    calls: int,
    repository: Path = ROOT,
) -> list[tuple[Work, Timings]]:
    """Time several revisions in turns, each in a process of its own.

    Parameters
    ----------
    revisions : sequence of str
        What git knows a commit by, without uncommitted changes; or folders, as they are. The same one twice
        shows the noise.
    works : iterable of Layer or Model
    threads : int
        Threads of each process; only one process works at a time.
    n_turns, calls : int
        As of `Contest.time`.
    repository : Path

    Returns
    -------
    list of (Layer or Model, Timings)
        Milliseconds, by operation and by place in `revisions` and name: "1 main", "2 HEAD".

    Raises
    ------
    TurnError
        If git fails, or a revision cannot be run or computes something else than expected.
    """
    for revision in revisions:
        if not is_checkout(revision):
            commit_of(repository, revision)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        drivers = {}
        for place, revision in enumerate(revisions, start=1):
            tree = stack.enter_context(checkout(repository, revision, folder / f"tree-{place}"))
            name = f"{place} {revision}"
            drivers[name] = stack.enter_context(start(name, tree, folder / str(place), threads))
        return [(work, work.compare(drivers, folder, n_turns, calls)) for work in works]


@dataclass(frozen=True)
class Row:
    """One operation of one case: medians in milliseconds, and how many times the first the second is."""

    group: str
    work: Work
    operation: str
    first: Timing
    second: Timing

    @property
    def ratio(self) -> float:
        """The second revision's median over the first's."""
        return self.second.median / self.first.median

    @property
    def verdict(self) -> str:
        """Empty unless the second revision is slower by more than `SLOWER` allows."""
        return f"slower by {self.ratio - 1:.0%}" if self.ratio > SLOWER else ""


def as_rows(group: str, results: Iterable[tuple[Work, Timings]]) -> list[Row]:
    """One row for each operation of what `run` returned for two revisions."""
    rows = []
    for work, timings in results:
        for operation, row in timings.items():
            first, second = row.values()
            assert isinstance(first, Timing)
            assert isinstance(second, Timing)
            rows.append(Row(group, work, operation, first, second))
    return rows


def report(options: Namespace, console: Console) -> list[dict[str, Any]]:
    """The subcommand: run, print a table; returns the rows for ``--json``."""
    known = groups(options.sparsity)
    chosen = {name: known[name] for name in options.cases}
    if options.shapes:
        chosen = {"layers": [Layer(case) for case in turns.cases(options.shapes, options.sparsity)]}
    group_of = {work: name for name, works in chosen.items() for work in works}
    results = run(options.revisions, group_of, options.threads, options.turns, options.calls)
    rows = [row for work, timings in results for row in as_rows(group_of[work], [(work, timings)])]
    print_table(rows, options.revisions, console)
    return [
        {
            "group": row.group, "case": str(row.work), "operation": row.operation, "ratio": row.ratio,
            "slower": bool(row.verdict), "timings_ms": plain_timings({"1": row.first, "2": row.second}),
        }
        for row in rows
    ]  # fmt: skip


def print_table(rows: Sequence[Row], revisions: Sequence[str], console: Console) -> None:
    """All rows, the geometric mean of each group, and how many are slower."""
    table = Table(title="milliseconds, median, and time of the second revision over that of the first")
    for column in ("case", "operation"):
        table.add_column(column)
    for column in (*(f"{place} {revision}" for place, revision in enumerate(revisions, start=1)), "ratio"):
        table.add_column(column, justify="right")
    table.add_column(f"slower by more than {SLOWER - 1:.0%}")
    for row in rows:
        times = (f"{timing.median:.3f}" for timing in (row.first, row.second))
        table.add_row(str(row.work), row.operation, *times, f"{row.ratio:.2f}", row.verdict)
    console.print(table)
    for group in dict.fromkeys(row.group for row in rows):
        mean = math.exp(statistics.fmean(math.log(row.ratio) for row in rows if row.group == group))
        console.print(f"{group}: {mean:.2f} times the time of {revisions[0]} (geometric mean)")
    slower = sum(bool(row.verdict) for row in rows)
    console.print(f"{slower} of {len(rows)} are slower by more than {SLOWER - 1:.0%}")
