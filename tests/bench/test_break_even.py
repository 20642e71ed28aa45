"""The search for the break-even, on times that are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sparselab.bench.contenders.linear import Case
from sparselab.bench.measure import break_even
from tests.bench import fake


@pytest.mark.parametrize("where", [0.01, 0.3, 0.725, 0.98])
@pytest.mark.parametrize(
    "shape",
    [
        lambda gap: 1 + 5 * gap,  # proportional to live weights
        lambda gap: 1 + gap + 3 * gap * abs(gap),
        lambda gap: 1 + 4 * gap if gap > 0 else 1 + 0.2 * gap,
        lambda gap: 1 + 0.5 * gap if gap > 0 else 1 + 20 * gap,
    ],
)
def test_the_crossing_is_found(where: float, shape: Callable[[float], float]) -> None:
    calls = []

    def relative_time(sparsity: float) -> float:
        calls.append(sparsity)
        return shape(where - sparsity)

    found = break_even.crossing(relative_time, tolerance=0.002, most_steps=20)
    assert found is not None
    assert found == pytest.approx(where, abs=0.015)
    assert all(0 <= sparsity <= 0.99 for sparsity in calls)


def test_a_straight_line_takes_one_step() -> None:
    calls = []

    def relative_time(sparsity: float) -> float:
        calls.append(sparsity)
        return 0.1 + 4 * (1 - sparsity)

    assert break_even.crossing(relative_time) == pytest.approx(0.775)
    assert len(calls) == 3


def test_times_that_never_settle_end_the_search() -> None:
    calls = []

    def relative_time(sparsity: float) -> float:
        calls.append(sparsity)
        return 1.5 if sparsity < 0.6 else 0.5

    assert break_even.crossing(relative_time, most_steps=5) is not None
    assert len(calls) == 7


def test_no_crossing() -> None:
    assert break_even.crossing(lambda sparsity: 2.0) is None
    assert break_even.crossing(lambda sparsity: 0.5) == 0
    assert break_even.crossing(lambda sparsity: 0.5, low=0.3) == 0.3


def test_a_layer_is_timed_at_the_sparsities_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = []

    def run_case(
        case: Case, operations: list[str], contenders: list[str], rounds: int, threads: list[int]
    ) -> list[object]:
        assert (operations, contenders) == (["forward + backward"], ["sparselab", "dense"])
        assert (rounds, threads) == (3, [2])
        cases.append(case)
        return [fake.result(40 * (1 - case.sparsity), operations[0], 2, case, dense=10.0)]

    monkeypatch.setattr(break_even, "run_case", run_case)
    found = break_even.find((50, 20), 100, 3, 2)
    assert found == break_even.BreakEven(50, 20, 100, 2, pytest.approx(0.75))
    assert {(case.in_features, case.out_features, case.tokens) for case in cases} == {(50, 20, 100)}


def test_without_a_time_there_is_no_break_even(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [fake.result(1.0, "forward + backward", dense="refused: wrong")]
    monkeypatch.setattr(break_even, "run_case", lambda *_: results)
    found = break_even.find((50, 20), 100, 3, 1)
    assert found == break_even.BreakEven(50, 20, 100, 1, None, "at 0.0% dense refused: wrong")
