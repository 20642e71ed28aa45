"""What a monitor has recorded, as a picture. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072b2", "#d55e00", "#e69f00", "#009e73")
#: More layers than these get no legend: it would hide them.
_MOST_NAMED = 12


def draw(path: str | PathLike[str], history: Sequence[dict[str, Any]]) -> None:
    """Draw the records of `sparselab.dst.Monitor` over the steps.

    Parameters
    ----------
    path : path
    history : sequence of dict
        As in ``Monitor.history``.

    Raises
    ------
    ModuleNotFoundError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Monitor.plot needs matplotlib, which is not installed; install it, or sparselab with its "
            "'examples' extra: pip install '.[examples]'",
            name=error.name,
        ) from error

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    _totals(axes[0, 0], history, ("sparsity", "target_sparsity"), "sparsity of all layers")
    _totals(axes[0, 1], history[1:], ("dropped", "grown", "regrown"), "connections in each update")
    _totals(axes[1, 0], history, ("explored", "overlap_with_first", "survived"), "shares of all layers")
    _layers(axes[1, 1], history)
    for each in axes.flat:
        each.set_xlabel("optimizer steps")
        each.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _totals(axes: Axes, history: Sequence[dict[str, Any]], names: Sequence[str], title: str) -> None:
    for name, colour in zip(names, _COLOURS, strict=False):
        points = [(each["step"], each["total"][name]) for each in history if name in each["total"]]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), color=colour, marker=".")
    axes.set_title(title, fontsize="medium")
    if axes.lines:
        axes.legend(fontsize="small")


def _layers(axes: Axes, history: Sequence[dict[str, Any]]) -> None:
    steps = [each["step"] for each in history]
    names = list(history[0]["layers"])
    for name in names:
        axes.plot(steps, [each["layers"][name]["nnz"] for each in history], label=name, marker=".")
    axes.set_title("connections of each layer", fontsize="medium")
    axes.set_yscale("symlog")
    if len(names) <= _MOST_NAMED:
        axes.legend(fontsize="small")
