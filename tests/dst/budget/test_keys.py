"""Budgets and pruning choose layers by the keys that `sparsify` takes, and leave what that leaves."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from torch import nn

from sparselab import (
    sparsify,
)
from sparselab.dst import allocate, prune
from tests.nn.models.samples import ALL, Net, sparsities, tied

KEYWORDS: dict[str, tuple[Any, list[str]]] = {
    "a class": (nn.Linear, ["fc1", "fc2", "head"]),
    "a function": (lambda module, name: name.startswith("fc"), ["fc1", "fc2"]),
    "an expression": ("re:fc.", ["fc1", "fc2"]),
    "several": ([nn.Conv2d, "head"], ["stem", "head"]),
}


@pytest.mark.parametrize("how", KEYWORDS)
def test_budgets_and_pruning_choose_alike(how: str) -> None:
    keys, expected = KEYWORDS[how]
    others = [name for name in ALL if name not in expected]
    assert list(allocate(Net(), 0.5, include=keys)) == expected
    assert list(allocate(Net(), 0.5, exempt=keys)) == others
    assert list(prune(Net(), 0.5, include=keys)) == expected
    assert list(prune(Net(), 0.5, exempt=keys)) == others
    given = allocate(Net(), 0.5, dict.fromkeys(keys if isinstance(keys, list) else [keys], 0.25))
    assert {name for name, sparsity in given.items() if sparsity == 0.25} == set(expected)


@pytest.mark.parametrize("act", [allocate, prune])
def test_budgets_and_pruning_leave_tied_layers(act: Any) -> None:
    model = tied()
    with pytest.warns(UserWarning, match=r"'lm_head' shares its weight .* A key of exempt leaves"):
        assert list(act(model, 0.5)) == ["body"]
    assert list(act(tied(), 0.5, include=["body", "lm_head"])) == ["embed", "body"]
    twins = nn.ModuleList([nn.Linear(4, 7), nn.Linear(4, 7)])
    twins[0].weight = twins[1].weight
    with pytest.raises(ValueError, match=r"include must not name a layer .* got '1' shares"):
        act(twins, 0.5, include="1")
    with pytest.raises(TypeError, match=r"include must choose layers by a str, .* got 3"):
        act(tied(), 0.5, include=[3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rules = act(tied(), 0.5, exempt="lm_head")
        assert sparsities(sparsify(tied(), {"lm_head": None, **rules})) == {"body": 0.5}
