"""The losses of runs of ``gpt.py``, as a table and a picture.

python examples/gpt_report.py results/dense results/gpt --out both.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.console import Console
from rich.table import Table

mpl.use("Agg")
from matplotlib import pyplot as plt


def read_log(folder: Path) -> list[dict[str, Any]]:
    """A line for each evaluation of a run."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def show(folders: Sequence[Path], picture: Path | None = None) -> None:
    """Print a row for each run, and draw them; of one run the picture goes into its folder."""
    logs = {folder.name: log for folder in folders if (log := read_log(folder))}
    table = Table()
    for column in (
        "run", "steps", "tokens", "seconds", "tokens/s", "sparsity", "resident, GiB", "loss", "validation"
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, log in logs.items():
        last = log[-1]
        table.add_row(
            name, f"{last['step']:,}", f"{last['tokens']:,}", f"{last['seconds']:,.0f}",
            f"{last['tokens_per_second']:,.0f}", f"{last['sparsity']:.1%}",
            f"{last['resident_peak'] / 2**30:.2f}", f"{last['loss']:.3f}", f"{last['validation_loss']:.3f}",
        )  # fmt: skip
    Console().print(table)
    place = draw(logs, picture or folders[0] / "loss.png")
    Console().print(f"Picture: {place.resolve()}", soft_wrap=True, highlight=False)


def draw(logs: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Training (thin) and validation (dots) loss against steps and seconds."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for name, log in logs.items():
        for panel, x in zip(panels, ("step", "seconds"), strict=True):
            at = [line[x] for line in log]
            (drawn,) = panel.plot(at, [line["loss"] for line in log], alpha=0.4, linewidth=0.8)
            label = f"{name}, validation {log[-1]['validation_loss']:.3f}"
            validation = [line["validation_loss"] for line in log]
            panel.plot(at, validation, "o-", color=drawn.get_color(), markersize=3, label=label)
    for panel, name in zip(panels, ("steps", "seconds of training"), strict=True):
        panel.set_xlabel(name)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("loss, nats per token")
    panels[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main(options: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, help="the picture (default: loss.png in the first folder)")
    args = parser.parse_args(options)
    show(args.runs, args.out)


if __name__ == "__main__":
    main()
