"""Contenders in processes of their own: who answers rightly is timed, who does not is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import driver, turns
from benchmarks.turns import Driver, TurnError
from sparselab.bench.contenders.linear import Case
from sparselab.bench.measure.timing import Timing

CASE = Case(24, 16, 5, 0.75)
FAKE = str(Path(__file__).with_name("fake_driver.py"))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def fake(stack: ExitStack, folder: Path, behaviour: str, timeout_s: float = 60) -> Driver:
    place = folder / f"{behaviour} runs"
    place.mkdir()
    command = [sys.executable, FAKE, behaviour]
    return stack.enter_context(Driver(behaviour, command, place, timeout_s=timeout_s))


def test_every_driver_is_timed(stack: ExitStack, tmp_path: Path) -> None:
    drivers = {name: fake(stack, tmp_path, name) for name in ("one", "two")}
    for case in (CASE, Case(8, 8, 3, 0.0)):
        results = turns.compare(case, drivers, tmp_path, turns=2, calls=3)
        timing = Timing(1.0, 1.0, 1.0)
        assert results == {name: {"one": timing, "two": timing} for name in turns.OPERATIONS}


def test_turns_alternate(monkeypatch: pytest.MonkeyPatch, stack: ExitStack, tmp_path: Path) -> None:
    drivers = {name: fake(stack, tmp_path, name) for name in ("one", "two")}
    asked: list[str] = []
    ask = Driver.ask

    def record(self: Driver, do: str, **arguments: object) -> dict[str, object]:
        if do == "time":
            asked.append(self.name)
        return ask(self, do, **arguments)

    monkeypatch.setattr(Driver, "ask", record)
    turns.compare(CASE, drivers, tmp_path, turns=2, calls=1)
    assert asked == ["one", "two"] * 6


WRONG = {
    "y": "y is off by",
    "dx": "dx is off by",
    "dw": "dw is off by",
    "nan": "y is off by nan",
    "shape": r"dw is \(95,\), must be \(96,\)",
    "nothing": "left no y",
    "refuses": "cannot load: ValueError: no",
    "chatters": "answered 'load' with 'chatter', not an object",
    "dies": "ended with status 1: the fake gives up",
    "dies silently": "ended with status 3$",
    "short": "not the seconds of 2 calls",
}


@pytest.mark.parametrize("behaviour", WRONG)
def test_whoever_answers_wrongly_is_refused(behaviour: str, stack: ExitStack, tmp_path: Path) -> None:
    drivers = {"bad": fake(stack, tmp_path, behaviour)}
    with pytest.raises(TurnError, match=WRONG[behaviour]):
        turns.compare(CASE, drivers, tmp_path, turns=1, calls=2)


@pytest.mark.parametrize("behaviour", ["dw", "dies"])
def test_one_that_may_fail_leaves_its_reason_and_the_others_go_on(
    behaviour: str, stack: ExitStack, tmp_path: Path
) -> None:
    drivers = {"bad": fake(stack, tmp_path, behaviour), "good": fake(stack, tmp_path, "good")}
    for _ in range(2):
        results = turns.compare(CASE, drivers, tmp_path, turns=1, calls=2, optional={"bad"})
        for timings in results.values():
            assert isinstance(timings["bad"], str)
            assert isinstance(timings["good"], Timing)


def test_answers_of_an_earlier_case_do_not_count(stack: ExitStack, tmp_path: Path) -> None:
    lazy = fake(stack, tmp_path, "nothing")
    for name, array in turns.write_case(CASE, tmp_path / "case").items():
        np.save(lazy.folder / f"{name}.npy", array)
    with pytest.raises(TurnError, match="left no y"):
        turns.compare(CASE, {"lazy": lazy}, tmp_path, turns=1, calls=1)


def test_one_that_does_not_answer_is_ended(stack: ExitStack, tmp_path: Path) -> None:
    slow = fake(stack, tmp_path, "sleeps", timeout_s=0.2)
    with pytest.raises(TurnError, match=r"did not answer 'time' within 0\.2 s"):
        slow.ask("time", operation="forward", calls=1)
    with pytest.raises(TurnError, match="ended with status"):
        slow.ask("time", operation="forward", calls=1)


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(TurnError, match="nobody cannot be started"):
        Driver("nobody", [str(tmp_path / "nothing")], tmp_path)


@pytest.mark.parametrize("block_shape", [(4, 4), (2, 3), (1, 1)])
def test_blocks_of_this_environment_pass(block_shape: tuple[int, int], tmp_path: Path) -> None:
    expected = turns.write_case(CASE, tmp_path, block_shape)
    live = round(0.25 * 24 * 16 / (block_shape[0] * block_shape[1])) * block_shape[0] * block_shape[1]
    assert np.count_nonzero(np.load(tmp_path / "w.npy")) == len(expected["dw"]) == live
    session = driver.Session("this_sparselab")
    session.load(str(tmp_path), str(tmp_path), list(block_shape))
    turns.check("blocks", tmp_path, expected)


def test_short_calls_are_made_more_often(stack: ExitStack, tmp_path: Path) -> None:
    asked: list[int] = []
    contest = turns.Contest({"one": fake(stack, tmp_path, "one")})
    ask = contest.ask

    def record(name: str, do: str, **arguments: Any) -> dict[str, Any]:
        asked.append(arguments["calls"])
        return ask(name, do, **arguments)

    contest.ask = record  # type: ignore[method-assign]
    contest.time(["forward"], turns=2, calls=3, label="x")
    assert asked == [3, 30, 30]


@pytest.mark.parametrize("contender", ["dense", "this_sparselab"])
@pytest.mark.parametrize("case", [CASE, Case(7, 9, 4, 0.0)])
def test_the_contenders_of_this_environment_pass(contender: str, case: Case, tmp_path: Path) -> None:
    expected = turns.write_case(case, tmp_path)
    session = driver.Session(contender)
    session.load(str(tmp_path), str(tmp_path))
    turns.check(contender, tmp_path, expected)
    for operation in turns.OPERATIONS:
        assert len(session.time(operation, 3)["seconds"]) == 3


def test_a_case_has_the_sparsity_asked_for(tmp_path: Path) -> None:
    expected = turns.write_case(CASE, tmp_path)
    assert np.count_nonzero(np.load(tmp_path / "w.npy")) == len(expected["dw"]) == 96


def test_cells() -> None:
    slow, fast = Timing(3.0, 3.0, 3.0), Timing(1.5, 1.5, 1.5)
    assert turns.timing_cell(fast) == "1.50"
    assert turns.timing_cell(slow, fast) == "3.00 (2.00x)"
    assert turns.timing_cell(slow, "why not") == "3.00"
    assert turns.timing_cell("why not", fast) == "cannot run"
