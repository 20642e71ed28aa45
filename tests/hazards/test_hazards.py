"""Every hazard is right or refused, and the runner tells a wrong number and an accident from both."""

from __future__ import annotations

import pytest

from tests.hazards import programs  # noqa: F401
from tests.hazards.cases import HAZARDS, Hazard, Wrong, outcome_of


@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda hazard: f"{hazard.topic}: {hazard.name}")
def test_it_is_right_or_refused(hazard: Hazard) -> None:
    outcome = outcome_of(hazard)
    assert not outcome.is_fault, outcome


def test_faults_are_told_from_refusals() -> None:
    def wrong() -> None:
        raise Wrong("off by one")

    def refusing() -> None:
        raise ValueError("x must be 1, got 2")

    def accident() -> None:
        raise KeyError("x")

    assert outcome_of(Hazard("t", "n", wrong, True)).kind == "WRONG"
    assert outcome_of(Hazard("t", "n", refusing, True)).kind == "refused"
    assert outcome_of(Hazard("t", "n", refusing, False)).is_fault
    assert outcome_of(Hazard("t", "n", accident, True)).is_fault
    assert not outcome_of(Hazard("t", "n", lambda: "yes", False)).is_fault
