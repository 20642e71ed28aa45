"""Command line: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import linear, machine, memory, models, peers, revisions
from benchmarks.timing import Timing
from benchmarks.turns import TurnError


def parse_shape(text: str) -> tuple[int, int, int]:
    try:
        in_features, out_features, tokens = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected INxOUTxTOKENS such as 768x3072x2048, got {text!r}"
        ) from None
    return in_features, out_features, tokens


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    commands = parser.add_subparsers(dest="command", required=True)
    layer = commands.add_parser("linear", help="time one layer beside dense torch and torch.sparse_csr")
    layer.add_argument(
        "--shapes", type=parse_shape, nargs="+", default=linear.SHAPES, metavar="INxOUTxTOKENS"
    )
    layer.add_argument("--sparsity", type=float, nargs="+", default=[0.9])
    layer.add_argument("--rounds", type=int, default=21)
    layer.add_argument("--operations", nargs="+", choices=linear.OPERATIONS, default=list(linear.OPERATIONS))
    layer.add_argument("--contenders", nargs="+", choices=linear.CONTENDERS, default=list(linear.CONTENDERS))
    bytes_of = commands.add_parser("memory", help="bytes and resident set of training steps")
    bytes_of.add_argument("--sparsity", type=float, nargs="+", default=[0.7, 0.9, 0.95])
    add_models(commands)
    add_turns(commands)
    return parser.parse_args()


def add_models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    whole = commands.add_parser("models", help="time training steps of transformers, dense and sparse")
    whole.add_argument("--models", nargs="+", choices=models.SIZES, default=list(models.SIZES))
    whole.add_argument("--rounds", type=positive, default=21)
    whole.add_argument("--batch", type=positive, help="texts per step (default: 16 for 10M, 8 for 40M)")
    whole.add_argument("--context", type=positive, help="tokens per text (default: 128)")
    whole.add_argument("--fused", action="store_true", help="torch's fused AdamW in both arms")


def add_turns(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    others = commands.add_parser("peers", help="time one layer beside two peer packages")
    others.add_argument(
        "--environment", type=Path, default=peers.ENVIRONMENT, metavar="DIR",
        help="virtual environment of the peers, made when absent (default: %(default)s)",
    )  # fmt: skip
    others.add_argument("--no-install", action="store_true", help="neither make it nor install anything")
    two = commands.add_parser("revisions", help="time one layer in two revisions of this repository")
    two.add_argument("revisions", nargs=2, metavar="REVISION", help="such as main, HEAD~3 or a hash")
    for command in (others, two):
        command.add_argument(
            "--shapes", type=parse_shape, nargs="+", default=linear.SHAPES, metavar="INxOUTxTOKENS"
        )
        command.add_argument("--sparsity", type=fraction, nargs="+", default=[0.9])
        command.add_argument("--turns", type=positive, default=7, help="turns of each (default: %(default)s)")
        command.add_argument("--calls", type=positive, default=5, help="per turn (default: %(default)s)")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 up to, not including, 1, got {text!r}")
    return value


def run_linear(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    table = Table(title="milliseconds, median (and how many times faster sparselab is)")
    for column in ("layer", "operation", *options.contenders):
        table.add_column(column, justify="left" if column in ("layer", "operation") else "right")
    rows = []
    for shape in options.shapes:
        for sparsity in options.sparsity:
            case = linear.Case(*shape, sparsity)
            results = linear.run_case(case, options.operations, options.contenders, options.rounds)
            for operation, timings in results.items():
                table.add_row(str(case), operation, *(cell(timings, name) for name in options.contenders))
                plain = {
                    name: asdict(value) if isinstance(value, Timing) else value
                    for name, value in timings.items()
                }
                rows.append({"case": asdict(case), "operation": operation, "timings_ms": plain})
    console.print(table)
    return rows


def cell(timings: dict[str, Timing | str], name: str) -> str:
    timing, ours = timings[name], timings.get("sparselab")
    if isinstance(timing, str):
        return "cannot run"
    if name == "sparselab" or not isinstance(ours, Timing):
        return f"{timing.median:.2f}"
    return f"{timing.median:.2f} ({timing.median / ours.median:.1f}x)"


def run_memory(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    rows = memory.run(options.sparsity, options.threads)
    dense = rows[0]
    table = Table(title="MiB after three AdamW steps (and share of dense)")
    for column in ("arm", "weights", "training state", "resident set growth"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for row in rows:
        name = row["arm"] if row["arm"] == "dense" else f"sparse {row['sparsity']:.0%}"
        shares = (
            f"{row[key] / 2**20:.1f} ({row[key] / dense[key]:.0%})"
            for key in ("weight_bytes", "training_bytes", "rss_growth")
        )
        table.add_row(name, *shares)
    console.print(table)
    return rows


def main() -> None:
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    console = Console(width=150)
    description = machine.describe()
    console.print(", ".join(f"{key} {value}" for key, value in description.items()))
    commands = {
        "linear": run_linear, "memory": run_memory,
        "models": models.report, "peers": peers.report, "revisions": revisions.report,
    }  # fmt: skip
    try:
        rows = commands[options.command](options, console)
    except TurnError as error:
        raise SystemExit(f"error: {error}") from None
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": description, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
