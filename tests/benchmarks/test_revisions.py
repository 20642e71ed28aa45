"""Revisions of a throw-away repository whose package is a few lines, so that nothing needs to be compiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import revisions
from benchmarks.turns import TurnError
from sparselab.bench.contenders.linear import Case
from sparselab.bench.measure.timing import Timing

CASE = Case(12, 8, 3, 0.5)
PACKAGE = """
import torch

print("what a package prints must not disturb the answers")


class Values:
    def __init__(self, weight):
        self.grad = weight.grad[weight != 0]


class SparseLinear(torch.nn.Linear):
    @classmethod
    def from_dense(cls, linear, sparsity):
        layer = cls(linear.in_features, linear.out_features)
        layer.load_state_dict(linear.state_dict())
        return layer

    def forward(self, x):
        return super().forward(x) * FACTOR

    @property
    def values(self):
        return Values(self.weight)
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
    [(case, timings)] = revisions.run(["right", "HEAD~2"], [CASE], 1, 1, 2, repository)
    assert case == CASE
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
        revisions.run([revision], [CASE], 1, 1, 1, repository)
    assert worktrees(repository) == 1


@pytest.mark.parametrize("revision", ["nothing", "--help", ""])
def test_a_revision_that_does_not_exist(repository: Path, revision: str) -> None:
    with pytest.raises(TurnError, match="must name a commit"):
        revisions.run([revision, "right"], [CASE], 1, 1, 1, repository)


def test_a_folder_that_is_no_repository(tmp_path: Path) -> None:
    with pytest.raises(TurnError, match="git"):
        revisions.commit_of(tmp_path, "HEAD")
