"""What each replica sends for a step, as formulas (``docs/scaling.md``)."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Ways to send gradients, or, with the last, weights instead.
WAYS = ("whole", "bfloat16", "top-k", "local SGD")
#: Steps that a process takes alone before weights are averaged, where it does.
LOCAL_STEPS = 8
#: Of the entries of a gradient, what is sent of it; Parameters of so many entries are sent whole.
TOP_K, ALWAYS_WHOLE = 0.01, 1024


def ring_bytes(n_bytes: float, ranks: int) -> float:
    """What each of so many processes sends to sum so many bytes around a ring."""
    return 2 * (ranks - 1) / ranks * n_bytes


def step_bytes(way: str, sizes: Sequence[int], ranks: int) -> float:
    """What each process sends for a step, on average where some are others.

    Parameters
    ----------
    way : one of `WAYS`
    sizes : sequence of int
        Numbers that the Parameters hold: of sparse layers, live ones.
    ranks : int
        Processes.
    """
    if way == "top-k":  # a number and its index, handed on by everybody
        return 8 * (ranks - 1) * sum(n if n <= ALWAYS_WHOLE else math.ceil(TOP_K * n) for n in sizes)
    if way not in WAYS:
        raise ValueError(f"way must be one of {WAYS}, got {way!r}")
    share = {"bfloat16": 2, "local SGD": LOCAL_STEPS}.get(way, 1)
    return ring_bytes(4 * sum(sizes), ranks) / share


def update_bytes(live: float, dense: float, ranks: int, drop: float, candidates: float) -> dict[str, float]:
    """What each process sends for an update of RigL: of exact scores, and of candidates.

    Parameters
    ----------
    live, dense : float
        Weights of the layers that are rewired: live ones, and as if dense.
    ranks : int
    drop : float
        Of the live ones, those that go.
    candidates : float
        `sparselab.Replicas.candidates`: what each process proposes, in multiples of what grows.
    """
    proposed = ranks * candidates * drop * live
    return {
        "exact": ring_bytes(4 * dense, ranks),
        "candidates": ring_bytes(4 * (live + proposed), ranks) + (ranks - 1) / ranks * 8 * proposed,
    }
