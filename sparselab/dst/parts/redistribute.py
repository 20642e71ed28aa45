"""How the connections that are grown are shared among layers."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import numpy as np
import torch

from sparselab.dst.budget.allocate import apportion
from sparselab.dst.parts.view import LayerView, Vacancy


class Redistribution(abc.ABC):
    """Shares of layers, in proportion to a weight for each; no layer gets more than it has room for.

    Attributes
    ----------
    of_blocks : bool
        Whether it can weigh layers whose connections are blocks of weights.
    """

    of_blocks = False

    def check(self, views: Sequence[LayerView]) -> None:  # noqa: B027
        """Raise if there is nothing to weigh these layers by; nothing has been changed yet."""

    def reason_to_skip(self, view: LayerView) -> str:
        """Why the layer cannot be weighed now; empty if it can."""
        return ""

    @abc.abstractmethod
    def weight(self, vacancy: Vacancy) -> float:
        """What the share of a layer is proportional to; not negative."""

    def __call__(self, vacancies: Sequence[Vacancy], n_grow: int, caps: Sequence[int]) -> list[int]:
        """How many connections each layer grows: `n_grow` in all, and none more than its cap."""
        return apportion(n_grow, [self.weight(vacancy) for vacancy in vacancies], caps)

    def describe(self) -> str:
        """Name and settings, for comparing a saved run with the one that resumes it."""
        return type(self).__name__


class ByRemaining(Redistribution):
    """In proportion to the connections that stay (Mostafa & Wang, ICML 2019, Algorithm 1)."""

    of_blocks = True

    def weight(self, vacancy: Vacancy) -> float:
        """Connections that stay."""
        return float(vacancy.n_kept)


class ByMagnitude(Redistribution):
    """In proportion to the mean ``|w|`` over the connections of a layer, before any is dropped."""

    def reason_to_skip(self, view: LayerView) -> str:
        """Why the layer cannot be weighed now; empty if it can."""
        return "" if np.isfinite(_mean_magnitude(view.weights)) else "weights are not finite"

    def weight(self, vacancy: Vacancy) -> float:
        """Mean magnitude."""
        return _mean_magnitude(vacancy.view.weights)


class ByMomentum(Redistribution):
    """In proportion to the mean ``|momentum|`` over the connections of a layer, before any is dropped.

    The momentum is the optimizer's; see `LayerView.momentum`. A layer that has none, because no gradient ever
    reached it or its optimizer keeps none, keeps its topology; if that is so for all layers it is an error.

    References
    ----------
    Dettmers and Zettlemoyer, "Sparse Networks from Scratch: Faster Training without Losing Performance",
    2019, section 3.2.
    """

    def check(self, views: Sequence[LayerView]) -> None:
        """Raise RuntimeError if no layer has a momentum."""
        if views and all(view.momentum is None for view in views):
            raise RuntimeError(
                "ByMomentum shares connections out by the optimizer's momentum, but no optimizer is known "
                "that keeps one for the sparse layers. Train with momentum (SGD(..., momentum=0.9), Adam, "
                "AdamW, ...), call step() after optimizer.step(), or choose another rule "
                "(redistribute=ByMagnitude())"
            )

    def reason_to_skip(self, view: LayerView) -> str:
        """Why the layer cannot be weighed now; empty if it can."""
        if view.momentum is None:
            return "no momentum"
        return "" if np.isfinite(_mean_magnitude(view.momentum)) else "momentum is not finite"

    def weight(self, vacancy: Vacancy) -> float:
        """Mean magnitude."""
        assert vacancy.view.momentum is not None
        return _mean_magnitude(vacancy.view.momentum)


def _mean_magnitude(entries: torch.Tensor) -> float:
    """0 if there are none; summed by NumPy, so that it does not depend on the number of threads."""
    magnitudes = entries.detach().abs().double().cpu().numpy()
    return float(magnitudes.mean()) if magnitudes.size else 0.0
