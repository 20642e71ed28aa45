"""Command line: ``python -m benchmarks memory``. Speed is ``python -m sparselab bench``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory
from sparselab.bench import machine, tables


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    commands = parser.add_subparsers(dest="command", required=True)
    bytes_of = commands.add_parser("memory", help="bytes and resident set of training steps")
    bytes_of.add_argument("--sparsity", type=float, nargs="+", default=[0.7, 0.9, 0.95])
    return parser.parse_args()


def run_memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    found = memory.run(options.sparsity, options.threads)
    dense = found[0]
    rows = []
    for row in found:
        name = row["arm"] if row["arm"] == "dense" else f"sparse {row['sparsity']:.0%}"
        shares = (
            f"{row[key] / 2**20:.1f} ({row[key] / dense[key]:.0%})"
            for key in ("weight_bytes", "training_bytes", "rss_growth")
        )
        rows.append([name, *shares])
    tables.show(
        "MiB after three AdamW steps (and share of dense)",
        ["arm", "weights", "training state", "resident set growth"],
        rows,
    )
    return found


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    description = machine.describe()
    print(", ".join(f"{key} {value}" for key, value in description.items()))
    rows = {"memory": run_memory}[options.command](options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": description, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
