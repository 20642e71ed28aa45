"""Checks of arguments: each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any


def require_finite(name: str, value: object, expected: str = "a number") -> None:
    """Raise TypeError unless `value` is a number, ValueError unless it is finite."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")


def require_count(name: str, value: object, minimum: int = 0) -> int:
    """`value` as an int; raise TypeError unless it is one, ValueError unless it is at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if int(value) < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    return int(value)


def require_several(name: str, value: object) -> tuple[Any, ...]:
    """`value` as a tuple; raise TypeError if it is a text or cannot be listed, ValueError if it is empty."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list of numbers, got {value!r}")
    if not (several := tuple(value)):
        raise ValueError(f"{name} must hold at least one number, got none")
    return several


def require_of_blocks(name: str, block_shape: tuple[int, int], parts: Iterable[Any]) -> None:
    """Raise TypeError unless all parts of an algorithm serve connections that are blocks of weights."""
    if unable := [part.describe() for part in parts if not part.of_blocks]:
        raise TypeError(
            f"{name} cannot rewire a layer of blocks of {block_shape} weights: {', '.join(unable)} looks at "
            f"single weights. SET, RigL, GMP, GraNet and MEST can"
        )
