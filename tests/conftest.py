"""Settings of every test: hypothesis tries the same examples each time."""

from __future__ import annotations

import pytest
from hypothesis import settings

from sparselab.kernels.cpu.runtime import launch as _launch

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=40)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "any_width: also run in a process of its own for other vector widths")


@pytest.fixture(autouse=True, scope="session")
def _threads_for_the_least_work() -> None:
    """Small matrices run the code of several threads too."""
    _launch._MIN_WORK = 1
