"""The tables and the pictures of the MNIST study."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.console import Console
from rich.markup import escape
from rich.table import Table

mpl.use("Agg")
from matplotlib import pyplot as plt

# Test accuracy, %. LeNet-300-100, 100 epochs: Dettmers & Zettlemoyer, "Sparse Networks from Scratch", 2019,
# and the results in its repository. Wide: the demonstration of another CPU package, trained until nothing
# improved, its best epoch chosen by the test images.
PUBLISHED: dict[str, dict[str, dict[float, float]]] = {
    "lenet": {
        "dense": {0.0: 98.69},
        "SNFS": {0.9: 98.67, 0.95: 98.53, 0.98: 98.20, 0.99: 97.53},
        "DSR": {0.9: 98.44, 0.95: 98.32, 0.98: 98.14, 0.99: 97.54},
        "SET": {0.9: 98.39, 0.95: 98.14, 0.98: 97.74, 0.99: 95.8},
        "DeepR": {0.9: 98.19, 0.95: 98.06, 0.98: 98.21, 0.99: 94.0},
    },
    "wide": {"dense": {0.0: 98.06}, "static": {0.9: 97.45}},
}

Results = dict[str, dict[float, list[dict[str, Any]]]]


def show(runs: Sequence[dict[str, Any]], out: Path) -> None:
    """Print a table of each network and draw its picture into `out`."""
    console = Console()
    for network in dict.fromkeys(run["network"] for run in runs):
        results: Results = {}
        for run in runs:
            if run["network"] == network:
                results.setdefault(run["arm"], {}).setdefault(run["sparsity"], []).append(run)
        published = PUBLISHED.get(network, {})
        console.print(make_table(network, results, published))
        picture = draw(network, results, published, out / f"{network}.png")
        console.print(f"Picture: {escape(str(picture.resolve()))}", soft_wrap=True, highlight=False)


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation of the sample (0 for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def percent(runs: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean and standard deviation of the test accuracy in percent."""
    return mean_and_std([100 * run["accuracy"] for run in runs])


def make_table(network: str, results: Results, published: dict[str, dict[float, float]]) -> Table:
    """Arms against sparsities; a dense network is at sparsity 0."""
    some = next(iter(next(iter(results.values())).values()))[0]
    epochs = sorted(
        {run["config"]["epochs"] for cells in results.values() for runs in cells.values() for run in runs}
    )
    seeds = sorted({len(runs) for cells in results.values() for runs in cells.values()})
    table = Table(
        title=f"{network}: test accuracy, %, after {' to '.join(map(str, epochs))} epochs; "
        f"seeds: {' to '.join(map(str, seeds))}, threads: {some['threads']}"
    )
    sparsities = sorted({sparsity for cells in results.values() for sparsity in cells})
    table.add_column("")
    for sparsity in sparsities:
        table.add_column(f"{sparsity:.0%}" if sparsity else "dense", justify="right")
    table.add_column("s per run", justify="right")
    for arm, cells in results.items():
        texts = []
        for sparsity in sparsities:
            mean, std = percent(cells[sparsity]) if sparsity in cells else (0.0, 0.0)
            spread = f" ±{std:.2f}" if len(cells.get(sparsity, ())) > 1 else ""
            texts.append(f"{mean:.2f}{spread}" if sparsity in cells else "")
        seconds = statistics.fmean(run["seconds"] for runs in cells.values() for run in runs)
        table.add_row(arm, *texts, f"{seconds:.0f}")
    table.add_section()
    for name, row in published.items():
        cells_ = [f"{row[sparsity]:.2f}" if sparsity in row else "" for sparsity in sparsities]
        if any(cells_):
            table.add_row(f"published {name}", *cells_, "", style="dim")
    return table


def draw(network: str, results: Results, published: dict[str, dict[float, float]], path: Path) -> Path:
    """Accuracy against sparsity: our arms solid with their spread over seeds, published ones dashed."""
    places = sorted({sparsity for cells in results.values() for sparsity in cells if sparsity})
    figure, panel = plt.subplots(figsize=(8, 5), layout="constrained")
    for arm, cells in results.items():
        if 0.0 in cells:
            mean, _ = percent(cells[0.0])
            panel.axhline(mean, color="black", linewidth=1, label=f"{arm}, {mean:.2f}")
            continue
        at = [place for place in places if place in cells]
        means, stds = zip(*(percent(cells[place]) for place in at), strict=True)
        panel.errorbar([places.index(place) for place in at], means, stds, marker="o", capsize=3, label=arm)
    for name, row in published.items():
        at = [place for place in places if place in row]
        if at:
            panel.plot(
                [places.index(place) for place in at],
                [row[place] for place in at],
                "x--",
                linewidth=0.8,
                alpha=0.7,
                label=f"published {name}",
            )
    panel.set_xticks(range(len(places)), [f"{place:.0%}" for place in places])
    panel.set(xlabel="sparsity", ylabel="test accuracy, %", title=network)
    panel.grid(alpha=0.25)
    panel.legend(ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
