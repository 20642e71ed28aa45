"""Bags of words, on a layer small enough to test."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from rich.console import Console

from benchmarks import bags
from sparselab import SparseLinear
from sparselab.nn.ops.cpu import sparse_input

TINY = bags.Bags(40, 8, 6, 3)


def test_all_arms_are_timed_and_the_rule_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bags, "CASES", (TINY,))
    rule = sparse_input.DENSE_FROM
    (row,) = bags.report(Namespace(rounds=1), Console(width=150))
    assert row["case"] == "40->8, 6 bags of 3"
    assert all(row[name] > 0 for name in bags.ARMS)
    assert rule == sparse_input.DENSE_FROM


def test_both_ways_are_the_same_product() -> None:
    layer, x = SparseLinear(40, 8, sparsity=0.5), bags.draw(TINY)
    found = []
    for density in (0.0, 2.0):
        with bags.entries_below(density):
            found.append(layer(x))
    torch.testing.assert_close(*found)
    torch.testing.assert_close(found[0], layer(x.to_dense()))
