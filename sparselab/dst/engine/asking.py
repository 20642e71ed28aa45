"""What is asked of an algorithm from outside an update: how much may grow, and why nothing does."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

from sparselab.dst.view import UpdateReport
from sparselab.kernels.arrays import Array

#: Why layers may be left alone for good.
NOTHING = "there was nothing to drop or to grow"
_EXPECTED = "frozen", "finished", NOTHING


class MostGrowth:
    """What asks an algorithm how much a layer can grow: held by the layer, which must not keep it alive.

    Parameters
    ----------
    algorithm : DynamicSparsityAlgorithm or None
        Held weakly; without one nothing can grow.
    step : int
        The optimizer step that ends with the update.
    """

    def __init__(self, algorithm: Any, step: int) -> None:
        self._reference = None if algorithm is None else weakref.ref(algorithm)
        self._step = step

    @property
    def _algorithm(self) -> Any:
        return None if self._reference is None else self._reference()

    def __call__(self, index: int) -> int | Array:
        algorithm = self._algorithm
        most: int | Array = 0 if algorithm is None else algorithm._most_growth(self._step, index)
        return most

    def __deepcopy__(self, memo: dict[int, Any]) -> MostGrowth:
        return MostGrowth(copy.deepcopy(self._algorithm, memo), self._step)


def warn_if_stuck(name: str, before: Sequence[UpdateReport], now: Sequence[UpdateReport]) -> None:
    """Warn if two updates, one after the other, have left alone every layer that is trained."""
    reasons = [report.skipped for report in now if report.skipped not in _EXPECTED]
    if reasons and before and all(report.skipped for report in (*before, *now)):
        warnings.warn(
            f"{name} has rewired no layer at its last two updates: {reasons[0]}. `last_update` tells of each "
            "layer; growth by gradient looks at what backward() adds to .grad between two optimizer steps",
            stacklevel=2,
        )
