"""Topology travels in state_dict, and a wrong one is refused before anything changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparselab import SparseLinear


def make_pair() -> tuple[SparseLinear, SparseLinear]:
    return SparseLinear(30, 20, sparsity=0.8), SparseLinear(30, 20, sparsity=0.5)


def test_loads_into_a_layer_with_another_topology() -> None:
    source, target = make_pair()
    parameter = target.weight_values
    target(torch.randn(2, 30))  # so that there are plans to go stale
    assert target.load_state_dict(source.state_dict()) == ([], [])
    assert target.weight_values is parameter
    assert target.nnz == source.nnz
    x = torch.randn(5, 30)
    assert torch.equal(target(x), source(x))
    with torch.no_grad():
        source.weight_values.zero_()
    assert not torch.equal(target(x), source(x))


def test_survives_a_file_with_weights_only(tmp_path: Any) -> None:
    source, target = make_pair()
    torch.save(source.state_dict(), tmp_path / "layer.pt")
    target.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    x = torch.randn(5, 30)
    assert torch.equal(target(x), source(x))


def test_loads_by_assignment() -> None:
    source, target = make_pair()
    target.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(5, 30)
    assert torch.equal(target(x), source(x))


def test_loads_within_a_model_and_from_another_float_dtype() -> None:
    source, target = (nn.Sequential(nn.Linear(4, 30), layer) for layer in make_pair())
    target.load_state_dict(source.double().state_dict())
    assert target[1].weight_values.dtype == torch.float32
    x = torch.randn(3, 4)
    torch.testing.assert_close(target(x), source(x.double()).float())


def test_loads_while_an_optimizer_holds_the_parameter() -> None:
    source, target = make_pair()
    optimizer = torch.optim.SGD(target.parameters(), lr=1.0)
    target.load_state_dict(source.state_dict())
    target(torch.ones(1, 30)).sum().backward()
    optimizer.step()
    assert torch.equal(target.weight_values, source.weight_values - 1)


def test_a_state_may_be_strided_and_read_only() -> None:
    source, target = make_pair()
    state = {name: torch.stack([tensor, tensor], 1)[:, 0] for name, tensor in source.state_dict().items()}
    x = torch.randn(5, 30)
    for assign in (False, True):
        target.load_state_dict(state, assign=assign)
        assert torch.equal(target(x), source(x))
    assert not target.indptr.is_contiguous()


def test_loads_into_a_layer_without_memory() -> None:
    source = SparseLinear(30, 20, sparsity=0.8)
    target = SparseLinear(30, 20, sparsity=0.5, device="meta")
    target.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(5, 30)
    assert torch.equal(target(x), source(x))


def test_missing_and_unexpected_keys_are_reported_as_by_torch() -> None:
    source, target = make_pair()
    state = source.state_dict()
    del state["bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict(state)
    assert target.load_state_dict(state, strict=False).missing_keys == ["bias"]
    with pytest.raises(RuntimeError, match="Unexpected key"):
        target.load_state_dict({**source.state_dict(), "more": torch.zeros(1)})
    before = target.weight_values.clone()
    assert set(target.load_state_dict({}, strict=False).missing_keys) == set(state) | {"bias"}
    assert torch.equal(target.weight_values, before)


def edit(name: str, change: Any) -> Any:
    """A state with one tensor changed; `change` gets a copy."""

    def apply(state: dict[str, Tensor]) -> dict[str, Tensor]:
        tensor = state[name].clone()
        replaced = change(tensor)
        return {**state, name: tensor if replaced is None else replaced}

    return apply


def swap_first_two(indices: Tensor) -> None:
    first, second = indices[:2].tolist()
    indices[0], indices[1] = second, first


def put(index: int, value: int) -> Any:
    def change(tensor: Tensor) -> None:
        tensor[index] = value

    return change


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


HOSTILE = {
    "unsorted columns": (edit("indices", swap_first_two), "indices must be strictly ascending within a row"),
    "duplicate": (
        edit(
            "indices", lambda t: t[1:2].expand(2).clone().new_tensor([t[1], *t[1:].tolist()], dtype=t.dtype)
        ),
        "indices must be strictly ascending within a row",
    ),
    "column out of range": (edit("indices", put(-1, 30)), r"indices must be columns of 0\.\.29, got 30"),
    "float columns": (
        edit("indices", lambda t: t.float()),
        "indices must be uint16, int32 or int64 of one dimension, got torch.float32",
    ),
    "too few columns": (edit("indices", lambda t: t[:-1]), r"weight_values must be .* \(119, 1, 1\)"),
    "falling indptr": (edit("indptr", put(3, 1000)), "indptr must start at 0 or above and never decrease"),
    "indptr not from 0": (edit("indptr", put(0, 1)), "indptr must start at 0, got 1"),
    "negative indptr": (edit("indptr", put(0, -(2**62))), "indptr must start at 0"),
    "indptr past the end": (edit("indptr", put(-1, 10**9)), "indices must have shape"),
    "short indptr": (edit("indptr", lambda t: t[:-1]), r"indptr must be int64 of shape \(21,\)"),
    "narrow indptr": (edit("indptr", lambda t: t.int()), "indptr must be int64 of shape"),
    "too few values": (
        edit("weight_values", lambda t: t[:-1]),
        r"weight_values must be .* \(120, 1, 1\), got .* \(119, 1, 1\)",
    ),
    "integer values": (edit("weight_values", lambda t: t.long()), "weight_values must be floating point"),
    "values of two dimensions": (
        edit("weight_values", lambda t: t.view(2, -1)),
        r"weight_values .* \(120, 1, 1\)",
    ),
    "bfloat16 columns": (edit("indices", lambda t: t.bfloat16()), "indices must be uint16, int32 or int64"),
    "columns of two dimensions": (
        edit("indices", lambda t: t.view(2, -1)),
        "indices must be uint16, int32 or int64 of one dimension",
    ),
    "bfloat16 indptr": (edit("indptr", lambda t: t.bfloat16()), "indptr must be int64 .* got torch.bfloat16"),
    "indptr without dimensions": (edit("indptr", lambda t: t[0]), r"indptr must be int64 of shape \(21,\)"),
    "complex values": (edit("weight_values", lambda t: t + 0j), "weight_values must be floating point"),
    "no data": (
        edit("weight_values", lambda t: t.to("meta")),
        "weight_values must hold data, got a tensor on the meta device",
    ),
    "no values": (
        lambda state: without(state, "weight_values"),
        "must be loaded together, got no weight_values",
    ),
    "no indptr": (lambda state: without(state, "indptr"), "must be loaded together, got no indptr"),
    "no indices": (lambda state: without(state, "indices"), "must be loaded together, got no indices"),
    "not a tensor": (
        lambda state: {**state, "weight_values": [1.0]},
        "weight_values must be a tensor, got list",
    ),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_state_is_refused_and_changes_nothing(what: str, assign: bool) -> None:
    source, target = make_pair()
    change, message = HOSTILE[what]
    x = torch.randn(5, 30)
    before, kept = target(x), copy.deepcopy(target.state_dict())
    model = nn.ModuleDict({"inner": target})
    state = {f"inner.{name}": tensor for name, tensor in change(source.state_dict()).items()}
    with pytest.raises(RuntimeError, match=message) as error:
        model.load_state_dict(state, strict=False, assign=assign)
    assert "inner: " in str(error.value)
    assert torch.equal(target(x), before)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, kept[name])


@pytest.mark.parametrize("assign", [False, True])
def test_wide_columns_become_narrow_only_where_they_fit(assign: bool) -> None:
    source, target = make_pair()
    state = source.state_dict()
    state["indices"] = state["indices"].long()
    target.load_state_dict(state, assign=assign)
    assert target.indices.dtype == torch.uint16
    state["indices"][-1] += 1 << 16  # the same column after truncation
    with pytest.raises(RuntimeError, match="indices must be columns"):
        target.load_state_dict(state)
