"""Where names differ between a checkout of an earlier commit and this one, so that both can be compared."""

from __future__ import annotations

from typing import Any

import sparselab
from sparselab import kernels


def weights(layer: Any) -> Any:
    """The Parameter of a sparse layer."""
    return layer.weight_values if hasattr(layer, "weight_values") else layer.values


def rigl(update: int, **settings: Any) -> Any:
    """RigL that updates every so many steps."""
    try:
        return sparselab.RigL(update_freq=update, **settings)
    except TypeError:
        return sparselab.RigL(update=update, **settings)


def set_(update: int, **settings: Any) -> Any:
    """SET that updates every so many steps."""
    try:
        return sparselab.SET(update_freq=update, **settings)
    except TypeError:
        return sparselab.SET(update=update, **settings)


def plan(name: str, W: Any) -> dict[str, Any]:
    """A plan made now, to be kept; nothing where plans cannot be kept."""
    make = getattr(kernels, f"plan_{name}", None)
    return {} if make is None else {"plan": make(W)}


def rewritten(W: Any, drop: Any, grow: Any, **settings: Any) -> Any:
    """The matrix that `rewrite` returns."""
    return kernels.rewrite(W, drop, grow, **settings)[0]
