"""This sparselab beside two other packages that train sparse layers on CPUs, on the same inputs.

One is the other project named sparselab, so both live in an environment of their own, never in this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import sparselab
from benchmarks import turns
from benchmarks.turns import Timings, TurnError
from sparselab.bench.contenders.linear import Case

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = Path(".venv-peers")

#: Contender of `benchmarks/driver.py`, requirement, and what the table calls it.
PEERS = {
    "other_sparselab": ("sparselab==0.2.2", "peer sparselab 0.2.2"),
    "sparseprop": ("sparseprop==0.1.14", "SparseProp 0.1.14"),
}
#: The same torch on both sides; SparseProp's metadata leaves torch out, and builds with pybind11.
SHARED = (f"torch=={torch.__version__.split('+')[0]}", "numpy", "scipy", "setuptools", "pybind11")


def python_of(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run_quietly(command: Sequence[str | Path], folder: Path | None = None) -> str:
    """Standard output of a command.

    Raises
    ------
    TurnError
        If it cannot be started or fails; the message is its last line that names an error.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise TurnError(f"{command[0]} cannot be started: {error}") from None
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or [f"exit status {done.returncode}"]
        raise TurnError(
            next((line for line in reversed(lines) if "error" in line.lower()), lines[-1]).strip()
        )
    return done.stdout


def installed(python: Path, requirement: str) -> bool:
    """Whether an environment has exactly the version that a ``name==version`` asks for."""
    name, version = requirement.split("==")
    code = f"from importlib.metadata import version; assert version({name!r}).split('+')[0] == {version!r}"
    with tempfile.TemporaryDirectory() as outside:
        try:
            run_quietly([python, "-c", code], Path(outside))
        except TurnError:
            return False
    return True


def prepare(environment: Path, install: bool, say: Console) -> dict[str, str]:
    """Make the environment of the peers as far as it is not there.

    Parameters
    ----------
    environment : Path
        A virtual environment of its own; it may not exist yet.
    install : bool
        False: nothing is made or installed.
    say : Console
        Told what takes minutes.

    Returns
    -------
    dict
        Why a contender of `PEERS` cannot run, for those that cannot.

    Raises
    ------
    TurnError
        If the environment is that of this process, is something else than a virtual environment, is absent
        and must not be made, or torch cannot be installed.
    """
    environment = environment.absolute()
    if environment.resolve() == Path(sys.prefix).resolve():
        raise TurnError(
            f"--environment must not be the one this runs in ({environment}): a peer would replace sparselab"
        )
    python = python_of(environment)
    if environment.exists() and not python.exists():
        raise TurnError(f"--environment must be a virtual environment or absent, got {environment}")
    if not python.exists():
        if not install:
            raise TurnError(f"there is no environment {environment}, and --no-install forbids to make it")
        say.print(f"Making {environment}")
        run_quietly([sys.executable, "-m", "venv", environment])
    pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if install and not installed(python, SHARED[0]):
        say.print(f"Installing {', '.join(SHARED)} there (this may take minutes)")
        run_quietly([*pip, *SHARED])
    failures = {}
    for contender, (requirement, _) in PEERS.items():
        if installed(python, requirement):
            continue
        if not install:
            failures[contender] = f"{requirement} is not installed in {environment}"
            continue
        say.print(f"Installing {requirement} there")
        try:
            run_quietly([*pip, requirement])
        except TurnError as error:
            failures[contender] = f"{requirement} cannot be installed: {error}"
    return failures


def check_origin(file: str, environment: Path) -> None:
    """Refuse a package that was not imported from the environment, such as the one of this repository."""
    path = Path(file).resolve()
    own = Path(sparselab.__file__).resolve().parent
    if own in path.parents or environment.resolve() not in path.parents:
        raise TurnError(f"the peer was imported from {file}, not from {environment}")


def run(
    cases: Sequence[Case], environment: Path, threads: int, n_turns: int, calls: int, failures: dict[str, str]
) -> list[tuple[Case, Timings]]:
    """Time the layers of all packages in turns, each package in a process of its own.

    Parameters
    ----------
    cases : sequence of Case
    environment : Path
        Where the peers are installed; see `prepare`.
    threads : int
        Threads of each process; only one process works at a time.
    n_turns, calls : int
        Turns that count, and timed calls in each.
    failures : dict
        What `prepare` returned.

    Returns
    -------
    list of (Case, Timings)
        Milliseconds, by operation and by "sparselab", "dense" and the contenders of `PEERS`; a text says why
        a peer could not run.

    Raises
    ------
    TurnError
        If sparselab or dense torch fails or computes something else than expected.
    """
    own = {"sparselab": "this_sparselab", "dense": "dense"}
    failures = dict(failures)
    results = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        drivers = {}
        for name in (*own, *(name for name in PEERS if name not in failures)):
            python, path = (
                (sys.executable, {"PYTHONPATH": str(Path(sparselab.__file__).resolve().parents[1])})
                if name in own
                else (python_of(environment.absolute()), {})
            )
            try:
                driver = stack.enter_context(
                    turns.start(name, own.get(name, name), folder / name, threads, python, path)
                )
                origin = driver.ask("begin", threads=threads)["file"]
                if name in PEERS:
                    check_origin(origin, environment)
            except TurnError as error:
                if name in own:
                    raise
                failures[name] = str(error)
            else:
                drivers[name] = driver
        for case in cases:
            timings = turns.compare(case, drivers, folder, n_turns, calls, optional=PEERS)
            results.append((case, {key: {**value, **failures} for key, value in timings.items()}))
    return results


def report(options: Namespace, console: Console) -> list[dict[str, Any]]:
    """The subcommand: prepare, run, print a table; returns the rows for ``--json``."""
    cases = turns.cases(options.shapes, options.sparsity)
    failures = prepare(options.environment, not options.no_install, console)
    results = run(cases, options.environment, options.threads, options.turns, options.calls, failures)
    table = Table(title="milliseconds, median (and how many times that of this sparselab)")
    for column in ("layer", "operation"):
        table.add_column(column)
    columns = {"sparselab": "this sparselab", "dense": "dense"}
    columns.update({contender: title for contender, (_, title) in PEERS.items()})
    for title in columns.values():
        table.add_column(title, justify="right")
    reasons: dict[str, None] = {}
    for case, timings in results:
        for operation, row in timings.items():
            base = row["sparselab"]
            cells = (turns.timing_cell(row[name], None if name == "sparselab" else base) for name in columns)
            table.add_row(str(case), operation, *cells)
            reasons.update(
                {f"{columns[name]}: {why}": None for name, why in row.items() if isinstance(why, str)}
            )
    console.print(table)
    for reason in reasons:
        console.print(reason, highlight=False, markup=False)
    return [row for case, timings in results for row in turns.as_rows(case, timings)]
