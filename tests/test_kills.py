"""Kill -9 at random moments: what is on the disk is whole, and the run goes on to the same bits."""

from __future__ import annotations

import os

import pytest

from tests.kernels.process import run_python


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_as_one_that_never_was(kills: int) -> None:
    assert "same" in run_python("-m", "tests.kills", str(kills), OMP_NUM_THREADS="1")
