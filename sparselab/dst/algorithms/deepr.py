"""Deep rewiring: weights walk randomly with a fixed sign, and connections end where they would change it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from sparselab.dst.budget.targets import KeepCount
from sparselab.dst.checks import require_finite
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.parts.drop import DropScore, Scores, lowest, lowest_of_network
from sparselab.dst.parts.grow import RandomGrowth
from sparselab.dst.parts.redistribute import Redistribution
from sparselab.dst.parts.select import LayerSelection, NetworkSelection, UpdateContext, as_selection
from sparselab.dst.schedules.schedule import ConstantSchedule, Schedule, as_schedule
from sparselab.dst.schedules.when import UpdateSchedule, when_to_update
from sparselab.dst.view import LayerUpdate, LayerView
from sparselab.kernels.arrays import Array
from sparselab.kernels.layouts.sampling import sample_distinct
from sparselab.nn.layers.base import SparseLayer
from sparselab.nn.storage.entries import move_slots

#: Keep these draws apart from those of the growth.
_WALK, _SIGN, _SHARE = 11, 12, 13


class DeepR(DynamicSparsityAlgorithm):
    """Every connection has a sign; it ends when its weight crosses zero, and another begins at random.

    After each optimizer step the weights of all connections walk,

        ``w <- w - lr * l1 * sign + sqrt(2 * lr * temperature) * N(0, 1)``,

    and an update replaces those with ``sign * w < 0`` by as many at random positions that were empty, with
    weight 0 and a random sign. The learning rate is the optimizer's.

    Parameters
    ----------
    sparsity : float or None
        The sparsity that every attached layer must have; None leaves each layer its own.
    update_freq : int, optional
        Optimizer steps between replacements: 1, as in the paper, if `update` says nothing else. The walk goes
        on at every step.
    update : dict, list of int, or UpdateSchedule, optional
        The steps that replace connections, where a period does not say it; see `DynamicSparsityAlgorithm`.
    stop : int, optional
        The optimizer step from which on nothing is replaced, and the walk ends.
    seed : int
        All random draws depend on ``(seed, layer, step)`` and nothing else.
    scope : {"layer", "network"}
        Whether each layer replaces its own, or the new positions are drawn among all empty ones of the
        network, where every layer keeps at least one connection.
    temperature : float, Schedule or callable
        Strength of the noise; not negative. 0 draws none. The released script adds ``lr * 1e-5 * N(0, 1)``,
        which at its first learning rate, 0.5, is the default.
    l1 : float
        Pull towards zero; not negative.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range.
    RuntimeError
        By `step`, if no optimizer is known for a layer.

    Notes
    -----
    O(nnz) time on every step: one normal number for each connection, and where connections are replaced the
    layer is rewritten, too, and its plans for the products are made anew, which in most steps costs more. A
    larger `update_freq` saves that. One byte of sign per connection is kept, moved and saved.

    The first step gives each connection the sign that its weight has after it. Departures from the paper: a
    connection does not begin where one has just ended, so if more end than there are empty positions those
    that went furthest beyond zero go first; and new weights are 0, where the released code has 1e-12.
    Optimizers with momentum carry weights across zero faster than the plain gradient of the paper.

    References
    ----------
    Bellec et al., "Deep Rewiring: Training very sparse deep networks", ICLR 2018, section 2, Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from sparselab.dst import DeepR
    >>> from sparselab.nn import SparseLinear
    >>> model = torch.nn.Sequential(SparseLinear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    >>> algorithm = DeepR(sparsity=0.9, temperature=0.01)
    >>> _ = algorithm.attach(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
    >>> for _ in range(5):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 64)).square().mean().backward()
    ...     optimizer.step()
    >>> model[0].nnz, algorithm.last_update[0].grown > 0
    (205, True)
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        update_freq: int | None = None,
        update: Mapping[str, Any] | Sequence[int] | UpdateSchedule | None = None,
        stop: int | None = None,
        seed: int = 0,
        scope: Literal["layer", "network"] = "layer",
        temperature: float | Schedule | Callable[[int], float] = 2.5e-11,
        l1: float = 1e-5,
    ) -> None:
        selection = as_selection(scope, ("layer", "network"))
        self._signs = Signs()
        super().__init__(
            KeepCount(sparsity),
            update=when_to_update(update_freq, update, stop, default=1)[0],
            stop=stop,
            seed=seed,
            scope=EndedOfLayer() if selection.scope == "layer" else EndedOfNetwork(),
            drop=self._signs,
            grow=RandomGrowth(regrow=False),
            redistribute=None if selection.scope == "layer" else ByChance(),
        )
        self.temperature = as_schedule(temperature, "temperature")
        if isinstance(self.temperature, ConstantSchedule):
            self._noise(1.0, 0)
        require_finite("l1", l1)
        if l1 < 0:
            raise ValueError(f"l1 must not be negative, got {l1!r}")
        self.l1 = float(l1)

    def _noise(self, lr: float, step: int) -> float:
        """Standard deviation of the noise."""
        temperature = self.temperature(step)
        if not 0 <= temperature < math.inf:
            raise ValueError(
                f"temperature must be finite and not negative, got {temperature!r} at step {step}"
            )
        return math.sqrt(2 * lr * temperature)

    def _after_step(self, step: int) -> None:
        if self.stop is None or step < self.stop:
            views = [view for view in self.views(step) if view.layer.stored.requires_grad]
            rates = [self._learning_rate(view) for view in views]
            for view, lr in zip(views, rates, strict=True):
                self._walk(view, lr)
        super()._after_step(step)

    def _learning_rate(self, view: LayerView) -> float:
        if "lr" not in view.group:
            raise RuntimeError(
                f"DeepR takes the learning rate from the optimizer, but none with an 'lr' is known for "
                f"{self.names[view.index]}. Call optimizer.step() before step(), or name the optimizer with "
                f"attach(model, optimizer) or track(optimizer)"
            )
        return float(view.group["lr"])

    @torch.no_grad()
    def _walk(self, view: LayerView, lr: float) -> None:
        """Pull and shake the weights of a layer."""
        signs = self._signs.of(view)
        weights = view.weights - lr * self.l1 * signs.to(view.weights.dtype)
        if noise := self._noise(lr, view.step):
            normal = view.rng(_WALK).standard_normal(view.nnz, np.float32)
            weights.add_(torch.from_numpy(normal).to(weights), alpha=noise)
        view.layer.put(view.layer.stored.detach(), torch.arange(view.nnz), weights)


