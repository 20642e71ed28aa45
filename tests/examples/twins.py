"""What a masked and a sparse run of one example must have in common."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
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


def assert_twins(masked, sparse, born: nn.Module) -> None:
    """Two runs, with ``.model`` and ``.losses``: the same losses, and connections that are not the first."""
    assert [type(layer) for _, layer in sparselab.nn.find_sparse(masked.model)] != [
        type(layer) for _, layer in sparselab.nn.find_sparse(sparse.model)
    ]
    first, found = topology(born), topology(sparse.model)
    assert found == topology(masked.model)
    assert first.keys() == found.keys()
    assert all(found[name] != first[name] for name in first)
    torch.testing.assert_close(
        torch.tensor(sparse.losses), torch.tensor(masked.losses), rtol=1e-9, atol=1e-12
    )
