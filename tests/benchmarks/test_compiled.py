"""Steps under `torch.compile`, of a transformer small enough to test."""

from __future__ import annotations

import pytest

from benchmarks import compiled
from tests.benchmarks.test_models import TINY


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_all_arms_are_measured_and_whole_models_are_one_graph() -> None:
    arms = compiled.run(TINY, rounds=2, backend="aot_eager")
    assert list(arms) == ["dense", "dense compiled", "sparse", "sparse compiled"]
    assert all(arm.step_ms.median > 0 for arm in arms.values())
    assert [(arm.graphs, arm.breaks) for arm in arms.values()] == [(0, 0), (1, 0), (0, 0), (1, 0)]
    assert arms["sparse compiled"].compile_seconds > 0 == arms["sparse"].compile_seconds
