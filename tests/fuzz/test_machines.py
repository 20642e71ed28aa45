"""The fuzzer's steps as Hypothesis state machines, which shrink what they find; short runs of the driver."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.fuzz import concurrency, kernel_products, kernel_state, kernel_steps, layer_sequence
from tests.fuzz.__main__ import KERNELS, TORCH
from tests.fuzz.case import Case, Skipped
from tests.fuzz.driver import Driver
from tests.fuzz.layer_draw import draw_layer
from tests.fuzz.report import tables

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guard pages and fork are Linux's")

SEEDS = st.integers(0, 2**32 - 1)
#: Steps that find faults by ending the process are left to the driver, and what is done to the whole machine.
KERNEL_STEPS = [
    kernel_products.multiply, kernel_products.multiply, kernel_products.wrong_operand,
    kernel_products.read_only_out, kernel_steps.rewrite, kernel_steps.rewrite_wrong, kernel_steps.with_values,
    kernel_steps.convert, kernel_steps.construct_wrong, kernel_steps.from_positions, kernel_steps.edit,
    kernel_steps.set_attribute, kernel_steps.from_scipy,
]  # fmt: skip
#: What one process runs, as its start takes longer than the cases of a kind.
CONVOLUTIONS = [name for name in TORCH if "Conv" in name]
RUNS = {
    **{name: [name] for name in (*KERNELS, "operators")},
    "convolutions": [*CONVOLUTIONS, "masked"],
    "others": [name for name in TORCH if name not in (*CONVOLUTIONS, "masked", "operators")],
}
LAYER_STEPS = [step for step, _ in layer_sequence.STEPS if step is not layer_sequence.short_saved_tensor]


def machine(begin: Callable[[Case], Any], steps: list[Callable[[Case, Any], None]]) -> Any:
    """A state machine: a state from a seed, then steps, each with a seed of its own."""

    class Machine(RuleBasedStateMachine):
        @initialize(seed=SEEDS)
        def start(self, seed: int) -> None:
            self.case = Case("machine", seed)
            self.state = begin(self.case)

        @rule(step=st.sampled_from(steps), seed=SEEDS)
        def call(self, step: Callable[[Case, Any], None], seed: int) -> None:
            self.case.rng = np.random.default_rng(seed)
            before = getattr(self.state, "W", None)
            try:
                step(self.case, self.state)
            except Skipped:
                return
            if getattr(self.state, "W", None) is not before:
                self.state.plans = {}
            self.state.check(f"after {self.case.label.operation}, {self.case.label.mutation}")

    return Machine


def run(made: Any) -> None:
    """Run it with half as many examples as the profile has, each of them long."""
    examples = max(4, settings().max_examples // 2)
    run_state_machine_as_test(
        made, settings=settings(max_examples=examples, stateful_step_count=20, report_multiple_bugs=False)
    )


@pytest.mark.parametrize("begin", [kernel_state.draw_padded, kernel_state.draw_blocks], ids=["csr", "blocks"])
def test_matrices_are_their_dense_twins(begin: Callable[[Case], Any]) -> None:
    run(machine(begin, KERNEL_STEPS))


@pytest.mark.parametrize("kind", layer_sequence.KINDS)
def test_layers_are_their_dense_twins(kind: str) -> None:
    def begin(case: Case) -> layer_sequence.State:
        layer, twin = draw_layer(case, kind)
        return layer_sequence.State(kind, layer, twin)

    run(machine(begin, LAYER_STEPS))


@pytest.mark.parametrize("families", RUNS.values(), ids=RUNS)
def test_a_short_run_finds_no_fault(families: list[str]) -> None:
    n_seeds = settings().max_examples // 4
    n_cases = len(families) * n_seeds
    driver = Driver(families, seconds=3600, last_seed=n_seeds)
    driver.run()
    assert driver.cases >= n_cases
    assert not driver.findings, tables(driver, triage=True)


@pytest.mark.parametrize(
    "way",
    [
        "threads",
        "fork",
        "DataLoader",
    ],
)
def test_callers_at_once_get_the_bits_of_one(way: str) -> None:
    calls = concurrency.make_calls()
    assert not concurrency.repeat(calls, len(calls), 0)
    assert not concurrency.WAYS[way](calls, 200)


def test_a_call_with_other_bits_is_seen() -> None:
    calls = concurrency.make_calls()[:3]
    calls[1].expected = calls[1].expected[:-1] + bytes([calls[1].expected[-1] ^ 1])
    for way in concurrency.WAYS.values():
        assert sum(way(calls, 60).values()) > 0
