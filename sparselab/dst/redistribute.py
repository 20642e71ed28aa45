"""How the connections that are grown are shared among layers."""

from __future__ import annotations

import abc
from collections.abc import Sequence

from sparselab.dst.allocation import apportion
from sparselab.dst.update import Vacancy


class Redistribution(abc.ABC):
    """Shares of layers, in proportion to a weight for each; no layer gets more than it has room for."""

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

    def weight(self, vacancy: Vacancy) -> float:
        """Connections that stay."""
        return float(vacancy.n_kept)
