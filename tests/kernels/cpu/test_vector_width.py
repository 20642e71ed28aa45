"""The products are right for every vector width, on whatever CPU this is."""

from __future__ import annotations

import re

import pytest

from sparselab.kernels.cpu.runtime.target import BLOCK_COLUMNS, TILE_BYTES, VECTOR_BYTES
from tests.kernels.process import run_python

OTHER_WIDTHS = sorted({16, 32, 64} - {VECTOR_BYTES})


@pytest.mark.parametrize("width", OTHER_WIDTHS)
def test_the_marked_tests_pass_for_another_width(width: int) -> None:
    settings = {"SPARSELAB_VECTOR_BYTES": str(width)}
    code = "from sparselab.kernels import _target; print(_target.VECTOR_BYTES)"
    assert run_python("-c", code, **settings).strip() == str(width)
    report = run_python(
        "-m", "pytest", "-q", "-m", "any_width", "tests/kernels", "-p", "no:cacheprovider", **settings
    )
    passed = re.search(r"(\d+) passed", report)
    assert passed, report
    assert int(passed[1]) > 20, report


def test_the_sizes_that_follow_from_the_width() -> None:
    assert TILE_BYTES % VECTOR_BYTES == 0
    assert (32 if VECTOR_BYTES == 64 else 48) * 1024 == TILE_BYTES * BLOCK_COLUMNS
