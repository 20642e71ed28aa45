"""What each target of the Makefile installs, and when: make itself, with a Python that only takes notes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels.process import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

PYTHON = """#!/bin/sh
case "$*" in
  *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"--editable"*) for last; do :; done; echo "install $last" >> calls ;;
  *"-m pip"*|"-c "*|"--version") ;;
  *) echo "run $*" >> calls ;;
esac
"""
EXAMPLES = "install .[examples]"
ALL = "install .[test,lint,examples]"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def calls(clone: Path, target: str) -> list[str]:
    """What `make target` installs and runs."""
    log = clone / "calls"
    log.write_text("")
    command = ["make", "--silent", target, "PYTHON=./python"]
    subprocess.run(command, cwd=clone, check=True, capture_output=True, env={**os.environ, "MAKEFLAGS": ""})
    return log.read_text().splitlines()


@pytest.mark.parametrize("target", ["demo", "mnist", "bench"])
def test_examples_install_only_what_they_need_and_once(clone: Path, target: str) -> None:
    first, *runs = calls(clone, target)
    assert first == EXAMPLES
    assert len(runs) == 1
    assert calls(clone, target) == runs


@pytest.mark.parametrize("target", ["test", "test-all", "fuzz", "lint"])
def test_tests_and_checks_install_all_and_once(clone: Path, target: str) -> None:
    assert ALL in calls(clone, target)
    again = [*calls(clone, target), *calls(clone, "demo")]
    assert again
    assert all(call.startswith("run ") for call in again)


def test_a_smaller_installation_does_not_stand_for_the_larger(clone: Path) -> None:
    calls(clone, "demo")
    assert calls(clone, "test")[0] == ALL


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_installs_again(clone: Path, changed: str) -> None:
    calls(clone, "test")
    for target, installed in (("lint", ALL), ("demo", EXAMPLES)):
        newest = max(path.stat().st_mtime_ns for path in (clone / ".venv").glob(".*"))
        while (clone / changed).stat().st_mtime_ns <= newest:  # clocks of files tick slowly
            os.utime(clone / changed)
        assert installed in calls(clone, target)
