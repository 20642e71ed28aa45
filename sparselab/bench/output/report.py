"""What the benchmark found, as tables and as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from sparselab.bench.contenders.linear import OURS, Result
from sparselab.bench.measure.break_even import BreakEven
from sparselab.bench.measure.limits import Limits
from sparselab.bench.measure.timing import plain_timings
from sparselab.bench.output import tables


def show_limits(limits: Sequence[Limits]) -> None:
    """Print what the machine can do, one row for each number of threads."""
    rows = [
        [
            str(each.threads),
            f"{each.registers:.0f}",
            f"{each.first_level:.0f} ({each.first_level_bytes:.0f})",
            f"{each.second_level:.0f} ({each.second_level_bytes:.0f})",
        ]
        for each in limits
    ]
    tables.show(
        "limits of this machine, float32 multiply-adds, GFLOP/s (and GB/s of the rows loaded)",
        ["threads", "from registers", "first-level cache", "second-level cache"],
        rows,
        left=0,
    )


def show_results(title: str, results: Sequence[Result], limits: Sequence[Limits]) -> None:
    """Print times, ratios, GFLOP/s on live weights and their share of the limit; then who was not timed."""
    names = list(results[0].timings)
    rows = [
        [
            f"{result.case.in_features} -> {result.case.out_features}",
            result.operation,
            str(result.case.tokens),
            f"{100 * result.case.sparsity:.4g}%",
            str(result.threads),
            *(_time(result, name) for name in names),
            _number(result.gflops, ".1f"),
            _number(share_of_limit(result, limits), ".0%"),
            result.variant,
        ]
        for result in results
    ]
    columns = [
        "layer",
        "operation",
        "tokens",
        "sparsity",
        "threads",
        *names,
        "GFLOP/s",
        "of limit",
        "variant",
    ]
    tables.show(f"{title}: milliseconds, median (and how many times faster {OURS} is)", columns, rows, left=2)
    for name, reason in reasons(results):
        print(f"  {name} {reason}")


def reasons(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Who was not timed and why, each pair once."""
    pairs = [
        (name, timing)
        for result in results
        for name, timing in result.timings.items()
        if isinstance(timing, str)
    ]
    return list(dict.fromkeys(pairs))


def share_of_limit(result: Result, limits: Sequence[Limits]) -> float | None:
    """Our GFLOP/s over those of the first-level cache on as many threads."""
    if result.gflops is None:
        return None
    return next(result.gflops / each.first_level for each in limits if each.threads == result.threads)


def _time(result: Result, name: str) -> str:
    median, ratio = result.median(name), result.ratio(name)
    if median is None:
        return "-"
    return f"{median:.2f}" if name == OURS or ratio is None else f"{median:.2f} ({ratio:.1f}x)"


def _number(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def thread_gains(results: Sequence[Result], limits: Sequence[Limits]) -> list[dict[str, Any]]:
    """How much each operation gains from the fewest threads to more, beside what the cache gains.

    Parameters
    ----------
    results : sequence of Result
        Of several thread counts, the fewest first.
    limits : sequence of Limits
        Of the same counts.

    Returns
    -------
    list of dict
        ``gain`` is our time on ``from`` threads over that on ``to`` threads, ``cache_gain`` the same ratio
        of the bandwidth of the second-level cache, ``share`` the first over the second.
    """
    bandwidth = {each.threads: each.second_level for each in limits}
    first: dict[tuple[Any, str], Result] = {}
    gains = []
    for result in results:
        base = first.setdefault((result.case, result.operation), result)
        before, after = base.median(OURS), result.median(OURS)
        if base is result or before is None or after is None:
            continue
        gain, cache_gain = before / after, bandwidth[result.threads] / bandwidth[base.threads]
        gains.append(
            {
                "case": asdict(result.case),
                "operation": result.operation,
                "from": base.threads,
                "to": result.threads,
                "gain": gain,
                "cache_gain": cache_gain,
                "share": gain / cache_gain,
            }
        )
    return gains


def show_thread_gains(gains: Sequence[dict[str, Any]]) -> None:
    """Print the gains of `thread_gains`."""
    rows = [
        [
            "{in_features} -> {out_features}".format(**each["case"]),
            each["operation"],
            "{tokens}".format(**each["case"]),
            f"{100 * each['case']['sparsity']:.4g}%",
            f"{each['from']} -> {each['to']}",
            f"{each['gain']:.2f}x",
            f"{each['cache_gain']:.2f}x",
            f"{each['share']:.0%}",
        ]
        for each in gains
    ]
    columns = ["layer", "operation", "tokens", "sparsity", "threads", OURS, "second-level cache", "share"]
    tables.show("gain from threads, beside the gain of the second-level cache's bandwidth", columns, rows, 2)


def show_break_even(found: Sequence[BreakEven]) -> None:
    """Print the sparsity from which ours is faster, one row for each layer."""
    rows = [
        [
            f"{each.in_features} -> {each.out_features}",
            str(each.tokens),
            str(each.threads),
            each.reason or _threshold(each.sparsity),
        ]
        for each in found
    ]
    columns = ["layer", "tokens", "threads", "sparsity"]
    tables.show(f"break-even: {OURS} is faster than dense from here on, forward + backward", columns, rows)


def _threshold(sparsity: float | None) -> str:
    if sparsity is None:
        return "none"
    return f"{sparsity:.1%}" if sparsity > 0 else "any"


def plain_results(results: Sequence[Result], limits: Sequence[Limits]) -> Iterator[dict[str, Any]]:
    """Each result as data for JSON: times in milliseconds, rates in GFLOP/s."""
    for result in results:
        yield {
            "case": {**asdict(result.case), "nnz": result.case.nnz},
            "operation": result.operation,
            "threads": result.threads,
            "variant": result.variant,
            "timings_ms": plain_timings(result.timings),
            "gflops": result.gflops,
            "share_of_limit": share_of_limit(result, limits),
        }


def plain_limits(limits: Sequence[Limits]) -> list[dict[str, float]]:
    """Each of the limits as data for JSON, GFLOP/s and GB/s."""
    return [
        {
            "threads": each.threads,
            "registers_gflops": each.registers,
            "first_level_gflops": each.first_level,
            "first_level_gbytes": each.first_level_bytes,
            "second_level_gflops": each.second_level,
            "second_level_gbytes": each.second_level_bytes,
        }
        for each in limits
    ]
