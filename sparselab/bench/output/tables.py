"""Tables as text."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from sparselab._table import aligned


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table, the first `left` columns flush left; drawn with rich on a terminal if it is there."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        _draw(title, columns, rows, left)
    else:
        print(plain(title, columns, rows, left), flush=True)


def plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The table as lines of text.

    Examples
    --------
    >>> print(plain("times", ["what", "ms"], [["dense", "12.5"], ["ours", "3.1"]]))
    <BLANKLINE>
    times
    what     ms
    dense  12.5
    ours    3.1
    """
    return "\n".join(["", title, aligned([columns, *rows], left)])


def _draw(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE)
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k < left else "right")
    for row in rows:
        table.add_row(*row)
    Console().print("", table)
