"""Steps with an update are told from those without."""

from __future__ import annotations

from typing import Any

import pytest

import sparselab
from benchmarks import updates


def test_each_kind_of_step_is_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(updates.time, "perf_counter", lambda: clock[0])
    attach = sparselab.RigL.attach

    def attach_slow(self: Any, model: Any, optimizer: Any) -> Any:
        handle = attach(self, model, optimizer)
        after = [False]

        def advance(*_: Any) -> None:
            now = self.is_update_step(self.steps_done)
            clock[0] += 9e-3 if now else 2e-3 if after[0] else 1e-3
            after[0] = now

        optimizer.register_step_post_hook(advance)
        return handle

    monkeypatch.setattr(sparselab.RigL, "attach", attach_slow)
    found = updates.run(32, 8, 0.5, updates=2)
    assert found == pytest.approx({"step": 1.0, "step with an update": 9.0, "step after it": 2.0})
