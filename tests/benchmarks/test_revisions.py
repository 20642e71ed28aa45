"""Revisions of a throw-away repository whose package is a few lines, so that nothing needs to be compiled."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import sparselab
from benchmarks import calls, driver, models, revisions, structure
from benchmarks.models import Size
from benchmarks.revisions import Layer, Model, Row
from benchmarks.turns import Driver, TurnError
from sparselab.bench.contenders.linear import Case
from sparselab.bench.measure.timing import Timing

WORK = Layer(Case(12, 8, 3, 0.5))
PACKAGE = """
import torch

print("what a package prints must not disturb the answers")


class Stored:
    def __init__(self, grad):
        self.grad = grad


class SparseLinear(torch.nn.Linear):
    def __init__(self, inputs, outputs, sparsity=0.9):
        super().__init__(inputs, outputs)

    @classmethod
    def from_dense(cls, linear, sparsity):
        layer = cls(linear.in_features, linear.out_features)
        layer.load_state_dict(linear.state_dict())
        return layer

    def forward(self, x):
        return super().forward(x) * FACTOR

    @property
    def stored(self):
        return Stored(self.weight.grad[self.weight != 0])
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Three revisions, tagged: one that is right, one that is wrong, one that cannot be imported."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    path = tmp_path / "repository"
    package = path / "sparselab" / "__init__.py"
    package.parent.mkdir(parents=True)
    revisions.git(path, "init", "--quiet")
    for tag, source in {
        "right": PACKAGE.replace("FACTOR", "1"),
        "wrong": PACKAGE.replace("FACTOR", "1.01"),
        "broken": "raise RuntimeError('broken on purpose')",
    }.items():
        package.write_text(source)
        revisions.git(path, "add", ".")
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
        revisions.git(path, *identity, "commit", "--quiet", "-m", tag)
        revisions.git(path, "-c", "tag.gpgsign=false", "tag", tag)
    return path


def worktrees(repository: Path) -> int:
    return len(revisions.git(repository, "worktree", "list").splitlines())


def test_two_revisions_are_timed_and_their_worktrees_removed(repository: Path) -> None:
    [(work, timings)] = revisions.run(["right", "HEAD~2"], [WORK], 1, 1, 2, repository)
    assert work == WORK
    for row in timings.values():
        assert list(row) == ["1 right", "2 HEAD~2"]
        assert all(isinstance(timing, Timing) for timing in row.values())
    assert worktrees(repository) == 1


@pytest.mark.parametrize(
    ("revision", "reason"),
    [
        ("wrong", "1 wrong is refused: y is off by"),
        ("broken", "1 broken cannot begin: RuntimeError: broken on purpose"),
    ],
)
def test_a_revision_that_fails_is_named_and_its_worktree_removed(
    repository: Path, revision: str, reason: str
) -> None:
    with pytest.raises(TurnError, match=reason):
        revisions.run([revision], [WORK], 1, 1, 1, repository)
    assert worktrees(repository) == 1


@pytest.mark.parametrize("revision", ["nothing", "--help", ""])
def test_a_revision_that_does_not_exist(repository: Path, revision: str) -> None:
    with pytest.raises(TurnError, match="must name a commit"):
        revisions.run([revision, "right"], [WORK], 1, 1, 1, repository)


def test_a_folder_that_is_no_repository(tmp_path: Path) -> None:
    with pytest.raises(TurnError, match="git"):
        revisions.commit_of(tmp_path, "HEAD")


def test_a_folder_is_taken_as_it_is(repository: Path) -> None:
    with revisions.checkout(repository, str(repository), repository / "unused") as tree:
        assert tree == repository
    assert worktrees(repository) == 1


TINY = Size(n_layer=1, d_model=32, d_ff=64, n_head=2, context=8, batch=2)
WORKS = {
    "12->8, 3 tokens, 0.5": WORK,
    "16->24, 5 tokens, 0.5, blocks 4x4": Layer(Case(16, 24, 5, 0.5), (4, 4)),
    "tiny transformer, 2x8": Model("tiny", TINY),
}


