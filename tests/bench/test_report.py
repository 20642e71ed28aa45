"""Numbers derived from times, and tables."""

from __future__ import annotations

import sys

import pytest

from sparselab.bench.measure.break_even import BreakEven
from sparselab.bench.measure.timing import Timing, interleave
from sparselab.bench.output import report, tables
from tests.bench import fake


def test_rates_and_ratios() -> None:
    forward = fake.result(0.001, dense=0.004, other="cannot run: absent")
    assert forward.gflops == pytest.approx(20.0)
    assert fake.result(0.001, "forward + backward").gflops == pytest.approx(60.0)
    assert forward.ratio("dense") == pytest.approx(4.0)
    assert forward.ratio("other") is None
    assert report.share_of_limit(forward, [fake.limits(2, 1.0), fake.limits(1, 80.0)]) == pytest.approx(0.25)
    assert report.share_of_limit(fake.result("refused: wrong"), [fake.limits()]) is None


def test_the_table_of_results(capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        fake.result(0.001, dense=0.004, other="cannot run: absent"),
        fake.result(0.002, "forward + backward", dense=0.003, other="cannot run: absent"),
    ]
    report.show_results("layers", results, [fake.limits()])
    _, title, columns, *rows, reason = capsys.readouterr().out.splitlines()
    assert title == "layers: milliseconds, median (and how many times faster sparselab is)"
    assert columns.split() == [
        "layer", "operation", "tokens", "sparsity", "threads",
        "sparselab", "dense", "other", "GFLOP/s", "of", "limit", "variant",
    ]  # fmt: skip
    assert " ".join(rows[0].split()) == "50 -> 20 forward 100 90% 1 0.00 0.00 (4.0x) - 20.0 20% tiles"
    assert rows[1].endswith("(1.5x)      -     30.0       30%    tiles")
    assert reason == "  other cannot run: absent"


def test_the_gain_from_threads() -> None:
    results = [
        fake.result(8.0, threads=1),
        fake.result(5.0, threads=2),
        fake.result(2.5, threads=4),
        fake.result("refused: wrong", "forward + backward", threads=1),
        fake.result(5.0, "forward + backward", threads=2),
    ]
    limits = [fake.limits(1, second_level=50), fake.limits(2, second_level=100), fake.limits(4, 1, 150)]
    gains = report.thread_gains(results, limits)
    assert [(gain["from"], gain["to"], gain["operation"]) for gain in gains] == [
        (1, 2, "forward"),
        (1, 4, "forward"),
    ]
    assert [gain["gain"] for gain in gains] == pytest.approx([1.6, 3.2])
    assert [gain["cache_gain"] for gain in gains] == pytest.approx([2.0, 3.0])
    assert [gain["share"] for gain in gains] == pytest.approx([0.8, 3.2 / 3])


def test_the_tables_of_gains_and_break_even(capsys: pytest.CaptureFixture[str]) -> None:
    limits = [fake.limits(1), fake.limits(2, second_level=100)]
    report.show_thread_gains(report.thread_gains([fake.result(8.0), fake.result(5.0, threads=2)], limits))
    assert "50 -> 20  forward       100       90%   1 -> 2      1.60x" in capsys.readouterr().out
    found = [BreakEven(50, 20, 100, 2, s) for s in (0.725, None, 0.0)]
    report.show_break_even([*found, BreakEven(50, 20, 100, 2, None, "at 0.0% dense refused: wrong")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[-4:]] == ["72.5%", "none", "any", "wrong"]


def test_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    tables.show("title", ["left", "right"], [["a", "1"], ["b", "22"]])
    drawn = capsys.readouterr().out
    assert "─" in drawn
    assert [line.split() for line in drawn.splitlines() if line.strip()[:1] in ("a", "b")] == [
        ["a", "1"],
        ["b", "22"],
    ]
    monkeypatch.setitem(sys.modules, "rich", None)
    tables.show("title", ["left", "right"], [["a", "1"], ["b", "22"]])
    assert capsys.readouterr().out == "\ntitle\nleft  right\na         1\nb        22\n"


def test_contenders_take_turns_and_each_timed_call_follows_its_own() -> None:
    calls = []
    timings = interleave({name: lambda name=name: calls.append(name) for name in "ab"}, 3, "label")
    assert "".join(calls) == "aabb" * (2 + 3)
    assert all(timing.low <= timing.median <= timing.high for timing in timings.values())


def test_timings_are_milliseconds() -> None:
    assert Timing.of([0.003]) == Timing(3.0, 3.0, 3.0)
    assert Timing.of([0.001, 0.002, 0.004]).median == pytest.approx(2.0)
