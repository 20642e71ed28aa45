"""Replicas that would drift apart stop in all processes; other ways to hold them, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.dst.ranks import run_ranks
from tests.dst.replica_runs import Case, alone
from tests.dst.replica_ways import everything, in_groups_of_their_own

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(everything, 2, tmp_path_factory.mktemp("ranks"))


def positions(found: dict[str, Any]) -> list[list[int]]:
    return [each.tolist() for each in found["positions"]]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("nobody_said", ["a world of 2 processes", "replicas=None", "replicas=Replicas(process_group)"]),
        ("the_wrapper_is_gone", ["a world of 2 processes must know", "got none that"]),
        ("one_is_not_wrapped", ["must all be wrapped", "got 2 of 4 layers wrapped, and 1 group"]),
        ("said_alone_but_wrapped", ["must not be wrapped", "a wrapper of 2 processes"]),
        ("seeds_differ", ["with the settings of the first, but those of rank 1 are others"]),
        ("steps_differ", ["with the steps of the first, but those of rank 1 are others: [3, 4]"]),
        ("a_part_strays", ["after the update of step 4, but layer '2' differs in rank 1", "view.rng()"]),
        ("one_is_rewired", ["before the update of step 4, but layer '0' differs in rank 1."]),
        ("gradients_are_apart", ["layer '0' differs in rank 1", "weights had differed before in rank 1"]),
        ("one_is_frozen", ["with the frozen layers of the first, but those of rank 1 are others"]),
        ("uneven_inputs", ["cannot be within join()"]),
        ("shards_in_one_memory", ["made with parameters_as_bucket_view=True"]),
    ],
)
def test_what_would_drift_apart_stops_in_all_processes(
    both: list[dict[str, Any]], name: str, parts: list[str]
) -> None:
    for found in both:
        for part in parts:
            assert part in found[name]


def test_reducers_that_cannot_be_made_again_are_refused(both: list[dict[str, Any]]) -> None:
    for found in both:
        delayed, stepping, unknown = found["reducers_that_cannot_be_made"]
        assert "got one with delay_all_reduce_named_params" in delayed
        assert "got one with optimizers that step within the backward pass" in stepping
        assert "this version of torch has no known way" in unknown


def test_averages_of_other_connections_are_refused(both: list[dict[str, Any]]) -> None:
    for found in both:
        others, more = found["averages_of_other_connections"]
        assert "to be averaged, but layer '0' differs in rank 1; layer '2' differs in rank 1" in others
        assert "the same tensors to be averaged, got [4, 6] of them" in more


def test_processes_train_models_of_their_own(both: list[dict[str, Any]]) -> None:
    expected = [positions(alone(Case("set"), seed=rank)) for rank in range(2)]
    assert expected[0] != expected[1]
    assert [found["each_alone"] for found in both] == [[each, each] for each in expected]


@pytest.mark.slow
def test_pairs_among_four_processes(tmp_path: Path) -> None:
    found = run_ranks(in_groups_of_their_own, 4, tmp_path)
    strays = [each.pop("stray")[0] for each in found]
    for name, first in found[0].items():
        assert positions(found[2][name]) == positions(first)
        assert positions(found[3][name]) == positions(found[1][name]) != positions(first)
    assert positions(found[0]["exact"]) == positions(alone(Case("granet")))
    assert "layer '2' differs in rank 2" in strays[0] == strays[2]
    assert "layer '2' differs in rank 3" in strays[1] == strays[3]


def test_whoever_averages_gradients_needs_no_wrapper(both: list[dict[str, Any]]) -> None:
    for found in both:
        ours, expected = found["kept_alike_by_hand"]
        assert ours == expected


def test_weights_are_averaged_now_and_then(both: list[dict[str, Any]]) -> None:
    assert both[0]["averaged_now_and_then"] == both[1]["averaged_now_and_then"]


def test_what_a_process_has_not_used_counts_as_nothing(both: list[dict[str, Any]]) -> None:
    for found in both:
        for (ours, theirs), (skipped, expected) in found["parts_of_the_model_each"]:
            assert ours == theirs
            assert skipped == expected
    assert both[0]["parts_of_the_model_each"] == both[1]["parts_of_the_model_each"]


def test_a_gradient_that_is_not_finite_in_one_process(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert found["not_finite_in_one"] == [["gradient is not finite"] * 2] * 3


def test_a_gradient_that_one_process_does_not_know(both: list[dict[str, Any]]) -> None:
    first, second = (found["a_gradient_one_does_not_know"] for found in both)
    assert first[2] == second[2] == ["no gradient"] * 2
    assert first[0] == ["the gradient is not known in rank 1", ""]
    assert second[0] == ["part of the gradient is older than the step", ""]
    assert first[1] == second[1] == ["no gradient in rank 1", "no gradient in rank 0", ""]


def test_frozen_layers_are_left_alone(both: list[dict[str, Any]]) -> None:
    assert [found["all_are_frozen"] for found in both] == [["frozen"] * 2] * 2


def test_what_is_in_use_is_shared(both: list[dict[str, Any]]) -> None:
    for found in both:
        in_use, none, nnz, sent = found["masks_are_shared"]
        assert (in_use, none, sent) == (nnz - 1, None, [])


def test_copies_go_on_alike(both: list[dict[str, Any]]) -> None:
    ours, copied = both[0]["copies_go_on"]
    assert ours == copied
    assert both[1]["copies_go_on"] == [ours, copied]


def test_communication_hooks_stay(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert found["hooks_stay"] == ["fp16_compress_hook", "BuiltinCommHookType.FP16_COMPRESS"]


def _dies(rank: int) -> None:
    if rank:
        os._exit(3)
    dist.barrier()


def _fails(rank: int) -> None:
    assert rank == 0, "a reason"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "said"), [(_dies, "Connection|a process|0.error"), (_fails, "a reason")]
)
def test_a_process_that_is_gone_fails_the_test(function: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=said):
        run_ranks(function, 2, tmp_path, seconds=30)
