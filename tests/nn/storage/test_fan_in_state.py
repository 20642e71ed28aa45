"""A saved state of FanInLinear that is not valid is refused before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nn.layers.test_fan_in import check, make


def change(name: str, replace: Any) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    return lambda state: {**state, name: replace(state[name].clone())}


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


HOSTILE = {
    "unsorted columns": (
        change("indices", lambda t: t.int().view(18, 6).flip(1).flatten()),
        "strictly ascending within a row",
    ),
    "column out of range": (
        change("indices", lambda t: t.int() + 30),
        r"indices must be columns of 0\.\.29",
    ),
    "flat": (change("weight_values", lambda t: t.flatten()), r"weight_values must be .* \(108, 1, 1\)"),
    "too few columns": (
        change("indices", lambda t: t[:-1]),
        "equally many columns for each of 18 rows, got 107",
    ),
    "columns of two dimensions": (
        change("indices", lambda t: t.view(18, 6)),
        "indices must have one dimension",
    ),
    "float columns": (change("indices", lambda t: t.float()), "indices must be uint16, int32 or int64"),
    "integer values": (change("weight_values", lambda t: t.long()), "weight_values must be floating point"),
    "no rows": (lambda state: {**state, "rows": None}, "equally many columns for each of 20 rows, got 108"),
    "no rows where all could share": (
        lambda state: {
            **state,
            "rows": None,
            "indices": state["indices"].int()[:100],
            "weight_values": state["weight_values"][:100],
        },
        "fan_in must be 5 for 100 columns of 20 rows, got 6; are the rows missing",
    ),
    "another fan-in": (change("fan_in", lambda t: t + 1), "fan_in must be 6 for 108 .*, got 7"),
    "a list of fan-ins": (change("fan_in", lambda t: t.repeat(18)), r"fan_in must be .*, got torch.int64"),
    "narrow fan-in": (change("fan_in", lambda t: t.int()), "fan_in must be int64"),
    "infinite fan-in": (
        lambda state: {**state, "fan_in": torch.tensor(float("inf"))},
        "fan_in must be int64",
    ),
    "complex fan-in": (lambda state: {**state, "fan_in": torch.tensor(4j)}, "fan_in must be int64"),
    "sparse rows": (change("rows", lambda t: t.to_sparse()), "rows must be a dense tensor"),
    "sparse columns": (change("indices", lambda t: t.int().to_sparse()), "indices must be a dense tensor"),
    "columns without memory": (change("indices", freed), "indices must have memory"),
    "weights without memory": (change("weight_values", freed), "weight_values must have memory"),
    "no fan-in": (lambda state: {**state, "fan_in": None}, "must be loaded together, got no fan_in"),
    "few rows": (change("rows", lambda t: t[1:]), "equally many columns for each of 17 rows, got 108"),
    "narrow rows": (change("rows", lambda t: t.int()), "rows must be int64"),
    "unsorted rows": (change("rows", lambda t: t.flip(0)), r"rows must be strictly ascending outputs of 0"),
    "rows twice": (change("rows", lambda t: t.clamp(min=3)), "rows must be strictly ascending"),
    "negative rows": (change("rows", lambda t: t - 9), "rows must be strictly ascending"),
    "rows out of range": (change("rows", lambda t: t + 9), "rows must be strictly ascending"),
    "meta rows": (change("rows", lambda t: t.to("meta")), "rows must hold data"),
    "no values": (
        lambda state: {**state, "weight_values": None},
        "must be loaded together, got no weight_values",
    ),
    "no indices": (lambda state: {**state, "indices": None}, "must be loaded together, got no indices"),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_state_is_refused_and_changes_nothing(what: str, assign: bool) -> None:
    source, target = make(0, 7), make(3)
    edit, message = HOSTILE[what]
    state = {name: tensor for name, tensor in edit(source.state_dict()).items() if tensor is not None}
    kept = copy.deepcopy(target.state_dict())
    with pytest.raises(RuntimeError, match=message):
        target.load_state_dict(state, strict=False, assign=assign)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, kept[name])
    check(target)


def test_missing_and_unexpected_keys_are_reported_as_by_torch() -> None:
    state = make(3).state_dict()
    assert make().load_state_dict({**state, "more": state["bias"]}, strict=False).unexpected_keys == ["more"]
    assert set(make().load_state_dict({}, strict=False).missing_keys) == {"weight_values", "indices", "bias"}


def test_a_layer_without_any_connection_needs_no_rows() -> None:
    layer = make(0)
    layer.set_topology(torch.zeros(layer.shape, dtype=torch.bool))
    state = copy.deepcopy(layer.state_dict())
    assert "rows" not in state
    assert state["fan_in"] == 0
    other = make(1)
    other.load_state_dict(state)
    assert other.nnz == other.fan_in == 0
    assert torch.equal(other.indptr, layer.indptr)
