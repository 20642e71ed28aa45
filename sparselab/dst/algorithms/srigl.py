"""SRigL: every output with the same number of connections, and outputs that matter little with none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from sparselab.dst.budget.targets import Exchange, annealed, by_rows
from sparselab.dst.checks import require_finite
from sparselab.dst.engine.describe import setting
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.parts.agreed import Meeting, Operands
from sparselab.dst.parts.dense_gradient import GradientSummary, summarise
from sparselab.dst.parts.drop import Scores, lowest
from sparselab.dst.parts.grow import GradientGrowth
from sparselab.dst.parts.grown import GrownValue
from sparselab.dst.parts.passes import GradientCollector, PassCount
from sparselab.dst.parts.select import RowBudget, RowSelection
from sparselab.dst.schedules.schedule import Schedule
from sparselab.dst.schedules.when import UpdateSchedule
from sparselab.dst.view import LayerView, rows_of
from sparselab.kernels.arrays import Array, n_connections, slot_dtype
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.kernels.rewiring.positions import kept_positions
from sparselab.nn.follow.state_move import GrownState
from sparselab.nn.layers.base import SparseLayer, as_matrix
from sparselab.nn.ops.operands import GradientOperands
from sparselab.nn.storage.entries import as_scores

Magnitudes = npt.NDArray[np.floating[Any]]


class SRigL(DynamicSparsityAlgorithm):
    """RigL with a constant fan-in: equally many connections for every output, or none where it is ablated.

    An update of a layer with n connections drops ``int(f * n)`` of the smallest ``|w|`` and counts for every
    output its *salient* positions: those among the ``n - int(f * n)`` largest ``|w|`` or among the
    ``int(f * n)`` largest ``|G|`` of the layer, ``G = dY^T X`` (at all positions, with a weight or without).
    Outputs with too few of them are ablated: they lose all connections. The others share the layer's budget
    B, the connections it had when attached: each gets ``k = B // outputs left`` and the remainder is unused.
    An output that kept more than k loses its smallest ``|w|``; one that kept fewer grows its largest ``|G|``.

    Which outputs are ablated is decided anew by every update. An ablated one still has a gradient, so it may
    come back.

    Parameters
    ----------
    sparsity : float or None
        Says the budget of every layer, which must then have that fan-in; with None, it is what the layer has.
    drop_fraction : float, Schedule or callable
        f.
    update_freq : int, optional
        Optimizer steps between updates; 100 if `update` says nothing else.
    update : dict, list of int, or UpdateSchedule, optional
        The steps that end with an update, where a period does not say it; see `DynamicSparsityAlgorithm`.
    stop : int, optional
        The optimizer step from which on nothing is rewired. A `drop_fraction` that is a number then falls
        from it to 0 as a cosine, which ends there; without `stop` it stays, and updates go on.
    seed : int
        Nothing is drawn, unless by `grown_value`.
    gamma_sal : float
        Salient positions that an output needs: this many if at least 1, else
        ``max(1, int(gamma_sal * (B // out_features)))``. The need is lowered as far as it takes to leave
        more than ``B // in_features`` outputs, since fewer could not hold the budget. 0 never ablates. The
        paper has 0.3 for convolutional networks and 0.95 for transformers.
    ablate : bool
        False never ablates either.
    exempt_last : bool
        Never ablate outputs of the layer attached last, which usually are the model's outputs.
    grown_value, grown_state
        See `DynamicSparsityAlgorithm`.
    grad_accumulation : int
        Backward passes per optimizer step; G is the sum over them.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range. When a layer is attached: if its outputs,
        but for those without any, do not have equally many connections. `sparselab.nn.constant_fan_in_` makes
        such a layer.

    Notes
    -----
    Salient weights are those of the backward pass, where the gradient is, as in the released code, whose
    update takes the place of the optimizer step. What is dropped is ranked after the step, as in `RigL`.

    How many positions an output may grow follows from how many outputs are left, hence from the whole
    gradient. So G is formed twice within the backward pass of an update, by blocks of rows as in `RigL`: once
    to count what is salient, once to keep the k best free positions of each output left. These are at most B,
    which makes O(nnz) memory beside one block; one pass would have to keep far more of them, or its operands.
    Where nothing can be ablated, k is known and one pass is enough.

    Four departures from the released code, which its authors did not intend: weights that are exactly zero
    count as connections; outputs with too many connections lose the smallest; the last layer is in fact
    exempt; and the budget is rounded to the nearest, not down. A layer whose gradient is not finite, or that
    no backward pass reached, is left as it is.

    References
    ----------
    Lasby, Golubeva, Evci, Nica, Ioannou: "Dynamic Sparse Training with Structured Sparsity", ICLR 2024,
    section 3.

    Examples
    --------
    >>> import torch
    >>> from sparselab.dst import SRigL
    >>> from sparselab.nn import SparseLinear, constant_fan_in_
    >>> model = torch.nn.Sequential(SparseLinear(64, 32), torch.nn.ReLU(), SparseLinear(32, 10))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> algorithm = SRigL(sparsity=0.9, update_freq=10)
    >>> handle = algorithm.attach(constant_fan_in_(model), optimizer)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 64)).square().mean().backward()
    ...     optimizer.step()
    >>> model[2].indptr.diff().unique().tolist(), algorithm.ablated_rows()[1].tolist()
    ([3], [])
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        drop_fraction: float | Schedule | Callable[[int], float] = 0.3,
        update_freq: int | None = None,
        update: Mapping[str, Any] | Sequence[int] | UpdateSchedule | None = None,
        stop: int | None = None,
        seed: int = 0,
        gamma_sal: float = 0.3,
        ablate: bool = True,
        exempt_last: bool = True,
        grown_value: float | GrownValue = 0.0,
        grown_state: GrownState = "young",
        grad_accumulation: int = 1,
    ) -> None:
        budget = FanInBudget(sparsity, annealed(drop_fraction, update, stop))
        self.rows = SalientRows(budget, gamma_sal, ablate, exempt_last, grad_accumulation)
        super().__init__(
            budget,
            update_freq=update_freq,
            update=update,
            stop=stop,
            seed=seed,
            scope=RowSelection(self.rows),
            grow=self.rows.growth,
            grown_value=grown_value,
            grown_state=grown_state,
        )
        self.parts["rows"] = self.rows

    gamma_sal = setting("rows", "gamma_sal")
    ablate = setting("rows", "ablate")
    exempt_last = setting("rows", "exempt_last")

    def ablated_rows(self) -> list[Array]:
        """Outputs without a connection now, ascending, one array for each attached layer."""
        return [np.flatnonzero(as_matrix(layer).row_nnz == 0) for layer in self._layers]


