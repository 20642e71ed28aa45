"""The peers' environment and what becomes of peers that are not there; nothing is downloaded."""

from __future__ import annotations

import os
import sys
import venv
from pathlib import Path

import pytest
from rich.console import Console

import sparselab
from benchmarks import peers
from benchmarks.turns import TurnError
from sparselab.bench.contenders.linear import Case
from sparselab.bench.measure.timing import Timing

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment without pip or any package."""
    path = tmp_path_factory.mktemp("environments") / "empty"
    venv.create(path, symlinks=os.name != "nt")
    return path


def test_the_environment_must_not_be_the_own_one() -> None:
    with pytest.raises(TurnError, match="would replace sparselab"):
        peers.prepare(Path(sys.prefix), True, QUIET)


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TurnError, match="must be a virtual environment or absent"):
        peers.prepare(tmp_path, True, QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_is_made_where_installing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TurnError, match="--no-install forbids"):
        peers.prepare(tmp_path / "new", False, QUIET)
    assert not (tmp_path / "new").exists()


def test_a_shared_requirement_that_cannot_be_installed(empty: Path) -> None:
    with pytest.raises(TurnError, match="No module named pip"):
        peers.prepare(empty, True, QUIET)


def test_a_peer_that_cannot_be_installed_is_a_reason(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", lambda python, requirement: requirement in peers.SHARED)
    failures = peers.prepare(empty, True, QUIET)
    assert list(failures) == list(peers.PEERS)
    assert "sparseprop==0.1.14 cannot be installed" in failures["sparseprop"]
    assert "No module named pip" in failures["sparseprop"]


def test_peers_that_are_absent_leave_their_reasons(empty: Path) -> None:
    failures = peers.prepare(empty, False, QUIET)
    assert all("is not installed in" in failures[name] for name in peers.PEERS)
    # Of one nothing is known beforehand: its process ends, as torch is not there either.
    del failures["sparseprop"]
    [(_, timings)] = peers.run([Case(24, 16, 5, 0.75)], empty, 1, 1, 1, failures)
    for row in timings.values():
        assert isinstance(row["sparselab"], Timing)
        assert isinstance(row["dense"], Timing)
        assert row["other_sparselab"] == failures["other_sparselab"]
        assert "sparseprop ended with status 1: ModuleNotFoundError" in str(row["sparseprop"])


def test_a_peer_must_come_from_its_environment(tmp_path: Path) -> None:
    inside = tmp_path / "lib" / "sparselab" / "__init__.py"
    peers.check_origin(str(inside), tmp_path)
    own = Path(sparselab.__file__)
    for wrong, environment in ((own, tmp_path), (own, own.parents[1]), (inside, tmp_path / "other")):
        with pytest.raises(TurnError, match="the peer was imported from"):
            peers.check_origin(str(wrong), environment)


def test_an_installed_version_is_recognised() -> None:
    assert peers.installed(Path(sys.executable), peers.SHARED[0])
    assert not peers.installed(Path(sys.executable), "torch==0.0.1")
    assert not peers.installed(Path(sys.executable), "no-such-distribution==1")
