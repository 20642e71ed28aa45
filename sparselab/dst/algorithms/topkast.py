"""Top-KAST: compute with the largest weights, train a few more, and let them compete."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparselab.dst.checks import require_count
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.engine.optimizer_state import StateMove
from sparselab.dst.parts.grow import random_free
from sparselab.dst.parts.view import LayerView, UpdateReport, Vacancy
from sparselab.dst.schedules.schedule import Schedule
from sparselab.dst.schedules.when import UpdateSchedule
from sparselab.kernels.arrays import Array, n_connections
from sparselab.kernels.rewiring.select import select
from sparselab.nn.layers.base import SparseLayer
from sparselab.nn.storage.entries import as_scores

Weights = npt.NDArray[np.floating[Any]]

#: Keeps these draws apart.
_MASTER, _SAMPLE = 2, 3


class TopKAST(DynamicSparsityAlgorithm):
    """A layer stores B, the largest weights, and its output comes from A, the largest of those.

    Gradients and updates reach all of B. At an update weights outside B compete with those inside: B becomes
    the largest of all, then A the largest of B. Nothing starts anew: what enters B brings its weight along,
    and what leaves it is frozen at its own. The gradient of a layer's input comes from A, as its output does.

    Parameters
    ----------
    forward_sparsity : float
        Fraction of each layer outside A, ``1 - D`` in the paper; at least one connection is in A.
    backward_sparsity : float or None
        Fraction outside B, ``1 - D - M`` in the paper: the sparsity that every attached layer must have. None
        leaves each layer its own.
    update : int, mapping, list of int, or UpdateSchedule
        The steps that end with a refresh of B and A. (The paper finds every step as good as every 100.) With
        ``{"freq": 100, "stop": ...}`` the sets are fixed from a step on.
    seed : int
        All random draws depend on ``(seed, layer, step)`` and nothing else.
    master_bytes : int
        A layer whose weights outside B take no more than this, as a dense matrix, has them kept, and
        its refresh is exact. 0 keeps none.
    master_dtype : torch.dtype, optional
        Of weights outside B; the layer's by default. bfloat16 takes half of float32 and rounds what leaves B.
    drop_fraction : float, Schedule or callable
        For a layer too large for that: candidates drawn at a refresh, as a fraction of B.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range, or a layer has fewer connections than A.

    Notes
    -----
    Weights outside B start as those of `torch.nn.Linear`, uniform within ``1 / sqrt(in_features)``, and
    change only while they are in B. A layer above `master_bytes` does not keep them: at a refresh a few
    positions are drawn, uniformly among those outside B, each with such a weight, and compete with B. That is
    the same rule over a sample, but what leaves B is forgotten. Equal weights prefer B, then the lower
    position.

    A is the layer's `forward_mask`, which is in the ``state_dict`` of the model. The products run over all of
    B, with 0 for B outside A: the forward pass costs D + M where the paper counts D. `finish` drops B outside
    A in the end, for good.

    The paper's exploration loss is not added by itself; see `exploration_loss`. Without it, and
    without weight decay, B outside A hardly shrinks, so that little from outside enters.

    Memory: ``D + M`` of the layer and its optimizer state, beside the weights outside B where they are kept;
    a refresh takes up to three times the latter for the moment, one layer at a time.

    References
    ----------
    Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020, sections 2.1 to 2.3.

    Examples
    --------
    >>> import torch
    >>> from sparselab.dst import TopKAST
    >>> from sparselab.nn import SparseLinear
    >>> model = torch.nn.Sequential(SparseLinear(64, 32, sparsity=0.8))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> algorithm = TopKAST(0.9, 0.8, update=10)
    >>> handle = algorithm.attach(model, optimizer)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     loss = model(torch.randn(8, 64)).square().mean()
    ...     (loss + 1e-4 * algorithm.exploration_loss()).backward()
    ...     optimizer.step()
    >>> model[0].nnz, int(model[0].forward_mask.sum())
    (410, 205)
    >>> algorithm.finish()
    >>> model[0].nnz, model[0].forward_mask
    (205, None)
    """

    _OF_BLOCKS = False

    def __init__(
        self,
        forward_sparsity: float,
        backward_sparsity: float | None = None,
        update: int | Mapping[str, Any] | list[int] | tuple[int, ...] | UpdateSchedule = 100,
        seed: int = 0,
        *,
        master_bytes: int = 64 << 20,
        master_dtype: torch.dtype | None = None,
        drop_fraction: float | Schedule | Callable[[int], float] = 0.3,
    ) -> None:
        n_connections((1, 1), forward_sparsity)
        if isinstance(backward_sparsity, Schedule):
            raise TypeError(f"backward_sparsity must be a number or None; got {backward_sparsity!r}")
        if backward_sparsity is not None and backward_sparsity > forward_sparsity:
            raise ValueError(
                f"backward_sparsity must not exceed forward_sparsity, because what is trained includes what "
                f"is in use; got {backward_sparsity!r} and {forward_sparsity!r}"
            )
        if master_dtype is not None and not master_dtype.is_floating_point:
            raise ValueError(f"master_dtype must be a floating dtype; got {master_dtype}")
        super().__init__(backward_sparsity, drop_fraction, update, seed, grown_value=self._weights_entering)
        self.forward_sparsity = forward_sparsity
        self.master_bytes = require_count("master_bytes", master_bytes)
        self.master_dtype = master_dtype
        # Weights outside B, flat, and 0 inside; None until the first refresh, and for layers that keep none.
        self._masters: list[torch.Tensor | None] = []
        self._entering: dict[int, tuple[Array, torch.Tensor]] = {}

    def exploration_loss(self) -> torch.Tensor:
        """``sum over A of w^2 + sum over B outside A of w^2 / D``, over all layers, D being A's density.

        Differentiable; multiply it by the strength you want and add it to the loss, in place of weight decay
        on these layers. Since D is below 1, weights that are not in use shrink faster than those in use, and
        must get gradients that hold against it to be used.

        Returns
        -------
        torch.Tensor, ()

        Raises
        ------
        RuntimeError
            If no layer is attached.
        """
        if not self._layers:
            raise RuntimeError("exploration_loss() needs layers; attach the algorithm to a model first")
        terms = []
        for layer in self._layers:
            squares = layer.per_connection(layer.stored).square()
            if layer.forward_mask is not None:
                in_use = layer.per_connection(layer.forward_mask)
                density = self._n_forward(layer) / max(1, math.prod(layer.shape))
                squares = torch.where(in_use, squares, squares / density)
            terms.append(squares.sum())
        return torch.stack(terms).sum()

    @torch.no_grad()
    def finish(self) -> None:
        """Drop B outside A from every layer: its output stays the same, and it is never refreshed again.

        For inference, and for training on with what is left. Optimizer state follows.
        """
        moves = [self._tracker.plan_move(layer) for layer in self._layers]
        for index, (layer, move) in enumerate(zip(self._layers, moves, strict=True)):
            if layer.forward_mask is not None:
                self._masters[index] = None
                unused = (~layer.per_connection(layer.forward_mask)).nonzero().reshape(-1).cpu().numpy()
                self._rewire(Vacancy(LayerView(index, self._step, self.seed, layer), unused), move)
                layer.forward_mask = None

    def _n_forward(self, layer: SparseLayer) -> int:
        return max(min(layer.nnz, 1), n_connections(layer.shape, self.forward_sparsity))

    def _check_sparsity(self, layer: SparseLayer) -> None:
        super()._check_sparsity(layer)
        if self._n_forward(layer) > layer.nnz:
            raise ValueError(
                f"forward_sparsity={self.forward_sparsity} means {self._n_forward(layer)} connections in use "
                f"for a layer of shape {tuple(layer.shape)}, but it has {layer.nnz}; build it with more"
            )

    def _attached(self, layer: SparseLayer) -> None:
        super()._attached(layer)
        self._masters.append(None)
        if layer.forward_mask is None:
            self._choose_forward(layer)

    @torch.no_grad()
    def _choose_forward(self, layer: SparseLayer) -> None:
        largest = select(as_scores(layer.per_connection(layer.stored)), self._n_forward(layer))
        mask = torch.zeros_like(layer.stored, dtype=torch.bool)
        layer.put(mask, torch.from_numpy(largest), torch.ones(largest.size, dtype=torch.bool))
        layer.forward_mask = mask

    def _reason_to_skip(self, view: LayerView) -> str:
        return super()._reason_to_skip(view) or ("finished" if view.layer.forward_mask is None else "")

    def _plan(self, views: Sequence[LayerView], step: int) -> list[Vacancy]:
        return [self._compete(view, step) for view in views]

    def _compete(self, view: LayerView, step: int) -> Vacancy:
        """Rank the weights inside B and the candidates together."""
        positions, weights = self._candidates(view, step)
        inside, outside = as_scores(view.weights), as_scores(weights.to(view.weights.dtype))
        best = select(np.concatenate([inside, outside]), view.nnz)
        stay = np.searchsorted(best, view.nnz)
        enter = torch.from_numpy(best[stay:].astype(np.int64) - view.nnz)
        self._entering[view.index] = positions[enter.numpy()], weights[enter]
        drop = np.delete(np.arange(view.nnz, dtype=best.dtype), best[:stay])
        return Vacancy(view, drop, len(enter))

    def _candidates(self, view: LayerView, step: int) -> tuple[Array, torch.Tensor]:
        """Positions outside B that may enter it, ascending, and their weights."""
        master = self._master(view)
        if master is None:
            k = min(int(self._fraction(step) * view.nnz), view.size - view.nnz)
            positions = random_free(view.rng(_SAMPLE), view.matrix.positions(), view.size, k)
            return positions, torch.from_numpy(_dense_init(view, view.rng(_SAMPLE, 1), k))
        positions = select(as_scores(master), view.nnz)
        weights = master[torch.from_numpy(positions).long()]
        # What is inside B is 0 here.
        outside = weights != 0
        return positions[outside.numpy()], weights[outside]

    def _master(self, view: LayerView) -> torch.Tensor | None:
        dtype = self.master_dtype or view.layer.stored.dtype
        if view.size * dtype.itemsize > self.master_bytes:
            return None
        master = self._masters[view.index]
        if master is None:
            rng = np.random.default_rng([self.seed, view.index, 0, _MASTER])
            master = torch.from_numpy(_dense_init(view, rng, view.size)).to(dtype)
            master[view.layer.positions()] = 0
            self._masters[view.index] = master
        return master

    def _grow(self, vacancy: Vacancy) -> Array:
        return self._entering[vacancy.view.index][0]

    def _weights_entering(self, vacancy: Vacancy, positions: Array) -> Weights:
        weights: Weights = self._entering[vacancy.view.index][1].double().numpy()
        return weights

    def _rewire(self, vacancy: Vacancy, move: StateMove) -> UpdateReport:
        view, master = vacancy.view, self._masters[vacancy.view.index]
        if master is not None and vacancy.n_grow:
            leave = torch.from_numpy(vacancy.drop).long()
            master[view.layer.positions()[leave]] = view.weights[leave].to(master.dtype)
            master[torch.from_numpy(self._grow(vacancy)).long()] = 0
        report = super()._rewire(vacancy, move)
        self._choose_forward(view.layer)
        return report

    def _update(self, step: int) -> None:
        super()._update(step)
        self._entering.clear()

    def _config(self) -> dict[str, Any]:
        return {
            **super()._config(),
            "forward_sparsity": self.forward_sparsity,
            "master_bytes": self.master_bytes,
            "master_dtype": None if self.master_dtype is None else str(self.master_dtype),
        }

    def _memory(self) -> dict[str, Any]:
        masters = [None if master is None else master.clone() for master in self._masters]
        return {**super()._memory(), "masters": masters}

    def _remember(self, memory: dict[str, Any]) -> None:
        super()._remember(memory)
        self._masters = [None if master is None else master.clone() for master in memory["masters"]]


def _dense_init(view: LayerView, rng: np.random.Generator, n: int) -> npt.NDArray[np.float32]:
    """Weights as `torch.nn.Linear` starts with them."""
    bound = np.float32(1 / math.sqrt(max(1, view.grid[1])))
    weights: npt.NDArray[np.float32] = (2 * rng.random(n, np.float32) - 1) * bound
    return weights