class FanInBudget(Exchange):
    """As `Exchange`, of layers whose outputs have equally many connections, or none.

    Parameters
    ----------
    sparsity : float or None
    drop_fraction : float, Schedule or callable
    """

    sparsity: float | None

    def __init__(
        self, sparsity: float | None, drop_fraction: float | Schedule | Callable[[int], float]
    ) -> None:
        if isinstance(sparsity, Schedule):
            raise TypeError(
                f"sparsity must be a number or None for SRigL, whose layers keep a budget, got {sparsity!r}"
            )
        super().__init__(sparsity, drop_fraction)

    def of(self, layer: SparseLayer) -> int:
        """B, the connections that the layer may have."""
        if self.sparsity is None:
            return layer.nnz
        row_nnz, budget = as_matrix(layer).row_nnz, n_connections(layer.shape, self.sparsity)
        live, other = int(np.count_nonzero(row_nnz)), by_rows(layer, self.sparsity)
        # Rows that were rounded one by one, as those of a `FanInLinear`, say so by their length.
        rounded = live and other // live == row_nnz.max() != budget // live
        return other if rounded else budget

    def check(self, layer: SparseLayer) -> None:
        """Raise ValueError unless the outputs that are left have the fan-in that the budget allows."""
        row_nnz = as_matrix(layer).row_nnz
        budget = self.of(layer)
        if not 0 < len(row_nnz) <= budget:
            raise ValueError(
                f"SRigL needs at least one connection for each output, but a layer of shape {layer.shape} "
                f"has {budget}"
            )
        fan_in = budget // max(1, int(np.count_nonzero(row_nnz)))
        if np.any((row_nnz != 0) & (row_nnz != fan_in)) or not layer.nnz:
            raise ValueError(
                f"SRigL needs {fan_in} connections for each output, but a layer of shape {layer.shape} has "
                f"between {row_nnz.min()} and {row_nnz.max()}. Call sparselab.nn.constant_fan_in_, which "
                f"draws the connections anew, before attaching"
            )


