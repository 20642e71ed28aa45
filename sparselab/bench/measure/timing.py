"""Interleaved timing: every contender once per round, so that a drifting machine drifts for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender over all rounds: median, lower and upper quartile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Median and quartiles of the rounds, given in seconds."""
        quarters = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
        return cls(*(1e3 * value for value in (statistics.median(seconds), quarters[0], quarters[2])))


def plain_timings(timings: Mapping[str, Timing | str]) -> dict[str, dict[str, float] | str]:
    """Timings as data for JSON, in milliseconds; a text that says why there is none stays one."""
    return {
        name: asdict(timing) if isinstance(timing, Timing) else timing for name, timing in timings.items()
    }


def interleave(contenders: Mapping[Key, Callable[[], object]], rounds: int, label: str) -> dict[Key, Timing]:
    """Time each contender `rounds` times, in turns; the first rounds warm up and are not counted.

    Every timed call directly follows an untimed one of the same contender: what ran before leaves spinning
    worker threads and its own data in the caches, and neither belongs to the contender's time.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in contenders}
    warm_up = 2
    for index in progress(range(warm_up + rounds), label):
        for name, call in contenders.items():
            call()
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if index >= warm_up:
                seconds[name].append(elapsed)
    return {name: Timing.of(values) for name, values in seconds.items()}


def progress(rounds: range, label: str) -> Iterable[int]:
    """The same rounds, with a progress bar on a terminal if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return rounds
    bar: Iterable[int] = tqdm(rounds, desc=label, leave=False, disable=None)
    return bar
