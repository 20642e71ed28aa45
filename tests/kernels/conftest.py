"""Thread counts do not leak from test to test."""

from __future__ import annotations

from collections.abc import Iterator

import numba
import pytest


@pytest.fixture(autouse=True)
def _thread_count() -> Iterator[None]:
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)
