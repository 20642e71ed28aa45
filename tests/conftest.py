"""Settings of every test: hypothesis repeats itself, and thread counts do not leak from test to test."""

from __future__ import annotations

from collections.abc import Iterator

import numba
import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=40)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "any_width: also run in a process of its own for other vector widths")


@pytest.fixture(autouse=True)
def _thread_count() -> Iterator[None]:
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)
