"""Who gives and who gets: which connections each layer loses, and how many it grows."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sparselab.dst.budget.allocate import apportion
from sparselab.dst.budget.rows import apportion_rows
from sparselab.dst.budget.targets import Budget
from sparselab.dst.part import Part
from sparselab.dst.parts.drop import Scores, lowest, lowest_of_network, lowest_of_rows
from sparselab.dst.parts.redistribute import Redistribution
from sparselab.dst.view import LayerUpdate, LayerView, total_size
from sparselab.kernels.arrays import Array


@dataclass(frozen=True, eq=False)
class UpdateContext:
    """An update as a `Selection` sees it, before anything is changed.

    Attributes
    ----------
    views : sequence of LayerView
        The layers to update: at least one.
    scores : list of float arrays, (nnz,)
        What each connection is worth, layer by layer; may be written to.
    rooms : list of int
        The most positions that the growth can choose in each layer.
    budget : Budget
        How many connections stay and come.
    redistribute : Redistribution or None
        How growth is shared among layers, if not as each of them lost.
    names : tuple of str
        Of all attached layers, by ``view.index``.
    """

    views: Sequence[LayerView]
    scores: list[Scores]
    rooms: list[int]
    budget: Budget
    redistribute: Redistribution | None = None
    names: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self.views[0].step

    def targets(self, view: LayerView) -> tuple[int, int]:
        """Connections of a layer after the drop and after the growth."""
        return self.budget.targets(self.step, view.nnz, view.size)

    def network_targets(self) -> tuple[int, int]:
        """Connections of all layers together after the drop and after the growth."""
        return _network_targets(self.views, self.budget)


class Selection(Part, abc.ABC):
    """Says which connections each layer loses, and how many it grows.

    Attributes
    ----------
    scope : {"layer", "network", "row"}
        Among which connections it ranks; with "network" they move among layers.
    """

    scope: str = "layer"

    @abc.abstractmethod
    def select(self, context: UpdateContext) -> list[LayerUpdate]:
        """What happens to each layer of ``context.views``, in their order."""

    @abc.abstractmethod
    def most_growth(
        self, views: Sequence[LayerView], index: int, budget: Budget, redistribute: Redistribution | None
    ) -> int | Array:
        """The most that layer number `index` can grow, or each of its rows.

        Growth by gradient asks within the backward pass, before anything is ranked.

        Parameters
        ----------
        views : sequence of LayerView
            Of all attached layers.
        index : int
        budget, redistribute
            As in `UpdateContext`.
        """


class DropThenShare(Selection):
    """Drop first, then share out what the budget lets grow: the frame of "layer" and "network"."""

    of_blocks = True

    def select(self, context: UpdateContext) -> list[LayerUpdate]:
        """What happens to each layer."""
        drops = self.drop(context)
        updates = [LayerUpdate(view, drop) for view, drop in zip(context.views, drops, strict=True)]
        caps = [min(u.n_free, room) for u, room in zip(updates, context.rooms, strict=True)]
        shares = self.shares(context, updates, caps)
        return [replace(update, n_grow=n) for update, n in zip(updates, shares, strict=True)]

    @abc.abstractmethod
    def drop(self, context: UpdateContext) -> list[Array]:
        """Slots that each layer loses, ascending."""

    @abc.abstractmethod
    def shares(self, context: UpdateContext, updates: list[LayerUpdate], caps: list[int]) -> list[int]:
        """How many connections each layer grows, none more than its cap."""


class LayerSelection(DropThenShare):
    """Each layer loses its own lowest scores and regrows as many, unless they are redistributed."""

    scope = "layer"

    def drop(self, context: UpdateContext) -> list[Array]:
        """Slots of the lowest scores of each layer."""
        return [
            lowest(scores, n_dropped(*context.targets(view), view.nnz, room))
            for view, scores, room in zip(context.views, context.scores, context.rooms, strict=True)
        ]

    def shares(self, context: UpdateContext, updates: list[LayerUpdate], caps: list[int]) -> list[int]:
        """Up to the total of each layer; in sum the same if they are redistributed."""
        own = [
            min(context.targets(update.view)[1] - update.n_kept, cap)
            for update, cap in zip(updates, caps, strict=True)
        ]
        if context.redistribute is None:
            return own
        return context.redistribute.checked_shares(updates, sum(own), caps)

    def most_growth(
        self, views: Sequence[LayerView], index: int, budget: Budget, redistribute: Redistribution | None
    ) -> int | Array:
        """What the budget says for the layer, or what all can give it."""
        view = views[index]
        if redistribute is not None:
            return _most_of_network(views, index, budget)
        kept, total = budget.targets(view.step, view.nnz, view.size)
        return total - kept


class NetworkSelection(DropThenShare):
    """The lowest scores of all layers go, but each layer's best; each layer regrows as many as it lost.

    Unless they are redistributed.
    """

    scope = "network"

    def drop(self, context: UpdateContext) -> list[Array]:
        """Slots of the lowest scores over all layers."""
        nnz = sum(view.nnz for view in context.views)
        k = n_dropped(*context.network_targets(), nnz, sum(context.rooms))
        return lowest_of_network(context.scores, k)

    def shares(self, context: UpdateContext, updates: list[LayerUpdate], caps: list[int]) -> list[int]:
        """In proportion to what each layer lost, or as they are redistributed."""
        # Each layer keeps a connection, which may be more than the total.
        missing = context.network_targets()[1] - sum(update.n_kept for update in updates)
        n_grow = min(max(0, missing), sum(caps))
        if context.redistribute is None:
            return apportion(n_grow, [update.drop.size for update in updates], caps)
        return context.redistribute.checked_shares(updates, n_grow, caps)

    def most_growth(
        self, views: Sequence[LayerView], index: int, budget: Budget, redistribute: Redistribution | None
    ) -> int | Array:
        """What all layers can give it."""
        return _most_of_network(views, index, budget)


class RowBudget(Part, abc.ABC):
    """How many connections each row of a layer keeps and has in the end; see `RowSelection`."""

    @abc.abstractmethod
    def counts(self, view: LayerView, scores: Scores, kept: int, total: int) -> tuple[Array, Array]:
        """Connections of each row after the drop and after the growth.

        Parameters
        ----------
        view : LayerView
        scores : float array, (nnz,)
            Read only.
        kept, total : int
            The same of the layer, as the budget has it.

        Returns
        -------
        row_kept, row_total : int64 arrays, (rows,)
        """

    @abc.abstractmethod
    def most_growth(self, view: LayerView, kept: int, total: int) -> int | Array:
        """The most that each row can grow; a number where only the gradient tells."""


class ProportionalRows(RowBudget):
    """Rows lose, and share what a schedule leaves, in proportion to the connections that they have."""

    of_blocks = True

    def counts(self, view: LayerView, scores: Scores, kept: int, total: int) -> tuple[Array, Array]:
        """Connections of each row after the drop and after the growth."""
        rows, columns = view.grid
        goal = apportion_rows(total, view.matrix.row_nnz, np.full(rows, columns))
        most = np.minimum(view.matrix.row_nnz, goal)
        return most - apportion_rows(int(most.sum()) - kept, most, most), goal

    def most_growth(self, view: LayerView, kept: int, total: int) -> int | Array:
        """What each row will grow."""
        row_kept, goal = self.counts(view, np.empty(0), kept, total)
        return goal - row_kept


class RowSelection(Selection):
    """Every row of a layer, which is an output, loses its own lowest scores.

    Parameters
    ----------
    rows : RowBudget, optional
        How many; by default `ProportionalRows`.
    """

    scope = "row"

    def __init__(self, rows: RowBudget | None = None) -> None:
        self.rows = ProportionalRows() if rows is None else rows
        self.of_blocks = self.rows.of_blocks

    def describe(self) -> str:
        """Name and settings, for comparing a saved run with the one that resumes it."""
        return f"RowSelection({self.rows.describe()})"

    def select(self, context: UpdateContext) -> list[LayerUpdate]:
        """What happens to each layer, and to each of its rows."""
        return [
            self._select(view, scores, *context.targets(view))
            for view, scores in zip(context.views, context.scores, strict=True)
        ]

    def _select(self, view: LayerView, scores: Scores, kept: int, total: int) -> LayerUpdate:
        row_kept, goal = self.rows.counts(view, scores, kept, total)
        drop = lowest_of_rows(scores, view.matrix.indptr, view.matrix.row_nnz - row_kept)
        row_grow = goal - row_kept
        return LayerUpdate(view, drop, int(row_grow.sum()), row_grow)

    def most_growth(
        self, views: Sequence[LayerView], index: int, budget: Budget, redistribute: Redistribution | None
    ) -> int | Array:
        """The most that each row can grow."""
        view = views[index]
        return self.rows.most_growth(view, *budget.targets(view.step, view.nnz, view.size))


_BY_SCOPE: dict[str, Callable[[], Selection]] = {
    "layer": LayerSelection,
    "network": NetworkSelection,
    "row": RowSelection,
}


def as_selection(scope: str | Selection, scopes: tuple[str, ...] = ("layer", "network", "row")) -> Selection:
    """The selection of a scope's name, or the selection itself.

    Raises
    ------
    ValueError
        If it is neither one nor one of the names in `scopes`.
    """
    if isinstance(scope, Selection):
        return scope
    if scope not in scopes:
        raise ValueError(f"scope must be one of {scopes}, got {scope!r}")
    return _BY_SCOPE[scope]()


def n_dropped(kept: int, total: int, nnz: int, room: int) -> int:
    """Connections that one layer, or all of them together, lose; those that cannot be replaced stay.

    Parameters
    ----------
    kept, total : int
        After the drop and after the growth, as a `Budget` has it.
    nnz : int
        Now.
    room : int
        The most that can grow.
    """
    return max(0, nnz - kept - max(0, total - kept - room))


def _network_targets(views: Sequence[LayerView], budget: Budget) -> tuple[int, int]:
    return budget.targets(views[0].step, sum(view.nnz for view in views), total_size(views))


def _most_of_network(views: Sequence[LayerView], index: int, budget: Budget) -> int:
    kept, total = _network_targets(views, budget)
    # Each layer rounds for itself, hence one more for each.
    return min(views[index].size, total - kept + len(views))
