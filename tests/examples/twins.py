"""What the arms of one example must have in common, above all a masked and a sparse one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from arms import ARMS, Result
from torch import nn

import sparselab


@contextmanager
def float64() -> Iterator[None]:
    """New tensors hold so many bits that rounding does not change which connections are chosen."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def topology(model: nn.Module) -> dict[str, list[int]]:
    return {name: layer.positions().tolist() for name, layer in sparselab.nn.find_sparse(model)}


def assert_compared(results: list[Result], printed: str) -> None:
    """All arms are in the table, and those that are not dense have the same few weights."""
    assert [each.name for each in results] == list(ARMS)
    assert all(name in printed for name in ARMS)
    dense, *others = (each.weights for each in results)
    assert len(set(others)) == 1
    assert others[0] < 0.2 * dense


def assert_twins(masked: Result, sparse: Result, born: nn.Module) -> None:
    """The same losses and the same connections, in every layer others than it was born with."""
    kinds = [{type(layer) for _, layer in sparselab.nn.find_sparse(each.model)} for each in (masked, sparse)]
    assert kinds == [{sparselab.MaskedLinear}, {sparselab.SparseLinear}]
    first, found = topology(born), topology(sparse.model)
    assert found == topology(masked.model)
    assert first.keys() == found.keys()
    assert all(found[name] != first[name] for name in first)
    expected, losses = (torch.tensor(each.losses, dtype=torch.float64) for each in (masked, sparse))
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
