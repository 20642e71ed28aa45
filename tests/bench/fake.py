"""Results that were never measured."""

from __future__ import annotations

from sparselab.bench.contenders.linear import Case, Result
from sparselab.bench.measure.limits import Limits
from sparselab.bench.measure.timing import Timing

#: nnz is 100, so that forward is 2e4 operations and forward + backward 6e4.
CASE = Case(50, 20, 100, 0.9)


def result(
    ours: float | str,
    operation: str = "forward",
    threads: int = 1,
    case: Case = CASE,
    **others: float | str,
) -> Result:
    """A result with these medians in milliseconds; a text stands for a reason."""
    timings = {"sparselab": ours, **others}
    return Result(
        case,
        operation,
        threads,
        {
            name: value if isinstance(value, str) else Timing(value, value, value)
            for name, value in timings.items()
        },
        "tiles",
    )


def limits(threads: int = 1, first_level: float = 100.0, second_level: float = 50.0) -> Limits:
    return Limits(threads, 200.0, first_level, second_level)
