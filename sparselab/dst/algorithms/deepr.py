"""Deep rewiring: weights walk randomly with a fixed sign, and connections end where they would change it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from sparselab.dst.checks import require_finite
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.engine.optimizer_state import StateMove
from sparselab.dst.parts.drop import Scores, lowest, lowest_of_network
from sparselab.dst.parts.grow import RandomGrowth
from sparselab.dst.parts.view import LayerView, UpdateReport, Vacancy
from sparselab.dst.schedules.schedule import Constant, Schedule, as_schedule
from sparselab.kernels.arrays import Array
from sparselab.kernels.layouts.sampling import sample_distinct

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
        See `DynamicSparsityAlgorithm`.
    temperature : float, Schedule or callable
        Strength of the noise; not negative. 0 draws none. The released script adds ``lr * 1e-5 * N(0, 1)``,
        which at its first learning rate, 0.5, is the default.
    l1 : float
        Pull towards zero; not negative.
    update : int, mapping, sequence of int, or UpdateSchedule
        The steps that replace connections; the walk goes on at every step.
    seed : int
        See `DynamicSparsityAlgorithm`.
    scope : {"layer", "network"}
        Whether each layer replaces its own, or the new positions are drawn among all empty ones of the
        network, where every layer keeps at least one connection.
    settings
        Of `DynamicSparsityAlgorithm`.

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
    larger interval of `update` saves that. One byte of sign per connection is kept, moved and saved.

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

    _SCOPES = ("layer", "network")
    _FOLLOWS_SCHEDULE = False
    _OF_BLOCKS = False

    def __init__(
        self,
        sparsity: float | None = None,
        temperature: float | Schedule | Callable[[int], float] = 2.5e-11,
        l1: float = 1e-5,
        update: Any = 1,
        seed: int = 0,
        *,
        scope: Literal["layer", "network"] = "layer",
        **settings: Any,
    ) -> None:
        grow = RandomGrowth(regrow=False)
        super().__init__(sparsity, 1.0, update, seed, grow=grow, scope=scope, **settings)
        self.temperature = as_schedule(temperature)
        if isinstance(self.temperature, Constant):
            self._noise(1.0, 0)
        require_finite("l1", l1)
        if l1 < 0:
            raise ValueError(f"l1 must not be negative; got {l1!r}")
        self.l1 = l1

    def _noise(self, lr: float, step: int) -> float:
        """Standard deviation of the noise."""
        temperature = self.temperature(step)
        if not 0 <= temperature < math.inf:
            raise ValueError(
                f"temperature must be finite and not negative; got {temperature!r} at step {step}"
            )
        return math.sqrt(2 * lr * temperature)

    def _finish_step(self, step: int) -> None:
        views = [view for view in self._views(step) if view.layer.stored.requires_grad]
        rates = [self._learning_rate(view) for view in views]
        for view, lr in zip(views, rates, strict=True):
            self._walk(view, lr)
        super()._finish_step(step)

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
        signs = self._slots[view.index].get("sign")
        if signs is None:
            signs = self._slots[view.index]["sign"] = view.weights.sign().to(torch.int8)
            _draw_missing_signs(view, signs)
        weights = view.weights - lr * self.l1 * signs.to(view.weights.dtype)
        if noise := self._noise(lr, view.step):
            normal = view.rng(_WALK).standard_normal(view.nnz, np.float32)
            weights.add_(torch.from_numpy(normal).to(weights), alpha=noise)
        view.layer.put(view.layer.stored.detach(), torch.arange(view.nnz), weights)

    def _drop(self, views: Sequence[LayerView], step: int) -> list[Array]:
        strengths = [self._strengths(view) for view in views]
        n_ended = [int(np.count_nonzero(~(layer >= 0))) for layer in strengths]
        rooms = [view.size - view.nnz for view in views]
        if self.scope == "layer":
            n_ended = list(map(min, n_ended, rooms))
        else:
            n_ended = [min(n, max(0, view.nnz - 1)) for n, view in zip(n_ended, views, strict=True)]
            if sum(n_ended) > sum(rooms):
                return lowest_of_network(strengths, sum(rooms))
        return [lowest(layer, n) for layer, n in zip(strengths, n_ended, strict=True)]

    def _strengths(self, view: LayerView) -> Scores:
        """(nnz,): ``sign * w``, negative where a connection has ended."""
        strengths: Scores = (self._slots[view.index]["sign"] * view.weights).cpu().numpy()
        return strengths

    def _allot(self, vacancies: Sequence[Vacancy], step: int) -> list[int]:
        if self.scope == "layer" or not vacancies:
            return super()._allot(vacancies, step)
        ends = np.cumsum([min(vacancy.n_free, self.grow.room(vacancy.view)) for vacancy in vacancies])
        n_grow = sum(vacancy.drop.size for vacancy in vacancies)
        drawn = sample_distinct(vacancies[0].view.rng(_SHARE), int(ends[-1]), n_grow)
        return [int(n) for n in np.diff(np.searchsorted(drawn, ends), prepend=0)]

    def _rewire(self, vacancy: Vacancy, move: StateMove) -> UpdateReport:
        report = super()._rewire(vacancy, move)
        if report.grown:
            _draw_missing_signs(vacancy.view, self._slots[vacancy.view.index]["sign"])
        return report

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "temperature": self.temperature.describe(), "l1": float(self.l1)}


def _draw_missing_signs(view: LayerView, signs: torch.Tensor) -> None:
    """Give those that are 0 a random sign, in place."""
    missing = (signs == 0).nonzero().reshape(-1)
    drawn = view.rng(_SIGN).integers(2, size=len(missing), dtype=np.int8) * 2 - 1
    signs[missing] = torch.from_numpy(drawn).to(signs.dtype)
