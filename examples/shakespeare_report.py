"""The table and the pictures of the character-level example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

COLOURS = {"dense": "#4c566a", "sparse": "#d0671b", "bigram": "#2a7f62"}
KEPT, DROPPED, GROWN = "#4c566a", "#d9a441", "#c23b22"
CORNER = 96

ROWS = [
    ("parameters live", "parameters_live", lambda v: f"{v:,}"),
    ("weights, MB", "weight_bytes", lambda v: f"{v / 1e6:.2f}"),
    ("training state, MB", "training_bytes", lambda v: f"{v / 1e6:.2f}"),
    ("resident memory, MB", "resident", lambda v: f"{v / 1e6:.0f}"),
    ("  of it code, before the model", "resident_before", lambda v: f"{v / 1e6:.0f}"),
    ("resident memory, peak, MB", "resident_peak", lambda v: f"{v / 1e6:.0f}"),
    ("ms per step, median", "step_ms", lambda v: f"{v:.0f}"),
    ("compiling or loading kernels, s", "load_s", lambda v: f"{v:.1f}"),
    ("all steps, s", "train_s", lambda v: f"{v:.1f}"),
    ("validation loss, nats", "val_loss", lambda v: f"{v:.3f}"),
]


def show(results: dict[str, dict[str, Any]], bigram: dict[str, Any], out: Path) -> None:
    """Print samples and the table of both arms, and write the pictures into `out`."""
    console = Console()
    for arm, result in results.items():
        console.print(f"\n[bold]{arm}, a sample[/bold]\n{escape(result['sample'])}", highlight=False)
    console.print()
    console.print(make_table(results, bigram))
    pictures = [
        draw_losses(results, bigram, out / "loss.png"),
        draw_topology(out / "topology.npz", out / "topology.png"),
    ]
    for picture in pictures:
        console.print(f"Picture: {escape(str(picture.resolve()))}", soft_wrap=True, highlight=False)


def make_table(results: dict[str, dict[str, Any]], bigram: dict[str, Any]) -> Table:
    """Both arms, their ratio, and what a table of pair counts reaches."""
    table = Table(title=f"{results['dense']['threads']} threads")
    table.add_column("")
    for name in ("dense", "sparse", "sparse / dense", "bigram"):
        table.add_column(name, justify="right")
    for label, key, form in ROWS:
        dense, sparse = results["dense"][key], results["sparse"][key]
        ratio = "" if key in ("resident_before", "load_s") else f"{sparse / dense:.2f}"
        table.add_row(label, form(dense), form(sparse), ratio, form(bigram[key]) if key in bigram else "")
    return table


def draw_losses(results: dict[str, dict[str, Any]], bigram: dict[str, Any], path: Path) -> Path:
    """Training (thin) and validation (dots) loss of both arms, against steps and seconds."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for arm, result in results.items():
        curves = result["curves"]
        steps = np.arange(1, len(curves["loss"]) + 1)
        seconds = result["load_s"] + np.cumsum(curves["seconds"])
        val_at = np.array(curves["val_step"])
        for panel, x in zip(panels, (steps, seconds), strict=True):
            panel.plot(x, curves["loss"], color=COLOURS[arm], alpha=0.35, linewidth=0.8)
            label = f"{arm}, validation {result['val_loss']:.3f}"
            panel.plot(x[val_at - 1], curves["val_loss"], "o-", color=COLOURS[arm], markersize=4, label=label)
    for panel, name in zip(panels, ("steps", "seconds of training, compiling included"), strict=True):
        label = f"bigram table {bigram['val_loss']:.3f}"
        panel.axhline(bigram["val_loss"], color=COLOURS["bigram"], linestyle="--", label=label)
        panel.set_xlabel(name)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("loss, nats per character")
    panels[1].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def draw_topology(source: Path, path: Path) -> Path:
    """One layer before and after training: its density by blocks, and one corner in full."""
    with np.load(source) as saved:
        name, shape = str(saved["name"]), tuple(saved["shape"].tolist())
        before, after = saved["before"], saved["after"]
    kept = np.intersect1d(before, after)
    figure, panels = plt.subplots(1, 3, figsize=(12, 5.2), layout="constrained")
    images = [block_density(before, shape), block_density(after, shape)]
    top = max(image.max() for image in images)
    for panel, image, when in zip(panels, images, ("before training", "after training"), strict=False):
        drawn = panel.imshow(
            image, aspect="auto", vmin=0, vmax=top, extent=(0, shape[1], shape[0], 0), cmap="magma"
        )
        panel.set(title=when, xlabel="input", ylabel="output")
    figure.colorbar(drawn, ax=panels[1], label="density of a block")
    corner = changes(before, after, shape)[:CORNER, :CORNER]
    panels[2].imshow(
        corner, cmap=ListedColormap(["white", KEPT, DROPPED, GROWN]), vmin=0, vmax=3, interpolation="nearest"
    )
    panels[2].set(
        title=f"the first {corner.shape[0]} x {corner.shape[1]} connections", xlabel="input", ylabel="output"
    )
    counts = {"kept": len(kept), "dropped": len(before) - len(kept), "grown": len(after) - len(kept)}
    handles = [
        Patch(color=colour, label=f"{word} ({counts[word]:,} in all)")
        for word, colour in zip(counts, (KEPT, DROPPED, GROWN), strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower right", ncols=3)
    figure.suptitle(f"{name}: {shape[0]} x {shape[1]}, {len(after):,} live connections")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def block_density(positions: np.ndarray, shape: tuple[int, int], n_blocks: int = 96) -> np.ndarray:
    """Share of live connections in each of at most `n_blocks` x `n_blocks` blocks of the layer."""
    rows, columns = np.divmod(positions, shape[1])
    edges = [np.linspace(0, size, min(size, n_blocks) + 1).round() for size in shape]
    counts, _, _ = np.histogram2d(rows, columns, bins=edges)
    return counts / np.outer(np.diff(edges[0]), np.diff(edges[1]))


def changes(before: np.ndarray, after: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """0 never live, 1 kept, 2 dropped, 3 grown, as a picture of the layer's first rows and columns."""
    size = tuple(min(side, CORNER) for side in shape)
    picture = np.zeros(size, dtype=np.uint8)
    for positions, value in ((before, 2), (after, 3), (np.intersect1d(before, after), 1)):
        rows, columns = np.divmod(positions, shape[1])
        inside = (rows < size[0]) & (columns < size[1])
        picture[rows[inside], columns[inside]] = value
    return picture
