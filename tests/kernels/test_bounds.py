"""No kernel reads or writes past the end of what it was given."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.kernels.process import run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made with Linux's mprotect")


def test_products_stay_within_their_operands() -> None:
    assert run_python("-m", "tests.kernels.guarded").strip() == "no read past an end"


def test_the_guard_catches_one_byte() -> None:
    ended = subprocess.run([sys.executable, "-m", "tests.kernels.guarded", "overrun"], capture_output=True)
    assert ended.returncode < 0, ended
