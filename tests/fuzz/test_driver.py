"""The fuzzer finds each kind of fault, says how to see it again, and survives what it finds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.fuzz import planted
from tests.fuzz.__main__ import KERNELS, TORCH, parse
from tests.fuzz.case import Case, run_case
from tests.fuzz.driver import ENOUGH_CRASHES, Driver, Finding
from tests.fuzz.report import tables
from tests.kernels.process import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guard pages and fork are Linux's")


@pytest.fixture(scope="module")
def driver() -> Driver:
    """A driver that has run every planted fault."""
    names = [f"planted {kind}" for kind in ("crash", "wrong", "unclean", "unnamed", "refused", "fine")]
    made = Driver(names, seconds=600, seed=7, last_seed=7 + ENOUGH_CRASHES + 1)
    made.run()
    return made


def found(driver: Driver, mutation: str) -> list[Finding]:
    return [finding for finding in driver.findings if finding.mutation == mutation]


@pytest.mark.parametrize(
    ("mutation", "kind", "detail"),
    [
        ("crash", "crash", "SIGSEGV"),
        ("wrong", "wrong", "3 instead of 2"),
        ("unclean", "unclean", "KeyError"),
        ("unnamed", "unclean", "names none of out"),
        ("refused", "refused", "ValueError"),
    ],
)
def test_a_planted_fault_is_found(driver: Driver, mutation: str, kind: str, detail: str) -> None:
    findings = found(driver, mutation)
    assert {finding.kind for finding in findings} == {kind}
    assert all(detail in finding.detail for finding in findings)
    assert findings[0].seed == 7


@pytest.mark.parametrize("kind", planted.OFF)
def test_a_gradient_that_is_off_by_a_thousandth_is_found_in_every_case_that_has_one(kind: str) -> None:
    faults = [run_case(Case(kind, seed), planted.FAMILIES[f"planted {kind}"]) for seed in range(12)]
    assert sum(fault is not None for fault in faults) >= 6  # the others have no connections, or no tokens
    assert all("gradient of the weights" in fault.detail for fault in faults if fault is not None)


def test_a_crash_costs_its_case_only_and_is_left_out_after_a_while(driver: Driver) -> None:
    assert [finding.seed for finding in found(driver, "crash")] == [7, 8, 9]
    assert ("planted", "crash") in driver.skip
    assert found(driver, "wrong")  # of the case in which nothing crashes any more
    assert not found(driver, "fine")


def test_a_hang_is_found() -> None:
    driver = Driver(["planted hang"], seconds=60, hang_seconds=2, last_seed=1)
    (finding,) = driver.run()
    assert finding.kind == "hang"
    assert finding.mutation == "hang"


def test_the_tables_count_and_say_how_to_see_it_again(driver: Driver) -> None:
    triage, single = tables(driver, triage=True), tables(driver, triage=False)
    assert "crash       3 x  planted / crash  [planted crash]" in triage
    assert "python -m tests.fuzz --case 7 --layouts 'planted crash'" in single
    assert single.endswith(f"{len(driver.findings)} faults")
    assert tables(Driver([], 0), triage=True).endswith("no fault found")


@pytest.mark.parametrize(("layout", "status"), [("planted wrong", 1), ("planted fine", 0)])
def test_one_case_runs_alone_and_the_exit_status_tells(layout: str, status: int) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--case", "3", "--layouts", layout]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert ("3 instead of 2" in done.stdout) == bool(status)


def test_the_kernels_can_be_tested_without_torch() -> None:
    assert parse(["--no-operators"]).operators is False
    assert not set(KERNELS) & set(TORCH)


@pytest.mark.parametrize("front", [True, False])
def test_a_guard_ends_the_process_before_and_behind_an_array(front: bool) -> None:
    code = f"""
import ctypes, numpy as np
from tests.guards import guarded
array = guarded(np.arange(5.0), front={front})
address = array.ctypes.data - 1 if {front} else array.ctypes.data + array.nbytes
assert array.tolist() == [0, 1, 2, 3, 4]
ctypes.string_at(address, 1)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode < 0, done