class Signs(DropScore):
    """``sign * w`` of signs that every connection keeps; negative where it has ended."""

    def __init__(self) -> None:
        self._signs: dict[int, torch.Tensor] = {}

    def of(self, view: LayerView) -> torch.Tensor:
        """int8 (nnz,): the sign of each connection; at first that of its weight."""
        if view.index not in self._signs:
            self._signs[view.index] = view.weights.sign().to(torch.int8)
            self._draw_missing(view)
        return self._signs[view.index]

    def __call__(self, view: LayerView) -> Scores:
        """(nnz,): how far each connection is from ending."""
        strengths: Scores = (self.of(view) * view.weights).cpu().numpy()
        return strengths

    def follow(self, view: LayerView, source: torch.Tensor) -> None:
        """Move the signs, and draw those of new connections."""
        if view.index in self._signs:  # since the first step
            self._signs[view.index] = move_slots(self._signs[view.index], source)
            self._draw_missing(view)

    def _draw_missing(self, view: LayerView) -> None:
        signs = self._signs[view.index]
        missing = (signs == 0).nonzero().reshape(-1)
        drawn = view.rng(_SIGN).integers(2, size=len(missing), dtype=np.int8) * 2 - 1
        signs[missing] = torch.from_numpy(drawn).to(signs.dtype)

    def detach(self, layers: Iterable[SparseLayer]) -> None:
        """Forget all signs."""
        self._signs.clear()

    def state_dict(self) -> dict[str, Any]:
        """The signs, by the number of their layer."""
        return {str(index): signs.clone() for index, signs in self._signs.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the signs."""
        self._signs = {int(index): signs.clone() for index, signs in state.items()}


class EndedOfLayer(LayerSelection):
    """Whatever scores below 0 goes, of each layer as much as it has empty positions."""

    of_blocks = False

    def drop(self, context: UpdateContext) -> list[Array]:
        """Slots that have ended; where there is no room for all, those furthest below 0."""
        return [
            lowest(scores, min(_n_ended(scores), room))
            for scores, room in zip(context.scores, context.rooms, strict=True)
        ]


class EndedOfNetwork(NetworkSelection):
    """Whatever scores below 0 goes, but one connection of each layer, and as much as there is room for."""

    of_blocks = False

    def drop(self, context: UpdateContext) -> list[Array]:
        """Slots that have ended; where there is no room for all, those furthest below 0."""
        n_ended = [min(_n_ended(scores), max(0, scores.size - 1)) for scores in context.scores]
        if sum(n_ended) > (room := sum(context.rooms)):
            return lowest_of_network(context.scores, room)
        return [lowest(scores, n) for scores, n in zip(context.scores, n_ended, strict=True)]


class ByChance(Redistribution):
    """New positions are drawn among all empty ones of the network."""

    def shares(self, updates: Sequence[LayerUpdate], n_grow: int, caps: Sequence[int]) -> list[int]:
        """How many of them lie in each layer."""
        ends = np.cumsum(caps)
        drawn = sample_distinct(updates[0].view.rng(_SHARE), int(ends[-1]), n_grow)
        return [int(n) for n in np.diff(np.searchsorted(drawn, ends), prepend=0)]


def _n_ended(scores: Scores) -> int:
    return int(np.count_nonzero(~(scores >= 0)))
