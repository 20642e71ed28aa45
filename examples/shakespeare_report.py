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

COLOURS = {"dense": "#4c566a", "sparse": "#d0671b", "narrow": "#3b7ea1", "bigram": "#2a7f62"}
#: What arms are called; those that did not run are left out.
NAMES = {"dense": "dense", "narrow": "dense, as much memory", "sparse": "sparse"}
KEPT, DROPPED, GROWN = "#4c566a", "#d9a441", "#c23b22"
CORNER = 96

ROWS = [
    ("width", "width", lambda v: f"{v:,}"),
    ("parameters live", "parameters_live", lambda v: f"{v:,}"),
    ("weights, MB", "weight_bytes", lambda v: f"{v / 1e6:.2f}"),
    ("training state, MB", "training_bytes", lambda v: f"{v / 1e6:.2f}"),
    ("resident memory, MB", "resident", lambda v: f"{v / 1e6:.0f}"),
    ("  of it code, before the model", "resident_before", lambda v: f"{v / 1e6:.0f}"),
    ("resident memory, peak, MB", "resident_peak", lambda v: f"{v / 1e6:.0f}"),
    ("ms per step, median", "step_ms", lambda v: f"{v:.0f}"),
    ("steps", "steps", lambda v: f"{v:,}"),
    ("compiling or loading kernels, s", "load_s", lambda v: f"{v:.1f}"),
    ("all steps, s", "train_s", lambda v: f"{v:.1f}"),
    ("validation loss, nats", "val_loss", lambda v: f"{v:.3f}"),
]

#: Losses that differ by less are called the same.
SAME = 0.005


def show(results: dict[str, dict[str, Any]], bigram: dict[str, Any], out: Path) -> None:
    """Print samples, the table of all arms and what it says, and write the pictures into `out`."""
    console = Console()
    for arm, result in results.items():
        console.print(f"\n[bold]{NAMES[arm]}, a sample[/bold]\n{escape(result['sample'])}", highlight=False)
    console.print()
    console.print(make_table(results, bigram))
    pictures = [
        draw_losses(results, bigram, out / "loss.png"),
        draw_topology(out / "topology.npz", out / "topology.png"),
    ]
    for picture in pictures:
        console.print(f"Picture: {escape(str(picture.resolve()))}", soft_wrap=True, highlight=False)
    console.print(f"\n{sentence(results)}", soft_wrap=True, highlight=False)


def make_table(results: dict[str, dict[str, Any]], bigram: dict[str, Any]) -> Table:
    """All arms, and what a table of pair counts reaches."""
    table = Table(title=f"{results['dense']['threads']} threads")
    table.add_column("")
    arms = [arm for arm in NAMES if arm in results]
    for name in (*(NAMES[arm] for arm in arms), "bigram"):
        table.add_column(name, justify="right")
    for label, key, form in ROWS:
        shown = (form(results[arm][key]) for arm in arms)
        table.add_row(label, *shown, form(bigram[key]) if key in bigram else "")
    return table


def sentence(results: dict[str, dict[str, Any]]) -> str:
    """What the run says, in one sentence."""
    sparse = results["sparse"]
    said = [_beside(sparse, results["dense"], "the dense model of its width")]
    if "narrow" in results:
        width = results["narrow"]["width"]
        said.append(
            _beside(sparse, results["narrow"], f"a dense one of width {width}, which takes as much memory")
        )
    seconds = f"{sparse['train_s']:.0f} seconds"
    return f"In {seconds} of training the sparse model, of width {sparse['width']}, {' and '.join(said)}."


def _beside(sparse: dict[str, Any], other: dict[str, Any], name: str) -> str:
    gain = other["val_loss"] - sparse["val_loss"]
    memory = sparse["training_bytes"] / other["training_bytes"]
    share = f" with {memory:.0%} of the training memory" if memory < 0.9 else ""
    if abs(gain) < SAME:
        return f"reaches the loss of {name}{share}"
    return f"ends {abs(gain):.3f} nats {'below' if gain > 0 else 'above'} {name}{share}"


def draw_losses(results: dict[str, dict[str, Any]], bigram: dict[str, Any], path: Path) -> Path:
    """Training (thin) and validation (dots) loss against seconds, and where all end in loss and memory."""
    figure, (over_time, over_memory) = plt.subplots(
        1, 2, figsize=(11, 4.2), sharey=True, layout="constrained"
    )
    for arm, result in results.items():
        curves, colour = result["curves"], COLOURS[arm]
        seconds = np.cumsum(curves["seconds"])
        val_at = np.array(curves["val_step"])
        over_time.plot(seconds, curves["loss"], color=colour, alpha=0.35, linewidth=0.8)
        label = f"{NAMES[arm]}: validation {result['val_loss']:.3f}"
        over_time.plot(seconds[val_at - 1], curves["val_loss"], "o-", color=colour, markersize=4, label=label)
        for key, marker in (("training_bytes", "o"), ("resident_peak", "s")):
            over_memory.plot(result[key] / 1e6, result["val_loss"], marker, color=colour)
    for panel in (over_time, over_memory):
        panel.axhline(bigram["val_loss"], color=COLOURS["bigram"], linestyle="--", label="table of pairs")
        panel.grid(alpha=0.25)
    over_time.set(xlabel="seconds of training", ylabel="loss, nats per character")
    over_time.legend()
    over_memory.set(xlabel="MB at the end: training state (dots), resident at most (squares)", xscale="log")
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
