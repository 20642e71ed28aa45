"""SRigL: every output with the same number of connections, and outputs that matter little with none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from sparselab.dst.budget.rows import rows_of
from sparselab.dst.checks import require_finite
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.parts.dense_gradient import (
    GradientCollector,
    GradientSummary,
    PassCount,
    summarise,
)
from sparselab.dst.parts.drop import Magnitude, lowest
from sparselab.dst.parts.grow import GradientGrowth
from sparselab.dst.parts.view import LayerView
from sparselab.dst.schedules.schedule import Schedule
from sparselab.kernels.arrays import Array, n_connections, slot_dtype
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.kernels.rewiring.positions import kept_positions
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
    gamma_sal : float
        Salient positions that an output needs: this many if at least 1, else
        ``max(1, int(gamma_sal * (B // out_features)))``. The need is lowered as far as it takes to leave
        more than ``B // in_features`` outputs, since fewer could not hold the budget. 0 never ablates. The
        paper has 0.3 for convolutional networks and 0.95 for transformers.
    ablate : bool
        False never ablates either.
    exempt_last : bool
        Never ablate outputs of the layer attached last, which usually are the model's outputs.
    grad_accumulation : int
        Backward passes per optimizer step; G is the sum over them.
    settings
        Those of `DynamicSparsityAlgorithm`, except `drop`, `grow`, `scope` and `redistribute`.

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
    >>> algorithm = SRigL(sparsity=0.9, update=10)
    >>> handle = algorithm.attach(constant_fan_in_(model), optimizer)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 64)).square().mean().backward()
    ...     optimizer.step()
    >>> model[2].indptr.diff().unique().tolist(), algorithm.ablated_rows()[1].tolist()
    ([3], [])
    """

    _OF_BLOCKS = False

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        gamma_sal: float = 0.3,
        ablate: bool = True,
        exempt_last: bool = True,
        grad_accumulation: int = 1,
        **settings: Any,
    ) -> None:
        if isinstance(sparsity, Schedule):
            raise TypeError("sparsity must be a number or None for SRigL, whose layers keep a budget")
        require_finite("gamma_sal", gamma_sal)
        if gamma_sal < 0:
            raise ValueError(f"gamma_sal must be at least 0; got {gamma_sal!r}")
        growth = FanInGrowth(self._decide, grad_accumulation)
        self._fan_in = growth
        super().__init__(sparsity, drop=Magnitude(), grow=growth, scope="row", **settings)
        self.gamma_sal = gamma_sal
        self.ablate = ablate
        self.exempt_last = exempt_last
        self._budgets: list[int] = []

    def ablated_rows(self) -> list[Array]:
        """Outputs without a connection now, ascending, one array for each attached layer."""
        return [np.flatnonzero(as_matrix(layer).row_nnz == 0) for layer in self._layers]

    def _budget(self, layer: SparseLayer) -> int:
        sparsity = cast("float | None", self.sparsity)
        return layer.nnz if sparsity is None else n_connections(layer.shape, sparsity)

    def _check_sparsity(self, layer: SparseLayer) -> None:
        row_nnz = as_matrix(layer).row_nnz
        budget = self._budget(layer)
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

    def _attached(self, layer: SparseLayer) -> None:
        self._budgets.append(self._budget(layer))
        super()._attached(layer)

    def _may_ablate(self, index: int) -> bool:
        last = index == len(self._layers) - 1
        return bool(self.ablate and self.gamma_sal and not (last and self.exempt_last))

    def _most_growth(self, step: int, index: int) -> int | Array:
        """How many of the largest gradients are salient; or the fan-in of each row where that is known."""
        layer = self._layers[index]
        rows = layer.shape[0]
        if self._may_ablate(index):
            return int(self._fraction(step) * layer.nnz)
        return np.full(rows, self._budgets[index] // rows)

    def _decide(self, index: int, salient: Array) -> Array:
        """Fan-in of every row, from how many salient positions it has."""
        budget = self._budgets[index]
        rows, columns = self._layers[index].shape
        need = self.gamma_sal if self.gamma_sal >= 1 else max(1, int(self.gamma_sal * (budget // rows)))
        least = budget // columns
        # With fewer than budget / columns rows the fan-in would exceed the columns.
        need = min(need, np.sort(salient)[::-1][least]) if least < rows else 0
        active = salient >= need
        fan_in: Array = np.where(active, budget // np.count_nonzero(active), 0)
        return fan_in

    def _row_goal(self, view: LayerView, step: int) -> Array:
        return self._fan_in.fan_in(view.index)

    def _row_kept(self, view: LayerView, step: int, goal: Array) -> Array:
        scores, indptr = self.drop(view), view.matrix.indptr
        scores[np.repeat(goal == 0, view.matrix.row_nnz)] = -np.inf
        dropped = lowest(scores, int(self._fraction(step) * view.nnz))
        kept: Array = np.minimum(view.matrix.row_nnz - rows_of(dropped, indptr), goal)
        return kept

    def _config(self) -> dict[str, Any]:
        own = {"gamma_sal": self.gamma_sal, "ablate": self.ablate, "exempt_last": self.exempt_last}
        return {**super()._config(), **own}

    def _memory(self) -> dict[str, Any]:
        return {**super()._memory(), "budgets": list(self._budgets)}

    def _remember(self, memory: dict[str, Any]) -> None:
        super()._remember(memory)
        self._budgets = list(memory["budgets"])


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

    def _form(self, layer: SparseLayer, operands: Sequence[GradientOperands]) -> GradientSummary:
        W, dtype = as_matrix(layer), layer.stored.dtype
        k = self._most()
        if not isinstance(k, np.ndarray):
            summary = summarise(operands, W, layer.shape, k, dtype)
            if not summary.finite:
                return summary
            weights = magnitudes(layer) if self._magnitudes is None else self._magnitudes
            k = self._decide(salient_per_row(W, weights, summary, k))
        self.fan_in = k
        return summarise(operands, W, layer.shape, k, dtype)


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
