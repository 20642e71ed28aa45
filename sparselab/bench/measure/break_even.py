"""The sparsity from which a sparse layer is as fast as a dense one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparselab.bench.contenders.linear import OURS, Case, run_case


@dataclass(frozen=True)
class BreakEven:
    """Where forward + backward of ours takes the time of dense; None where dense is faster throughout.

    None also if either could not be timed; `reason` then says why.
    """

    in_features: int
    out_features: int
    tokens: int
    threads: int
    sparsity: float | None
    reason: str | None = None


class _NotTimedError(RuntimeError):
    """Ours or dense was not timed."""


def crossing(
    relative_time: Callable[[float], float],
    low: float = 0.0,
    high: float = 0.99,
    tolerance: float = 0.005,
    most_steps: int = 8,
) -> float | None:
    """Sparsity at which the relative time is 1.

    Parameters
    ----------
    relative_time : callable
        Our time over that of dense at a sparsity, falling as the sparsity grows.
    low, high : float
        Where to search.
    tolerance : float
        Stop once the relative time is that close to 1, or the sparsity is known that closely.
    most_steps : int
        Calls beside the two at `low` and `high`.

    Returns
    -------
    float or None
        `low` if ours is faster even there, None if it is slower even at `high`.

    Notes
    -----
    Our time is nearly a straight line in the sparsity, so that the line through two points lands close to
    the crossing at once. The older end counts half each time it stays (Illinois algorithm), because
    otherwise one end of the bracket would never move where the line is bent.

    Examples
    --------
    >>> round(crossing(lambda sparsity: 0.1 + 4 * (1 - sparsity)), 3)
    0.775
    """
    above, below = relative_time(low) - 1, relative_time(high) - 1
    if below > 0:
        return None
    if above <= 0:
        return low
    middle, stayed = high, 0
    for _ in range(most_steps):
        middle = low + (high - low) * above / (above - below)
        error = relative_time(middle) - 1
        if abs(error) <= tolerance or high - low <= tolerance:
            break
        if error > 0:
            low, above = middle, error
            below = below / 2 if stayed > 0 else below
            stayed = 1
        else:
            high, below = middle, error
            above = above / 2 if stayed < 0 else above
            stayed = -1
    return middle


def find(shape: tuple[int, int], tokens: int, rounds: int, threads: int) -> BreakEven:
    """Find the break-even of forward + backward for one layer.

    Parameters
    ----------
    shape : (in_features, out_features)
    tokens, rounds, threads : int

    Returns
    -------
    BreakEven
    """

    def relative_time(sparsity: float) -> float:
        return _relative_time(Case(*shape, tokens, sparsity), rounds, [threads])

    try:
        return BreakEven(*shape, tokens, threads, crossing(relative_time))
    except _NotTimedError as error:
        return BreakEven(*shape, tokens, threads, None, str(error))


def _relative_time(case: Case, rounds: int, threads: Sequence[int]) -> float:
    (result,) = run_case(case, ["forward + backward"], [OURS, "dense"], rounds, threads)
    ratio = result.ratio("dense")
    if ratio is None:
        reasons = [f"{name} {why}" for name, why in result.timings.items() if isinstance(why, str)]
        raise _NotTimedError(f"at {case.sparsity:.1%} {'; '.join(reasons)}")
    return 1 / ratio
