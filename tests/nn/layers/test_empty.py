"""Layers that are asked for some connections and get none say so."""

import warnings

import numpy as np
import pytest
from torch import nn

from sparselab import BlockSparseLinear, FanInLinear, MaskedLinear, SparseConv2d, SparseLinear, sparsify


def test_a_layer_without_any_connection_is_warned_of() -> None:
    for make in (
        lambda: SparseLinear(4, 1, sparsity=0.9),
        lambda: MaskedLinear(4, 1, sparsity=0.9),
        lambda: BlockSparseLinear(16, 16, sparsity=0.9),
        lambda: FanInLinear(4, 4, sparsity=0.9),
        lambda: SparseConv2d(1, 1, 2, sparsity=0.9),
        lambda: SparseLinear.from_dense(nn.Linear(4, 1), 0.9),
        lambda: BlockSparseLinear.from_dense(nn.Linear(16, 16), 0.9),
        lambda: sparsify(nn.Sequential(nn.Linear(4, 4)), {"0": 0.9}, layer="fan_in"),
    ):
        with pytest.warns(UserWarning, match=r"a sparsity of 0\.9 leaves no connection among"):
            make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SparseLinear(4, 1, sparsity=1.0)
        SparseLinear(0, 1, sparsity=0.9)
        SparseLinear.from_pattern(np.zeros((3, 4), bool))
        BlockSparseLinear.from_pattern(np.ones((64, 64), bool), block_shape=(64, 64))
