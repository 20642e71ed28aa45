"""Kill -9 at random moments of ``gpt.py``: checkpoints are whole, and the run goes on to the same bits."""

from __future__ import annotations

import os

import pytest

from tests.kernels.process import run_python


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_the_script_ends_as_if_it_had_never_been_killed() -> None:
    assert "same curve and weights" in run_python("-m", "tests.examples.kills", "20", OMP_NUM_THREADS="1")
