"""Processes that were forked: DataLoader workers, and parent and child that compute at once."""

from __future__ import annotations

import os
import pickle
from functools import partial
from typing import Any

import numpy as np
import torch

import sparselab
from sparselab.kernels import BlockCSR, PaddedCSR, sddmm_dw, spmm, spmm_t
from tests.hazards.cases import demand, hazard


class Embedded(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Samples that a sparse layer has gone over."""

    def __init__(self, layer: Any, x: torch.Tensor) -> None:
        self.layer, self.x = layer, x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            y: torch.Tensor = self.layer(self.x[index])
        return y


@hazard("fork", "a layer in two DataLoader workers", refusable=False)
def workers() -> str:
    torch.manual_seed(0)
    layer, x = sparselab.SparseLinear(1024, 1024, sparsity=0.9), torch.randn(64, 256, 1024)
    with torch.no_grad():
        expected = [layer(each) for each in x]
    loader = torch.utils.data.DataLoader(Embedded(layer, x), batch_size=1, num_workers=2)
    wrong = sum(not torch.equal(got[0], want) for got, want in zip(loader, expected, strict=True))
    demand(wrong == 0, f"{wrong} of 64 samples are wrong")
    return "64 samples, bit for bit"


def _wrong(products: list[Any], expected: list[Any], rounds: int) -> list[int]:
    """How often each product differed from what is expected."""
    return [
        sum(not np.array_equal(product(), each) for _ in range(rounds))
        for product, each in zip(products, expected, strict=True)
    ]


@hazard("fork", "parent and child compute at once, 200 products of each kind", refusable=False)
def at_once() -> str:
    W = PaddedCSR.random((512, 512), 0.9, 0)
    B = BlockCSR.random((512, 512), 0.9, (4, 4), 0)
    X = np.random.default_rng(0).standard_normal((512, 256), np.float32)
    products = [
        partial(product, matrix, *operands)
        for matrix in (W, B)
        for product, operands in ((spmm, (X,)), (spmm_t, (X,)), (sddmm_dw, (X, X)))
    ]
    expected = [product() for product in products]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, pickle.dumps(_wrong(products, expected, 200)))
        finally:
            os._exit(0)
    mine = _wrong(products, expected, 200)
    os.close(write)
    answer = os.read(read, 1000)
    os.waitpid(child, 0)
    demand(answer, "the child died")
    theirs = pickle.loads(answer)
    demand(not any(mine + theirs), f"wrong of 200: parent {mine}, child {theirs}")
    return "2400 products, bit for bit"
