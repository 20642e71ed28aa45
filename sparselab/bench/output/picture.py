"""The benchmark as a picture. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparselab.bench.contenders.linear import OURS, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: File types that can be drawn.
SUFFIXES = (".pdf", ".png", ".svg")

_COLOURS = ("#0072b2", "#d55e00", "#e69f00", "#999999", "#009e73", "#cc79a7")


def draw(
    path: Path, title: str, results: Sequence[Result], density: Sequence[Result], size: Sequence[Result]
) -> None:
    """Draw times as bars, one panel for each operation; below, where given, time against density and size.

    Parameters
    ----------
    path : Path
        Where to write; the suffix, one of `SUFFIXES`, says how.
    title : str
    results : sequence of Result
    density, size : sequence of Result
        The same operations at several densities, and at several sizes of the layer; both may be empty.

    Raises
    ------
    ModuleNotFoundError
        If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    operations = list(dict.fromkeys(result.operation for result in results))
    rows = 2 if density else 1
    columns = max(len(operations), 2 if density else 1)
    bars = len(results) / len(operations) * len(results[0].timings)
    height = 1.5 + 0.22 * bars
    figure = Figure(
        figsize=(6.5 * columns, height + 4.5 * (rows - 1)),
        layout="constrained",
    )
    grid = figure.add_gridspec(rows, columns, height_ratios=[height, 4.5][:rows])
    figure.suptitle(title, fontsize="medium")
    for k, name in enumerate(operations):
        _bars(figure.add_subplot(grid[0, k]), name, [each for each in results if each.operation == name])
    if density:
        _lines(
            figure.add_subplot(grid[1, 0]),
            density,
            lambda result: 100 * result.case.nnz / (result.case.in_features * result.case.out_features),
            "density, %",
        )
        _lines(
            figure.add_subplot(grid[1, 1]),
            size,
            lambda result: result.case.nnz,
            f"live weights at {100 * size[0].case.sparsity:.4g}% sparsity",
        )
    figure.savefig(path)


def _bars(axes: Axes, title: str, results: Sequence[Result]) -> None:
    everyone = list(results[0].timings)
    names = [name for name in everyone if any(result.median(name) for result in results)]
    thickness = 0.8 / max(len(names), 1)
    for k, name in enumerate(names):
        places = [row + k * thickness for row in range(len(results))]
        times = [result.median(name) or 0.0 for result in results]
        bars = axes.barh(places, times, 0.95 * thickness, label=name, color=_colour(everyone, name))
        labels = [_label(result, name) for result in results]
        axes.bar_label(bars, labels, padding=2, fontsize="x-small")
    several = len({result.threads for result in results}) > 1
    axes.set_yticks(
        [row + 0.8 / 2 - thickness / 2 for row in range(len(results))],
        [f"{result.case}" + (f", threads: {result.threads}" if several else "") for result in results],
        fontsize="small",
    )
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set(title=title, xlabel="ms")
    if names:
        axes.legend(fontsize="small")


def _colour(names: Sequence[str], name: str) -> str:
    """The same for a contender in every panel, also where another was not timed."""
    return _COLOURS[list(names).index(name) % len(_COLOURS)]


def _label(result: Result, name: str) -> str:
    median, ratio = result.median(name), result.ratio(name)
    if median is None:
        return ""
    return f"{median:.2f}" if name == OURS or ratio is None else f"{median:.2f} ({ratio:.1f}x)"


def _lines(axes: Axes, results: Sequence[Result], x: Callable[[Result], float], label: str) -> None:
    """Double logarithmic, so that time in proportion to live weights is a line at 45 degrees."""
    series = dict.fromkeys((name, result.operation) for result in results for name in result.timings)
    operations = list(dict.fromkeys(result.operation for result in results))
    names = list(results[0].timings)
    for name, operation in series:
        points = [
            (x(result), median)
            for result in results
            if result.operation == operation and (median := result.median(name)) is not None
        ]
        if points:
            axes.plot(
                *zip(*sorted(points), strict=True),
                marker="o",
                markersize=4,
                linestyle=("-", "--", ":")[operations.index(operation) % 3],
                color=_colour(names, name),
                label=f"{name}, {operation}",
            )
    ours = [result for result in results if result.operation == operations[-1] and result.median(OURS)]
    if ours:
        ends = [min(map(x, ours)), max(map(x, ours))]
        last = max(ours, key=x)
        line = [(last.median(OURS) or 0.0) * end / ends[1] for end in ends]
        axes.plot(ends, line, color="#999999", linewidth=0.8, label="in proportion to live weights")
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ms")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend(fontsize="x-small")
