"""Nested sets of connections, in use and trained, for which all weights of a layer compete."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sparselab.dst.budget.targets import Budget, Exchange
from sparselab.dst.checks import require_count, require_finite
from sparselab.dst.optimizers import call_while_alive, held_ids
from sparselab.dst.part import Part
from sparselab.dst.parts.drop import Scores
from sparselab.dst.parts.grow import Growth, random_free
from sparselab.dst.parts.redistribute import Redistribution
from sparselab.dst.parts.select import Selection, UpdateContext
from sparselab.dst.schedules.schedule import Schedule
from sparselab.dst.view import LayerUpdate, LayerView
from sparselab.kernels.arrays import Array, n_connections
from sparselab.kernels.rewiring.select import select
from sparselab.nn.layers.base import SparseLayer
from sparselab.nn.storage.entries import as_scores

Weights = npt.NDArray[np.floating[Any]]

#: Keeps these draws apart.
_MASTER, _SAMPLE = 2, 3


class NestedBudget(Exchange):
    """How many connections are trained, B, and how many of them are in use, A.

    Parameters
    ----------
    sparsity, forward_sparsity : float or None
    drop_fraction : float, Schedule or callable
        See `TopKAST`.
    """

    of_blocks = False
    sparsity: float | None

    def __init__(
        self,
        sparsity: float | None,
        forward_sparsity: float | None,
        drop_fraction: float | Schedule | Callable[[int], float],
    ) -> None:
        if isinstance(sparsity, Schedule):
            raise TypeError(f"sparsity must be a number or None, got {sparsity!r}")
        super().__init__(sparsity, drop_fraction)
        if forward_sparsity is not None:
            require_finite("forward_sparsity", forward_sparsity, "a number in [0, 1], or None")
            if not (sparsity or 0) <= forward_sparsity <= 1:
                raise ValueError(
                    f"forward_sparsity must lie between sparsity and 1, because what is trained includes "
                    f"what is in use, got forward_sparsity={forward_sparsity!r} and sparsity={sparsity!r}"
                )
        self.forward_sparsity = forward_sparsity

    def n_forward(self, layer: SparseLayer) -> int:
        """Connections in use, A."""
        if self.forward_sparsity is None:
            return -(-layer.nnz // 2)
        return max(min(layer.nnz, 1), n_connections(layer.shape, self.forward_sparsity))

    def density(self, layer: SparseLayer) -> float:
        """D, the fraction of a layer that is in use."""
        return self.n_forward(layer) / max(1, math.prod(layer.shape))

    def check(self, layer: SparseLayer) -> None:
        """Raise ValueError if the layer has fewer connections than are to be in use, or others than said."""
        super().check(layer)
        if self.n_forward(layer) > layer.nnz:
            raise ValueError(
                f"forward_sparsity={self.forward_sparsity} means {self.n_forward(layer)} connections in use "
                f"for a layer of shape {tuple(layer.shape)}, but it has {layer.nnz}; build it with more"
            )

    def attach(self, layer: SparseLayer) -> None:
        """Choose A, unless the layer comes with one."""
        if layer.forward_mask is None:
            self.choose_forward(layer)

    def detach(self, layers: Iterable[SparseLayer]) -> None:
        """Let the layers compute with all they have."""
        for layer in layers:
            layer.forward_mask = None

    @torch.no_grad()
    def choose_forward(self, layer: SparseLayer) -> None:
        """Make A the largest weights of B."""
        largest = select(as_scores(layer.per_connection(layer.stored)), self.n_forward(layer))
        mask = torch.zeros_like(layer.stored, dtype=torch.bool)
        layer.put(mask, torch.from_numpy(largest), torch.ones(largest.size, dtype=torch.bool))
        layer.forward_mask = mask


class Exploration(Part):
    """Adds the gradient of the exploration loss to that of the weights, before an optimizer takes its step.

    Parameters
    ----------
    budget : NestedBudget
    exploration : float
        Strength; not negative.
    """

    def __init__(self, budget: NestedBudget, exploration: float) -> None:
        require_finite("exploration", exploration)
        if exploration < 0:
            raise ValueError(f"exploration must be at least 0, got {exploration!r}")
        self._budget = budget
        self.exploration = exploration
        self._layers: list[SparseLayer] = []
        self._called = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Hooks call what they were made for; a copy asks for its own.
        self.__dict__.update(state)
        if self._called:
            call_while_alive(self, "_add", register_optimizer_step_pre_hook)

    def attach(self, layer: SparseLayer) -> None:
        """Look after one more layer."""
        self._layers.append(layer)
        if self.exploration and not self._called:
            self._called = True
            call_while_alive(self, "_add", register_optimizer_step_pre_hook)

    def detach(self, layers: Iterable[SparseLayer]) -> None:
        """Look after none."""
        self._layers.clear()

    @torch.no_grad()
    def _add(self, optimizer: torch.optim.Optimizer) -> None:
        held = held_ids(optimizer)
        for layer in self._layers:
            weights, gradient = layer.stored, layer.stored.grad
            if gradient is None or id(weights) not in held:
                continue
            gradient.add_(weights, alpha=2 * self.exploration)
            if layer.forward_mask is not None:
                beyond = 1 / self._budget.density(layer) - 1
                gradient.add_(weights * ~layer.forward_mask, alpha=2 * self.exploration * beyond)


class Competition(Selection):
    """Weights outside B compete with those inside, and the largest of all are the next B.

    Parameters
    ----------
    budget : NestedBudget
    master_bytes : int
    master_dtype : torch.dtype or None
        See `TopKAST`.
    """

    def __init__(self, budget: NestedBudget, master_bytes: int, master_dtype: torch.dtype | None) -> None:
        if master_dtype is not None and not master_dtype.is_floating_point:
            raise ValueError(f"master_dtype must be a floating dtype, got {master_dtype}")
        self._budget = budget
        self.master_bytes = require_count("master_bytes", master_bytes)
        self.master_dtype = master_dtype
        # Weights outside B, flat, and 0 inside; from the first refresh on, of layers that keep any.
        self._masters: dict[int, torch.Tensor] = {}
        self._entering: dict[int, tuple[Array, torch.Tensor]] = {}

    def reason_to_skip(self, view: LayerView) -> str:
        """Why the layer cannot be updated now; empty if it can."""
        return "finished" if view.layer.forward_mask is None else ""

    def select(self, context: UpdateContext) -> list[LayerUpdate]:
        """What leaves B and what enters it."""
        return [
            self._compete(view, scores) for view, scores in zip(context.views, context.scores, strict=True)
        ]

    def _compete(self, view: LayerView, inside: Scores) -> LayerUpdate:
        """Rank the weights inside B and the candidates together."""
        positions, weights = self._candidates(view)
        outside = as_scores(weights.to(view.weights.dtype))
        best = select(np.concatenate([inside, outside]), view.nnz)
        stay = np.searchsorted(best, view.nnz)
        enter = torch.from_numpy(best[stay:].astype(np.int64) - view.nnz)
        self._entering[view.index] = positions[enter.numpy()], weights[enter]
        drop = np.delete(np.arange(view.nnz, dtype=best.dtype), best[:stay])
        return LayerUpdate(view, drop, len(enter))

    def _candidates(self, view: LayerView) -> tuple[Array, torch.Tensor]:
        """Positions outside B that may enter it, ascending, and their weights."""
        master = self._master(view)
        if master is None:
            k = min(self._budget.exchanged(view.step, view.nnz), view.size - view.nnz)
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
        if view.index not in self._masters:
            rng = np.random.default_rng([view.seed, view.index, 0, _MASTER])
            master = torch.from_numpy(_dense_init(view, rng, view.size)).to(dtype)
            master[view.layer.positions()] = 0
            self._masters[view.index] = master
        return self._masters[view.index]

    def enter(self, update: LayerUpdate) -> Array:
        """Positions that enter B; what leaves it is kept outside from now on."""
        view, positions = update.view, self._entering[update.view.index][0]
        if (master := self._masters.get(view.index)) is not None:
            leave = torch.from_numpy(update.drop).long()
            master[view.layer.positions()[leave]] = view.weights[leave].to(master.dtype)
            master[torch.from_numpy(positions).long()] = 0
        return positions

    def weights_entering(self, update: LayerUpdate, positions: Array) -> Weights:
        """Weights of the positions that enter B, as they were outside."""
        weights: Weights = self._entering.pop(update.view.index)[1].double().numpy()
        return weights

    def most_growth(
        self, views: Sequence[LayerView], index: int, budget: Budget, redistribute: Redistribution | None
    ) -> int | Array:
        """All of B may be replaced."""
        return views[index].nnz

    def detach(self, layers: Iterable[SparseLayer]) -> None:
        """Forget the weights outside B."""
        self._masters.clear()
        self._entering.clear()

    def state_dict(self) -> dict[str, Any]:
        """Weights outside B, by the number of their layer."""
        return {str(index): master.clone() for index, master in self._masters.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the weights outside B."""
        self._masters = {int(index): master.clone() for index, master in state.items()}


class Winners(Growth):
    """The positions that win a competition.

    Parameters
    ----------
    competition : Competition
    """

    def __init__(self, competition: Competition) -> None:
        self._competition = competition

    def choose(self, update: LayerUpdate) -> Array:
        """Those that enter B, ascending."""
        return self._competition.enter(update)


def _dense_init(view: LayerView, rng: np.random.Generator, n: int) -> npt.NDArray[np.float32]:
    """Weights as `torch.nn.Linear` starts with them."""
    bound = np.float32(1 / math.sqrt(max(1, view.grid[1])))
    weights: npt.NDArray[np.float32] = (2 * rng.random(n, np.float32) - 1) * bound
    return weights
