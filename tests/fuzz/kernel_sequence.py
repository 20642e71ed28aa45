"""Sequences of steps on one matrix."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.fuzz import adapter, kernel_products, kernel_steps
from tests.fuzz.case import Case, Skipped
from tests.fuzz.kernel_state import State, draw_blocks, draw_padded

STEPS = [*kernel_steps.STEPS, *kernel_products.STEPS]
_WEIGHTS = np.array([weight for _, weight in STEPS])
_WEIGHTS /= _WEIGHTS.sum()


def _run(case: Case, state: State) -> None:
    adapter.use_threads(case.pick((1, 1, 2, 3)))
    for _ in range(int(case.rng.integers(4, 25))):
        case.next_step()
        step, _ = STEPS[int(case.rng.choice(len(STEPS), p=_WEIGHTS))]
        before = state.W
        try:
            step(case, state)
        except Skipped:
            continue
        if state.W is not before:
            state.plans = {}
        state.check(f"the matrix after {case.label.operation}, {case.label.mutation}")


def run_padded(case: Case) -> None:
    """A sequence on a `PaddedCSR`."""
    _run(case, draw_padded(case))


def run_blocks(case: Case) -> None:
    """A sequence on a `BlockCSR`."""
    _run(case, draw_blocks(case))


FAMILIES: dict[str, Callable[[Case], None]] = {"PaddedCSR": run_padded, "BlockCSR": run_blocks}
