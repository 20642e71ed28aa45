"""How many Python functions of the package one pass through a small layer calls: what a small layer pays."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.revisions import ROOT, checkout, start
from sparselab.bench.output import tables


def run(checkouts: list[str], threads: int, repository: Path = ROOT) -> dict[str, dict[str, int]]:
    """Calls of a forward pass of 64 tokens with gradients, and of its backward pass, by checkout.

    Parameters
    ----------
    checkouts : list of str
        Folders, or revisions of the repository.
    threads : int
    repository : Path

    Raises
    ------
    TurnError
        If a checkout is not there or cannot be run.
    """
    found = {}
    for place, what in enumerate(checkouts, start=1):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            tree = stack.enter_context(checkout(repository, what, folder / "tree"))
            driver = stack.enter_context(start(f"{place} {what}", tree, folder / "run", threads))
            found[what] = driver.ask("count")["calls"]
    return found


def report(options: Namespace, console: Console) -> list[dict[str, Any]]:
    """The subcommand: run, print a table; returns the rows for ``--json``."""
    found = run(options.checkouts, options.threads)
    rows = [[name, str(calls["forward"]), str(calls["backward"])] for name, calls in found.items()]
    title = "Python calls inside the package, 64 -> 64, 64 tokens, with gradients"
    console.print(tables.plain(title, ["checkout", "forward", "backward"], rows))
    return [{"checkout": name, **calls} for name, calls in found.items()]
