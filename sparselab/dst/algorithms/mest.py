"""MEST: elastic mutation, with a soft bound on memory or without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from sparselab.dst.budget.targets import Budget
from sparselab.dst.engine.describe import setting
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.parts.drop import MagnitudeAndGradient
from sparselab.dst.parts.select import as_selection
from sparselab.dst.schedules.schedule import ConstantSchedule, Schedule, as_schedule
from sparselab.dst.schedules.when import UpdateSchedule
from sparselab.kernels.arrays import n_connections
from sparselab.nn.layers.base import SparseLayer


class MEST(DynamicSparsityAlgorithm):
    """Drop the smallest ``|w| + lam * |g|`` of the connections, grow uniformly at random.

    With a soft bound (the paper's EM&S) layers are denser than `sparsity` s while they train: an update at
    step t prunes them to s and grows back to ``s - delta(t)``. Without (EM) they have s, and an update prunes
    to ``s + delta(t)`` and grows back to s.

    Parameters
    ----------
    sparsity : float or None
        s, of each layer, or of all together if the scope is the network. With a soft bound it is where
        training ends if `delta` reaches 0, and layers may start as they like; build them with sparsity
        ``s - delta(0)``. Without, every attached layer must have it; None leaves each layer its own.
    delta : float, Schedule or callable
        How far below or above s, as a fraction of all positions. It must come down to 0 for a soft bound to
        end at s. In the released scripts for s = 0.9 it is 0.05, 0.025, 0 (EM&S) or 0.02, 0.01, 0 (EM), with
        steps at 9/16 and 3/4 of the training.
    update_freq : int, optional
        Optimizer steps between updates; 100 if `update` says nothing else.
    update : dict, list of int, or UpdateSchedule, optional
        The steps that end with an update, where a period does not say it; see `DynamicSparsityAlgorithm`.
        Every five epochs in the paper.
    stop : int, optional
        The optimizer step from which on nothing is rewired; `delta` does not fall by itself.
    seed : int
        All random draws depend on ``(seed, layer, step)`` and nothing else.
    scope : {"layer", "network"}
        As of `DynamicSparsityAlgorithm`.
    soft_bound : bool
        EM&S if true, EM if not.
    lam : float
        Weight of the gradient in the score, at least 0; 0 in the released code, which then is ``|w|``.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range, or `sparsity` is None with a soft bound.

    Notes
    -----
    A drop takes live connections only, so a new one that is still 0 is dropped first unless its gradient
    speaks for it. With ``lam > 0`` that gradient must still be there when `step` is called: call
    ``zero_grad`` before the backward pass, not after ``optimizer.step()``; a layer without is skipped. The
    released code drops by percentile, which takes all of equal weights at once; here counts are exact.
    O(nnz) memory and time per update.

    References
    ----------
    Yuan et al., "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge",
    NeurIPS 2021, section 3.

    Examples
    --------
    >>> import torch
    >>> from sparselab.dst import MEST, LinearSchedule
    >>> from sparselab.nn import SparseLinear
    >>> model = torch.nn.Sequential(SparseLinear(64, 32, sparsity=0.85))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> algorithm = MEST(0.9, delta=LinearSchedule(0.05, 0.0, stop=20), update_freq=10)
    >>> handle = algorithm.attach(model, optimizer)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 64)).square().mean().backward()
    ...     optimizer.step()
    ...     if algorithm.steps_done % 10 == 0:
    ...         print(model[0].nnz)
    256
    205
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        delta: float | Schedule | Callable[[int], float],
        update_freq: int | None = None,
        update: Mapping[str, Any] | Sequence[int] | UpdateSchedule | None = None,
        stop: int | None = None,
        seed: int = 0,
        scope: Literal["layer", "network"] = "layer",
        soft_bound: bool = True,
        lam: float = 0.0,
    ) -> None:
        super().__init__(
            ElasticMutation(sparsity, delta, soft_bound),
            update_freq=update_freq,
            update=update,
            stop=stop,
            seed=seed,
            scope=as_selection(scope, ("layer", "network")),
            drop=MagnitudeAndGradient(lam),
        )

    delta = setting("budget", "delta")
    soft_bound = setting("budget", "soft_bound")
    lam = setting("drop", "lam")


class ElasticMutation(Budget):
    """Prune to a sparsity and grow back below it, or prune beyond it and grow back to it.

    Parameters
    ----------
    sparsity : float or None
    delta : float, Schedule or callable
    soft_bound : bool
        Whether the sparsity is where pruning, not growth, ends.
    """

    sparsity: float | None

    def __init__(
        self, sparsity: float | None, delta: float | Schedule | Callable[[int], float], soft_bound: bool
    ) -> None:
        if sparsity is None and soft_bound:
            raise ValueError("sparsity must be a number for a soft bound, which is below it, got None")
        if isinstance(sparsity, Schedule):
            raise TypeError(f"sparsity must be a number, since what changes is delta, got {sparsity!r}")
        super().__init__(sparsity)
        self.delta = as_schedule(delta, "delta")
        self.soft_bound = soft_bound
        if isinstance(self.delta, ConstantSchedule):
            self._delta(0)

    def _delta(self, step: int) -> float:
        """`delta` at a step; what lies that far from the sparsity must be a sparsity too."""
        delta = self.delta(step)
        most = 1.0
        if self.sparsity is not None:
            most = self.sparsity if self.soft_bound else 1 - self.sparsity
        if not 0 <= delta <= most:
            raise ValueError(
                f"delta must lie in [0, {most:.6g}] for sparsity={self.sparsity}, got {delta!r} at step "
                f"{step}"
            )
        return delta

    def check(self, layer: SparseLayer) -> None:
        """Raise ValueError if the layer has another sparsity, unless it is only where training ends."""
        if not self.soft_bound:
            super().check(layer)

    def targets(self, step: int, nnz: int, size: int) -> tuple[int, int]:
        """Connections after the drop and after the growth."""
        sparsity = 1 - nnz / max(size, 1) if self.sparsity is None else self.sparsity
        total = nnz
        if self.soft_bound:
            total = max(min(nnz, 1), n_connections((1, size), sparsity - self._delta(step)))
        else:
            sparsity = min(1.0, sparsity + self._delta(step))
        kept = min(nnz, max(1, n_connections((1, size), sparsity)))
        return kept, max(kept, total)

    def describe(self) -> str:
        """Name and settings, for comparing a saved run with the one that resumes it."""
        return f"ElasticMutation({self.sparsity}, {self.delta.describe()}, {self.soft_bound})"
