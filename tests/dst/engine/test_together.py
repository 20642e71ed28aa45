"""Processes that hold replicas rewire them alike, and as one process with the whole batch would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from tests.dst.contract_rows import ROWS
from tests.dst.ranks import run_ranks
from tests.dst.replica_runs import Case, alone, replicas

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

#: Weights and losses are of float64, and sums over tokens in another order: of weights of about 1, after 30
#: steps, this is ten thousand times the rounding of one sum, and a millionth of what an update changes.
BOUND = 1e-12

CANDIDATES = {"growth": "candidates", "candidates": 3}
VIEWS, STATIC, UNUSED = (
    {name: True} for name in ("gradient_as_bucket_view", "static_graph", "find_unused_parameters")
)

#: What must end as one process does.
EXACT = {
    **{name: Case(name) for name in ROWS},
    "group": Case("group"),
    "rigl of many tokens": Case("rigl", tokens=128),
    "rigl of blocks": Case("rigl", "block"),
    "rigl of blocks of many tokens": Case("rigl", "block", tokens=128),
    "rigl of convolutions": Case("rigl", "conv"),
    "gse of convolutions": Case("gse grabo", "conv"),
    "srigl of fan-in": Case("srigl", "fan-in"),
    "rigl of masks": Case("rigl", "masked"),
    **{f"{name} in several passes": Case(name, passes=3) for name in ("gmp", "snfs")},
    "granet of views": Case("granet", ddp=VIEWS),
    "granet of views in synchronised passes": Case("granet", ddp=VIEWS, passes=2, sync=True),
    "snfs of views, zeroed": Case("snfs", ddp=VIEWS, passes=2, clear=False),
    "granet of a static graph": Case("granet", ddp=STATIC, passes=3),
    "dsr that looks for unused": Case("dsr", ddp=UNUSED),
    **{f"{name} in shards": Case(name, optimizer="adamw zero") for name in ("gmp", "snfs", "rigl")},
    **{f"{name} before the wrapper": Case(name, attach_first=True) for name in ("topkast", "snfs")},
    # All that is wanted is among what is proposed here.
    "rigl by candidates": Case("rigl", replicas=CANDIDATES, tokens=128),
    "srigl by candidates": Case("srigl", replicas=CANDIDATES, tokens=128),
    "rigl by candidates of blocks": Case("rigl", "block", replicas=CANDIDATES, tokens=128),
    "gse by candidates": Case("gse graest of the network", replicas=CANDIDATES),
}
#: Further ones, which the slow tests try.
MORE = {
    **{f"{name} of many tokens": Case(name, tokens=128) for name in ("srigl", "rigl by row", "granet")},
    **{f"{name} of blocks": Case(name, "block") for name in ("granet", "mest em&s")},
    **{f"{name} in several passes": Case(name, passes=3) for name in ("rigl", "mest em&s")},
    "granet in synchronised passes": Case("granet", passes=2, sync=True),
    "granet of many buckets": Case("granet", ddp={"bucket_cap_mb": 0.001}),
    "gmp of a static graph of views": Case("gmp", ddp={**STATIC, **VIEWS}),
    "srigl before the wrapper": Case("srigl", attach_first=True),
    "rigl by candidates of convolutions": Case("rigl", "conv", replicas=CANDIDATES),
    "dsr in shards": Case("dsr", optimizer="adamw zero"),
}
#: What ends near it.
NEAR = {
    "rigl by candidates of rows": Case("rigl by row", replicas={"growth": "candidates"}, tokens=128),
    "granet by few candidates": Case(
        "granet", replicas={"growth": "candidates", "candidates": 1}, tokens=128
    ),
    "gmp in bfloat16": Case("gmp", hook=True),
    "rigl in bfloat16 of views": Case("rigl", hook=True, ddp=VIEWS),
}
#: Resumed by two processes from what one has saved, and by four from what two have.
RESUMED = ("rigl", "snfs", "deepr", "dsr", "srigl", "topkast", "gmp in shards")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has come to, in all cases."""
    return run_ranks(replicas, 2, tmp_path_factory.mktemp("ranks"), {**EXACT, **NEAR}, {})


def assert_same(first: dict[str, Any], second: dict[str, Any], bound: float = 0.0) -> None:
    for ours, theirs in zip(first["positions"], second["positions"], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for name in ("weights", "losses"):
        for one, other in zip(first[name], second[name], strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=bound)
    assert first["updates"] == second["updates"]


@pytest.mark.parametrize("name", EXACT)
def test_replicas_train_as_one_process(both: list[dict[str, Any]], name: str) -> None:
    assert_as_one(both, name, EXACT[name])


@pytest.mark.slow
def test_more_replicas_train_as_one_process(tmp_path: Path) -> None:
    found = run_ranks(replicas, 2, tmp_path, MORE, {})
    for name, case in MORE.items():
        assert_as_one(found, name, case)


def assert_as_one(both: list[dict[str, Any]], name: str, case: Case) -> None:
    first, second = (each[name] for each in both)
    assert_same(first, second)
    expected = alone(case)
    assert_same(first, expected, BOUND)
    if name != "static":
        assert all(not report.skipped for report in first["updates"])
        assert sum(report.dropped for report in first["updates"])


@pytest.mark.parametrize("name", NEAR)
def test_replicas_train_nearly_as_one_process(both: list[dict[str, Any]], name: str) -> None:
    first, second = (each[name] for each in both)
    assert_same(first, second)
    expected = alone(NEAR[name])
    for ours, theirs in zip(first["positions"], expected["positions"], strict=True):
        assert len(ours) == len(theirs)
        assert len(np.intersect1d(ours, theirs)) >= 0.9 * len(ours)
    np.testing.assert_allclose(first["losses"], expected["losses"], rtol=0, atol=0.02)


@pytest.mark.parametrize("name", [*ROWS, "group", "gmp in shards", "snfs in shards", "srigl of fan-in"])
def test_one_process_goes_on_from_what_two_have_saved(both: list[dict[str, Any]], name: str) -> None:
    found = both[0][name]
    resumed = alone(EXACT[name], found["saved"], seed=5)
    assert_same(resumed, {**found, "losses": found["losses"][-len(resumed["losses"]) :]}, BOUND)


@pytest.mark.slow
def test_four_processes_go_on_from_what_two_have_saved(both: list[dict[str, Any]], tmp_path: Path) -> None:
    saved = {name: both[0][name]["saved"] for name in RESUMED}
    four = run_ranks(replicas, 4, tmp_path, {name: EXACT[name] for name in RESUMED}, saved)
    for name in RESUMED:
        found = both[0][name]
        for each in four:
            assert_same(each[name], four[0][name])
        resumed = four[0][name]
        assert_same(resumed, {**found, "losses": found["losses"][-len(resumed["losses"]) :]}, BOUND)
