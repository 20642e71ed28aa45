"""What a new connection starts with: its weight and its optimizer state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparselab.dst.checks import require_finite
from sparselab.dst.view import LayerUpdate
from sparselab.kernels.arrays import Array
from sparselab.nn.follow.state_move import GrownState, Young

#: Weights (n,), or (n, *block_shape), for the n positions a layer has grown; called after the rewrite.
GrownValue = Callable[[LayerUpdate, Array], npt.NDArray[np.floating[Any]]]

GROWN_STATES = "young", "zero", "mean"

#: Keeps these draws apart from those of the growth itself.
_PURPOSE = 1


@dataclass(frozen=True)
class Same:
    """The same weight for all.

    Parameters
    ----------
    weight : float
    """

    weight: float

    def __call__(self, update: LayerUpdate, positions: Array) -> npt.NDArray[np.floating[Any]]:
        """One weight for each position."""
        return np.full((positions.size, *update.view.slot_shape), self.weight)


@dataclass(frozen=True)
class Normal:
    """Normally distributed weights around 0, as the released code of SET starts them.

    Parameters
    ----------
    std : float
        Standard deviation; positive.

    Raises
    ------
    TypeError, ValueError
        If it is not a positive number.
    """

    std: float

    def __post_init__(self) -> None:
        require_finite("std", self.std)
        if self.std <= 0:
            raise ValueError(f"std must be positive, got {self.std!r}")

    def __call__(self, update: LayerUpdate, positions: Array) -> npt.NDArray[np.floating[Any]]:
        """One weight for each position."""
        shape = (positions.size, *update.view.slot_shape)
        return np.asarray(update.view.rng(_PURPOSE).normal(0.0, self.std, shape))


@dataclass(frozen=True)
class FanInUniform:
    """Weights as a new layer has them: uniform within ``1 / sqrt(fan_in)`` of each output."""

    def __call__(self, update: LayerUpdate, positions: Array) -> npt.NDArray[np.floating[Any]]:
        """One weight for each position."""
        view = update.view
        rows, columns = view.grid
        # The layer has been rewritten by now, so these are the fan-ins with the new connections.
        fan_in = np.bincount(view.layer.positions().numpy() // columns, minlength=rows)
        bound = 1 / np.sqrt(fan_in[positions // columns] * view.layer.block_shape[1])
        shape = (positions.size, *view.slot_shape)
        return np.asarray(
            bound.reshape(-1, *[1] * len(view.slot_shape)) * view.rng(_PURPOSE).uniform(-1, 1, shape)
        )


def as_grown_value(value: float | GrownValue) -> GrownValue | None:
    """A function from a number or a function; None for 0, which a new connection has anyway.

    Raises
    ------
    TypeError, ValueError
        If `value` is neither, or not finite.
    """
    if callable(value):
        return value
    require_finite("grown_value", value, "a number or a function of (LayerUpdate, positions)")
    return Same(float(value)) if value else None


def check_grown_state(value: Any) -> GrownState:
    """`value` itself; raise ValueError if it is not one of the choices."""
    if isinstance(value, Young) or value in GROWN_STATES:
        return value  # type: ignore[no-any-return]
    raise ValueError(f"grown_state must be one of {GROWN_STATES} or Young(warmup=...), got {value!r}")
