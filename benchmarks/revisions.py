"""Two revisions of this repository, timed in turns: each from its own worktree, with its own kernel cache."""

from __future__ import annotations

import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import turns
from benchmarks.turns import Timings, TurnError
from sparselab.bench.contenders.linear import Case

ROOT = Path(__file__).resolve().parents[1]


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


def run(
    revisions: Sequence[str],
    cases: Sequence[Case],
    threads: int,
    n_turns: int,
    calls: int,
    repository: Path = ROOT,
) -> list[tuple[Case, Timings]]:
    """Time the layers of several revisions in turns, each revision in a process of its own.

    Parameters
    ----------
    revisions : sequence of str
        What git knows a commit by; uncommitted changes are in none. The same one twice shows the noise.
    cases : sequence of Case
    threads : int
        Threads of each process; only one process works at a time.
    n_turns, calls : int
        Turns that count, and timed calls in each.
    repository : Path

    Returns
    -------
    list of (Case, Timings)
        Milliseconds, by operation and by place in `revisions` and name: "1 main", "2 HEAD".

    Raises
    ------
    TurnError
        If git fails, or a revision cannot be run or computes something else than expected.
    """
    commits = [commit_of(repository, revision) for revision in revisions]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        drivers = {}
        for place, (revision, commit) in enumerate(zip(revisions, commits, strict=True), start=1):
            tree = stack.enter_context(worktree(repository, commit, folder / f"tree-{place}"))
            name = f"{place} {revision}"
            environment = {"PYTHONPATH": str(tree), "SPARSELAB_CACHE_DIR": str(folder / f"cache-{place}")}
            driver = stack.enter_context(
                turns.start(name, "this_sparselab", folder / f"run-{place}", threads, environment=environment)
            )
            origin = driver.ask("begin", threads=threads)["file"]
            if tree.resolve() not in Path(origin).resolve().parents:
                raise TurnError(f"{name}: sparselab was imported from {origin}, not from {tree}")
            drivers[name] = driver
        return [(case, turns.compare(case, drivers, folder, n_turns, calls)) for case in cases]


def report(options: Namespace, console: Console) -> list[dict[str, Any]]:
    """The subcommand: run, print a table; returns the rows for ``--json``."""
    cases = turns.cases(options.shapes, options.sparsity)
    results = run(options.revisions, cases, options.threads, options.turns, options.calls)
    first, second = (f"{place} {revision}" for place, revision in enumerate(options.revisions, start=1))
    table = Table(title="milliseconds, median (and how many times that of the first revision)")
    for column in ("layer", "operation"):
        table.add_column(column)
    for column in (first, second):
        table.add_column(column, justify="right")
    for case, timings in results:
        for operation, row in timings.items():
            cells = turns.timing_cell(row[first]), turns.timing_cell(row[second], row[first])
            table.add_row(str(case), operation, *cells)
    console.print(table)
    return [row for case, timings in results for row in turns.as_rows(case, timings)]