@pytest.mark.parametrize("name", WORKS)
def test_layers_blocks_and_models_are_timed(name: str, tmp_path: Path) -> None:
    work = WORKS[name]
    assert str(work) == name
    (tmp_path / "fake").mkdir()
    command = [sys.executable, str(Path(__file__).with_name("fake_driver.py")), "right"]
    with Driver("fake", command, tmp_path / "fake") as fake:
        timings = work.compare({"fake": fake}, tmp_path, 1, 1)
    operations = ["training step"] if isinstance(work, Model) else ["forward", "forward + backward"]
    assert timings == {operation: {"fake": Timing(1.0, 1.0, 1.0)} for operation in operations}


def load_model(session: driver.Session, size: Size) -> dict[str, Any]:
    source = str(revisions.ROOT / "examples" / "gpt_model.py")
    return session.load_model(source, asdict(size), models.SPARSITY)


def test_a_driver_builds_the_model_and_trains_it() -> None:
    session = driver.Session("this_sparselab")
    assert load_model(session, TINY) == {}
    assert len(session.time("training step", 2)["seconds"]) == 2


def test_a_driver_refuses_a_model_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = sparselab.SparseLinear.forward
    monkeypatch.setattr(sparselab.SparseLinear, "forward", lambda self, x: 1.01 * forward(self, x))
    assert "of the largest" in load_model(driver.Session("this_sparselab"), TINY)["error"]


def test_rows_are_of_two_revisions() -> None:
    timings: revisions.Timings = {"forward": {"1 a": Timing(2.0, 1.0, 3.0), "2 a": Timing(4.0, 4.0, 4.0)}}
    (found,) = revisions.as_rows("all", [(WORK, timings)])
    assert (found.operation, found.ratio, found.verdict) == ("forward", 2.0, "slower by 100%")


def row(first: float, second: float) -> Row:
    return Row("all", WORK, "forward", Timing(first, first, first), Timing(second, second, second))


def test_slower_is_more_than_three_percent() -> None:
    assert row(1.0, 1.02).verdict == row(1.0, 0.5).verdict == ""
    assert row(1.0, 1.1).verdict == "slower by 10%"
    assert row(2.0, 1.0).ratio == 0.5


def test_the_table_says_how_many_are_slower(capsys: pytest.CaptureFixture[str]) -> None:
    revisions.print_table([row(1.0, 4.0), row(1.0, 1.0)], ["old", "new"], Console(width=150))
    printed = capsys.readouterr().out
    assert "1 of 2 are slower by more than 3%" in printed
    assert "all: 2.00 times the time of old (geometric mean)" in printed


def test_the_usual_cases_are_those_that_changes_are_judged_by() -> None:
    groups = revisions.groups([0.9])
    assert {name: len(works) for name, works in groups.items()} == {
        "layers": 4, "token": 1, "blocks": 4, "small": 5, "small blocks": 9, "model": 1
    }  # fmt: skip
    assert len({work for works in groups.values() for work in works}) == 24


def test_calls_inside_the_package_are_counted(repository: Path) -> None:
    assert calls.run(["right"], 1, repository) == {"right": {"forward": 1, "backward": 0}}


def test_only_calls_inside_the_folder_count() -> None:
    def run() -> None:
        json.dumps({})

    assert len(driver.calls_within(run, Path(json.__file__).parent)) >= 1
    assert driver.calls_within(run, Path(__file__).parent) == ["test_revisions.py:run"]
    assert driver.calls_within(run, Path("/nowhere")) == []


def test_structure_is_measured(tmp_path: Path) -> None:
    package = tmp_path / "sparselab"
    (package / "nn").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("from sparselab import b\n\n\ndef f(x, y):\n    return x\n")
    (package / "b.py").write_text("from sparselab.nn import c\n")
    (package / "nn" / "c.py").write_text("from sparselab.nn import d\n")
    (package / "nn" / "d.py").write_text("def g():\n    from sparselab.nn import c\n")
    measured = structure.measure(tmp_path, "sparselab")
    assert measured == {
        "files": 5, "folders": 2, "most_files": 3, "lines": 9, "longest_file": (5, "sparselab/a.py"),
        "floors": 3, "circles": 2, "longest_function": (2, "sparselab/nn/d.py::g"),
        "parameters": (2, "sparselab/a.py::f"),
    }  # fmt: skip
    assert structure.measure(tmp_path, "tests")["files"] == 0
