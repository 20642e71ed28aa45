"""Settings of every test: what hypothesis tries, the marks, and what the processes of one run share."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Threads of OpenMP, and of NumPy's OpenBLAS, spin while they wait for the next loop. With small arrays, and a
# worker process on each core, that is most of what they do. The libraries read this when they are loaded, so
# nothing above imports them; processes of tests inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The same examples each time, and no complaint of a slow machine. More are tried by make test-all, which
# asks for --hypothesis-profile thorough.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
settings.register_profile("thorough", settings.get_profile("repeatable"), max_examples=50)
settings.load_profile("repeatable")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Back to the profile asked for: torch's cases for modules load another one when they are imported."""
    settings.load_profile(session.config.getoption("--hypothesis-profile") or "repeatable")


@pytest.fixture(autouse=True, scope="module")
def _garbage_does_not_pile_up() -> None:
    """Let the collector look at what the tests of a module make and at nothing older, so that it comes often.

    Models and their algorithms hold each other, and each algorithm that is alive looks at every step of an
    optimizer. The second call tells the collector how little is left to look at: it comes once that has grown
    by a quarter.
    """
    gc.collect()
    gc.freeze()
    gc.collect()


@pytest.fixture(autouse=True, scope="session")
def _threads_for_the_least_work() -> None:
    """Small matrices run the code of several threads too."""
    from sparselab.kernels.cpu.runtime import launch as _launch

    _launch._MIN_WORK = 1


@pytest.fixture(scope="session")
def shared_directory(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A directory that all worker processes of this run have in common; see `tests.shared.once`."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent
