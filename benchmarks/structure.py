"""The house from outside: lines, files, floors of imports, the longest and widest functions."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.revisions import checkout
from benchmarks.source import ROOT, Function, Source, cycles, functions, graph, n_floors, read_sources
from sparselab.bench.output import tables

#: Parts of the package that are looked at apart.
PARTS = ("sparselab", "sparselab/kernels", "sparselab/nn", "sparselab/dst", "sparselab/bench", "tests")


def measure(tree: Path, part: str) -> dict[str, Any]:
    """Counts of one part of a checkout; zeros where it is not there.

    Returns
    -------
    dict
        ``files``, ``folders``, ``most_files`` (in one folder), ``lines``, ``longest_file``; ``floors`` of
        imports within the part and modules in ``circles``; the ``longest_function`` and the one with the most
        ``parameters`` that no compiler takes, each as ``[number, path::name]``.
    """
    sources = read_sources(part, root=tree)
    lengths = {source.path: len(source.text.splitlines()) for source in sources}
    folders = [source.package for source in sources]
    edges = graph(sources)
    found = [(source, each) for source in sources for each in functions(source)]
    return {
        "files": len(sources),
        "folders": len(set(folders)),
        "most_files": max((folders.count(each) for each in set(folders)), default=0),
        "lines": sum(lengths.values()),
        "longest_file": max(((n, path) for path, n in lengths.items()), default=(0, "")),
        "floors": n_floors(edges),
        "circles": sum(map(len, cycles(edges))),
        "longest_function": _most(found, lambda each: each.lines),
        "parameters": _most(
            [(source, each) for source, each in found if not each.compiled],
            lambda each: len(each.parameters),
        ),
    }


def _most(found: Sequence[tuple[Source, Function]], count: Any) -> tuple[int, str]:
    return max(((count(each), f"{source.path}::{each.name}") for source, each in found), default=(0, ""))


def report(options: Namespace, console: Console) -> list[dict[str, Any]]:
    """The subcommand: measure, print one table of all checkouts; returns the rows for ``--json``."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for what in options.checkouts:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            tree = stack.enter_context(checkout(ROOT, what, folder / "tree"))
            found[what] = {part: measure(tree, part) for part in PARTS}
    rows = [
        [part, name.replace("_", " "), *(_cell(measured[part][name]) for measured in found.values())]
        for part in PARTS
        for name in next(iter(found.values()))[part]
    ]
    console.print(tables.plain("structure", ["part", "", *found], rows, left=2), soft_wrap=True)
    return [
        {"checkout": what, "part": part, **each}
        for what, parts in found.items()
        for part, each in parts.items()
    ]


def _cell(value: int | tuple[int, str]) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    number, place = value
    return f"{number} {place.rpartition('/')[2]}"
