"""Cannistraci-Hebb training, soft rule: drop by weight and chance, grow by the paths of the topology."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.parts.drop import DropScore, RelativeImportance, Soft, lowest
from sparselab.dst.parts.grow_paths import PathGrowth
from sparselab.dst.parts.view import LayerView
from sparselab.dst.schedules.schedule import Schedule, Sigmoid
from sparselab.kernels.arrays import Array


class CHTs(DynamicSparsityAlgorithm):
    """Keep connections drawn in proportion to ``score ** T``, grow positions in proportion to CH2-L3n.

    No gradient is needed for either; see `Soft` and `PathGrowth` for the two draws.

    Parameters
    ----------
    sparsity : float, Schedule or None
        See `DynamicSparsityAlgorithm`. Where a schedule lowers the number of connections, those of least
        `prune` go first, surely; then `drop_fraction` of the others by chance.
    drop_fraction, update, seed
        See `DynamicSparsityAlgorithm`. The paper replaces 0.3 in perceptrons once an epoch, and in language
        models 0.1, falling as a cosine, every 100 steps.
    temperature : float, Schedule or callable
        T. It rises during training in the paper, for language models as ``Linear(1, 9, steps)``.
    score : DropScore, optional
        What the draw goes by: `Magnitude` by default, or `RelativeImportance`.
    prune : DropScore, optional
        What a schedule removes by; `RelativeImportance` by default.
    chains : sequence of (str, str)
        Names of two layers of which the second reads what the first puts out, unit by unit. After the drop, a
        unit between them without a connection on one side loses those on the other, too. The layers then grow
        to their number elsewhere. Nobody but the caller knows which layers these are, so none by default.
    settings
        `grown_value` and `grown_state`; see `DynamicSparsityAlgorithm`.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range; at the first update also if `chains` names a
        layer that is not attached, or two whose sizes do not meet.

    Notes
    -----
    O(nnz) memory per update; time about ``nnz * (fan_in + fan_out)``, so it is meant for high sparsity.
    Departure: the authors' program for language models grows the highest scores, also under the name of the
    soft rule; here they are drawn, as in the paper. It also treats the heads of attention apart; here a layer
    is one. A unit that is cut off still puts out its bias.

    References
    ----------
    Zhang et al., "Brain network science modelling of sparse neural networks enables Transformers and LLMs to
    perform as fully connected", NeurIPS 2025, arXiv 2501.19107.

    Examples
    --------
    >>> import torch
    >>> from sparselab.dst import CHTs, Linear
    >>> from sparselab.nn import SparseLinear
    >>> model = torch.nn.Sequential(SparseLinear(64, 32, sparsity=0.8), torch.nn.ReLU(), SparseLinear(32, 16))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> algorithm = CHTs(temperature=Linear(1, 9, steps=10), update=2, chains=[("0", "2")])
    >>> handle = algorithm.attach(model, optimizer)
    >>> for _ in range(2):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 64)).square().mean().backward()
    ...     optimizer.step()
    >>> [report.nnz for report in algorithm.last_update]
    [410, 51]
    """

    _SCOPES = ("layer",)

    def __init__(
        self,
        sparsity: float | Schedule | None = None,
        drop_fraction: Any = 0.3,
        update: Any = 100,
        seed: int = 0,
        *,
        temperature: float | Schedule | Callable[[int], float] = 1.0,
        score: DropScore | None = None,
        prune: DropScore | None = None,
        chains: Sequence[tuple[str, str]] = (),
        **settings: Any,
    ) -> None:
        super().__init__(
            sparsity,
            drop_fraction,
            update,
            seed,
            drop=Soft(score, temperature),
            grow=PathGrowth(),
            **settings,
        )
        self.prune = RelativeImportance() if prune is None else prune
        self.chains = [(before, after) for before, after in chains]

    def _drop(self, views: Sequence[LayerView], step: int) -> list[Array]:
        drops = [self._drop_of_layer(view, step) for view in views]
        for before, after in self._linked(views):
            reading = _reached(views[after], drops[after], axis=1)
            drops[before] = _without_ends(views[before], drops[before], 0, reading)
            written = _reached(views[before], drops[before], axis=0)
            drops[after] = _without_ends(views[after], drops[after], 1, written)
        return drops

    def _drop_of_layer(self, view: LayerView, step: int) -> Array:
        kept, total = self._targets(step, view.nnz, view.size)
        scores = self.drop(view)
        if total < view.nnz:
            scores[lowest(self.prune(view), view.nnz - total)] = -np.inf
        return lowest(scores, view.nnz - kept)

    def _linked(self, views: Sequence[LayerView]) -> list[tuple[int, int]]:
        """The chains by number of view; without those of which a layer is not being updated."""
        names = self.names
        numbers = {names[view.index]: number for number, view in enumerate(views)}
        found = []
        for before, after in self.chains:
            if missing := {before, after} - set(names):
                raise ValueError(f"chains must name attached layers {names}, got {sorted(missing)}")
            shapes = [self._layers[names.index(name)].shape for name in (before, after)]
            if shapes[0][0] != shapes[1][1]:
                raise ValueError(
                    f"chains must join layers where the second reads the first, got {before!r} with "
                    f"{shapes[0][0]} outputs and {after!r} with {shapes[1][1]} inputs"
                )
            if before in numbers and after in numbers:
                found.append((numbers[before], numbers[after]))
        return found

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "prune": self.prune.describe(), "chains": [list(c) for c in self.chains]}


class CHTss(CHTs):
    """`CHTs` that starts at half the connections, or another sparsity, and gives them up along a sigmoid.

    Parameters
    ----------
    sparsity : float
        The sparsity reached in the end.
    steps : int
        The step from which on it is reached; the authors take four fifths of the training.
    init : float
        The sparsity at first, which the layers should have.
    steepness : float
        Of the sigmoid; see `Sigmoid`.
    settings
        See `CHTs`.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range.

    References
    ----------
    As `CHTs`.

    Examples
    --------
    >>> CHTss(0.99, steps=8000).sparsity
    Sigmoid(init=0.5, final=0.99, steps=8000, steepness=6, start=0)
    """

    def __init__(
        self, sparsity: float, steps: float, *, init: float = 0.5, steepness: float = 6, **settings: Any
    ) -> None:
        for name, value in (("sparsity", sparsity), ("init", init)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {value!r}")
        super().__init__(Sigmoid(init, sparsity, steps, steepness), **settings)


def _ends(view: LayerView, axis: int) -> Array:
    """Row (axis 0) or column (axis 1) of each slot."""
    ends: Array = np.divmod(view.matrix.positions(), view.grid[1])[axis]
    return ends


def _reached(view: LayerView, drop: Array, axis: int) -> Array:
    """bool: which rows (axis 0) or columns (axis 1) keep a connection."""
    reached = np.zeros(view.grid[axis], np.bool_)
    reached[np.delete(_ends(view, axis), drop)] = True
    return reached


def _without_ends(view: LayerView, drop: Array, axis: int, alive: Array) -> Array:
    """The slots to drop, and those whose row (axis 0) or column (axis 1) is not alive; ascending."""
    dropped = ~alive[_ends(view, axis)]
    dropped[drop] = True
    return np.flatnonzero(dropped)