class SalientRows(RowBudget):
    """All rows that are left get the same fan-in, and those with too little of what is salient get none.

    Parameters
    ----------
    budget : FanInBudget
    gamma_sal : float
    ablate : bool
    exempt_last : bool
    grad_accumulation : int
        See `SRigL`.

    Attributes
    ----------
    growth : FanInGrowth
        Where it grows; fan-ins are decided when the gradient is there.
    """

    def __init__(
        self, budget: FanInBudget, gamma_sal: float, ablate: bool, exempt_last: bool, grad_accumulation: int
    ) -> None:
        require_finite("gamma_sal", gamma_sal)
        if gamma_sal < 0:
            raise ValueError(f"gamma_sal must be at least 0, got {gamma_sal!r}")
        self.gamma_sal = gamma_sal
        self.ablate = ablate
        self.exempt_last = exempt_last
        self.growth = FanInGrowth(self._decide, grad_accumulation)
        self._budget = budget
        self._budgets: list[int] = []
        self._shapes: list[tuple[int, int]] = []

    def attach(self, layer: SparseLayer) -> None:
        """Take note of the layer's budget."""
        self._budgets.append(self._budget.of(layer))
        self._shapes.append(layer.shape)

    def detach(self, layers: Iterable[SparseLayer]) -> None:
        """Forget all budgets."""
        self._budgets.clear()
        self._shapes.clear()

    def counts(self, view: LayerView, scores: Scores, kept: int, total: int) -> tuple[Array, Array]:
        """Connections of each row after the drop and after the growth."""
        goal = self.growth.fan_in(view.index)
        ranked = scores.copy()
        ranked[np.repeat(goal == 0, view.matrix.row_nnz)] = -np.inf
        dropped = lowest(ranked, view.nnz - kept)
        row_kept = np.minimum(view.matrix.row_nnz - rows_of(dropped, view.matrix.indptr), goal)
        return row_kept, goal

    def most_growth(self, view: LayerView, kept: int, total: int) -> int | Array:
        """How many of the largest gradients are salient; or the fan-in of each row where that is known."""
        last = view.index == len(self._budgets) - 1
        if self.ablate and self.gamma_sal and not (last and self.exempt_last):
            return view.nnz - kept
        rows = view.grid[0]
        return np.full(rows, self._budgets[view.index] // rows)

    def _decide(self, index: int, salient: Array) -> Array:
        """Fan-in of every row, from how many salient positions it has."""
        budget = self._budgets[index]
        rows, columns = self._shapes[index]
        need = self.gamma_sal if self.gamma_sal >= 1 else max(1, int(self.gamma_sal * (budget // rows)))
        least = budget // columns
        # With fewer than budget / columns rows the fan-in would exceed the columns.
        need = min(need, np.sort(salient)[::-1][least]) if least < rows else 0
        active = salient >= need
        fan_in: Array = np.where(active, budget // np.count_nonzero(active), 0)
        return fan_in

    def state_dict(self) -> dict[str, Any]:
        """The budgets of all layers."""
        return {"budgets": list(self._budgets)}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if there is not a budget for each layer; change nothing."""
        if len(state["budgets"]) != len(self._budgets):
            raise ValueError(f"budgets must be {len(self._budgets)} numbers, got {state['budgets']!r}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the budgets."""
        self._budgets = list(state["budgets"])


class FanInGrowth(GradientGrowth):
    """By largest ``|G|`` of each row, up to a fan-in that depends on the gradient.

    Parameters
    ----------
    decide : callable
        Called with the number of the layer and the salient positions of each of its rows; returns the fan-in
        of each row.
    grad_accumulation : int
        Backward passes per optimizer step.
    """

    def __init__(self, decide: Callable[[int, Array], Array], grad_accumulation: int) -> None:
        super().__init__(grad_accumulation)
        self._decide = decide

    def fan_in(self, index: int) -> Array:
        """The fan-in decided for each row of layer number `index`, once its gradient is there."""
        collector = self._collectors[index]
        assert isinstance(collector, FanInCollector)
        return collector.fan_in

    def _collector(
        self, layer: SparseLayer, index: int, most: Callable[[], int | Array]
    ) -> GradientCollector:
        return FanInCollector(layer, most, self._passes, partial(self._decide, index))


class FanInCollector(GradientCollector):
    """A collector that forms the gradient twice: to decide on fan-ins, and to keep as many candidates.

    Attributes
    ----------
    fan_in : int array, (rows,)
        Decided once the gradient has been formed.
    """

    fan_in: Array
    needs_all = True  # for the weights of the backward pass

    def __init__(
        self,
        layer: SparseLayer,
        most: Callable[[], int | Array],
        passes: PassCount,
        decide: Callable[[Array], Array],
    ) -> None:
        self._decide = decide
        self._magnitudes: Magnitudes | None = None
        super().__init__(layer, most, passes)

    def _hold(self, operands: list[GradientOperands]) -> None:
        super()._hold(operands)
        layer = self._layer()
        if layer is not None:
            # The gradient is formed later, and the optimizer may have changed the weights by then.
            self._magnitudes = magnitudes(layer)

    def _reset(self) -> None:
        super()._reset()
        self._magnitudes = None

    def _form(self, layer: SparseLayer, operands: Operands, others: Meeting | None = None) -> GradientSummary:
        W, dtype = as_matrix(layer), layer.stored.dtype
        form = summarise if others is None else others.summarise
        k = self._most()
        if not isinstance(k, np.ndarray):
            summary = form(operands, W, layer.shape, k, dtype)
            if not summary.finite:
                return summary
            weights = magnitudes(layer) if self._magnitudes is None else self._magnitudes
            k = self._decide(salient_per_row(W, weights, summary, k))
        self.fan_in = k
        return form(operands, W, layer.shape, k, dtype)


def magnitudes(layer: SparseLayer) -> Magnitudes:
    """``|w|`` of each slot, as an array of its own."""
    return as_scores(layer.per_connection(layer.stored))


def salient_per_row(W: RowTopology, weights: Magnitudes, summary: GradientSummary, k: int) -> Array:
    """How many positions of each row are among the ``nnz - k`` largest ``|w|`` or the `k` largest ``|G|``.

    Parameters
    ----------
    W : RowTopology
        Its values are not read.
    weights : float array, (nnz,)
        ``|w|``.
    summary : GradientSummary
        Made for at least `k` positions.
    k : int

    Returns
    -------
    int array, (rows,)
    """
    rows, columns = W.shape
    positions = kept_positions(W, lowest(weights, k))
    if k:
        steep = summary.best(W, np.arange(W.nnz, dtype=slot_dtype(W.nnz)), k)
        positions = np.union1d(positions, steep)
    return np.bincount(positions // columns, minlength=rows)
