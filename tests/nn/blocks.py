"""What the tests of BlockSparseLinear share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparselab import BlockSparseLinear

#: High, wide, square and odd blocks.
BLOCKS = [(4, 1), (1, 8), (4, 4), (3, 5), (8, 32), (16, 16), (64, 64)]
every_block = pytest.mark.parametrize("block_shape", BLOCKS, ids=str)

#: No multiples of any block.
SIZES = 70, 50


def outside(layer: BlockSparseLinear) -> Tensor:
    """Where the values of a layer lie outside W."""
    return layer.cut(torch.ones(layer.shape))[layer.positions()] == 0


def array(tensor: Tensor) -> np.ndarray[Any, Any]:
    result: np.ndarray[Any, Any] = tensor.detach().numpy()
    return result
