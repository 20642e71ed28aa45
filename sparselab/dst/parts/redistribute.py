"""How the connections that are grown are shared among layers."""

from __future__ import annotations

import abc
import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sparselab.dst.budget.allocate import apportion
from sparselab.dst.part import Part
from sparselab.dst.replicas import Ranks
from sparselab.dst.view import LayerUpdate, LayerView


class Redistribution(Part, abc.ABC):
    """Says how many connections each layer grows, where it need not be as many as it lost.

    Most rules share out in proportion to a number for each layer: derive those from `ByWeight`.
    """

    def check(self, views: Sequence[LayerView]) -> None:
        """Raise if there is nothing to go by for these layers; nothing has been changed yet."""

    @abc.abstractmethod
    def shares(self, updates: Sequence[LayerUpdate], n_grow: int, caps: Sequence[int]) -> list[int]:
        """How many connections each layer grows: `n_grow` in all, and none more than its cap."""

    def checked_shares(self, updates: Sequence[LayerUpdate], n_grow: int, caps: Sequence[int]) -> list[int]:
        """`shares`, once they are known to be what they must be.

        Raises
        ------
        TypeError, ValueError
            If they are not.
        """
        shares = self.shares(updates, n_grow, caps)
        name = f"{type(self).__name__}.shares"
        if len(shares) != len(caps) or not all(isinstance(n, numbers.Integral) for n in shares):
            raise TypeError(f"{name} must return an integer for each of {len(caps)} layers, got {shares!r}")
        if sum(shares) != n_grow or not all(0 <= n <= cap for n, cap in zip(shares, caps, strict=True)):
            raise ValueError(
                f"{name} must return {n_grow} connections in all, and at most {list(caps)} for each layer, "
                f"got {shares!r}"
            )
        return [int(n) for n in shares]


class ByWeight(Redistribution):
    """Shares of layers in proportion to a number for each; what a full layer cannot take, others get."""

    @abc.abstractmethod
    def weight(self, update: LayerUpdate) -> float:
        """What the share of a layer is proportional to; not negative."""

    def shares(self, updates: Sequence[LayerUpdate], n_grow: int, caps: Sequence[int]) -> list[int]:
        """How many connections each layer grows."""
        weights: list[Any] = [self.weight(update) for update in updates]
        for update, weight in zip(updates, weights, strict=True):
            if not isinstance(weight, numbers.Real) or not 0 <= float(weight) < math.inf:
                raise ValueError(
                    f"{type(self).__name__}.weight must return a finite number of at least 0, got {weight!r} "
                    f"for layer number {update.view.index}"
                )
        return apportion(n_grow, weights, caps)


class ByRemaining(ByWeight):
    """In proportion to the connections that stay (Mostafa & Wang, ICML 2019, Algorithm 1)."""

    of_blocks = True

    def weight(self, update: LayerUpdate) -> float:
        """Connections that stay."""
        return float(update.n_kept)


class ByMagnitude(ByWeight):
    """In proportion to the mean ``|w|`` over the connections of a layer, before any is dropped."""

    def reason_to_skip(self, view: LayerView) -> str:
        """Why the layer cannot be weighed now; empty if it can."""
        return "" if np.isfinite(_mean_magnitude(view.weights)) else "weights are not finite"

    def weight(self, update: LayerUpdate) -> float:
        """Mean magnitude."""
        return _mean_magnitude(update.view.weights)


class ByMomentum(ByWeight):
    """In proportion to the mean ``|momentum|`` over the connections of a layer, before any is dropped.

    The momentum is the optimizer's; see `LayerView.momentum`. A layer that has none, because no gradient ever
    reached it or its optimizer keeps none, keeps its topology; if that is so for all layers it is an error.

    References
    ----------
    Dettmers and Zettlemoyer, "Sparse Networks from Scratch: Faster Training without Losing Performance",
    2019, section 3.2.
    """

    def meet(self, views: Sequence[LayerView], ranks: Ranks) -> None:
        """Take the mean over processes: where each keeps the state of some layers, the others have none."""
        own = [None if view.momentum is None else _mean_magnitude(view.momentum) for view in views]
        sums = torch.tensor([[each is not None, each or 0] for each in own], dtype=torch.float64)
        ranks.sum_(sums)
        for view, (known, total) in zip(views, sums.tolist(), strict=True):
            view.agreed["momentum"] = total / known if known else None

    def check(self, views: Sequence[LayerView]) -> None:
        """Raise RuntimeError if no layer has a momentum."""
        if views and all(_momentum(view) is None for view in views):
            raise RuntimeError(
                "ByMomentum shares connections out by the optimizer's momentum, but no optimizer is known "
                "that keeps one for the sparse layers. Train with momentum (SGD(..., momentum=0.9), Adam, "
                "AdamW, ...), call step() after optimizer.step(), or choose another rule "
                "(redistribute=ByMagnitude())"
            )

    def reason_to_skip(self, view: LayerView) -> str:
        """Why the layer cannot be weighed now; empty if it can."""
        if (momentum := _momentum(view)) is None:
            return "no momentum"
        return "" if np.isfinite(momentum) else "momentum is not finite"

    def weight(self, update: LayerUpdate) -> float:
        """Mean magnitude."""
        momentum = _momentum(update.view)
        assert momentum is not None
        return momentum


def _momentum(view: LayerView) -> float | None:
    """Mean magnitude of the momentum of a layer, or of its replicas; None if nobody keeps one."""
    if "momentum" in view.agreed:
        agreed: float | None = view.agreed["momentum"]
        return agreed
    return None if view.momentum is None else _mean_magnitude(view.momentum)


def _mean_magnitude(entries: torch.Tensor) -> float:
    """0 if there are none; summed by NumPy, so that it does not depend on the number of threads."""
    magnitudes = entries.detach().abs().double().cpu().numpy()
    return float(magnitudes.mean()) if magnitudes.size else 0.0
