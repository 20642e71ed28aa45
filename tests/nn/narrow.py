"""Layers that are frozen in bfloat16 and int8, and what they must compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from sparselab import BlockSparseLinear, FanInLinear, SparseLinear
from tests import strategies
from tests.kernels import blocks
from tests.oracle import assert_close, product

KINDS: dict[str, Callable[..., Any]] = {
    "single": partial(SparseLinear, sparsity=0.7),
    "fan-in": partial(FanInLinear, sparsity=0.7),
    "4x1": partial(BlockSparseLinear, sparsity=0.6, block_shape=(4, 1)),
    "4x4": partial(BlockSparseLinear, sparsity=0.6, block_shape=(4, 4)),
    "3x5": partial(BlockSparseLinear, sparsity=0.6, block_shape=(3, 5)),
    "16x16": partial(BlockSparseLinear, sparsity=0.3, block_shape=(16, 16)),
}
DTYPES = torch.int8, torch.bfloat16
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["int8", "bfloat16"])

#: Around the tokens of a vector, of a tile, and those from which weights are expanded.
TOKENS = (0, 1, 2, 3, 8, 9, 16, 17, 32, 33, 64, 65, 130)

#: Tokens in memory of any strides.
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "C": lambda x: x,
    "Fortran": lambda x: x.T.contiguous().T,
    "every second": lambda x: x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
    "offset": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 1))[1 : 1 + len(x), 3 : 3 + x.shape[1]],
    "one token for all": lambda x: x[:1].expand_as(x) if len(x) else x,
    "one feature for all": lambda x: x[:, :1].expand_as(x),
}


def spread(layer: Any, entries: Tensor) -> Tensor:
    """Entries laid out as the layer's weights, as a dense matrix in float64; by torch alone."""
    (rows, columns), (height, width) = layer.grid, layer.block_shape
    whole = torch.zeros(rows * columns, height, width, dtype=torch.float64)
    whole[layer.positions()] = entries.detach().double()
    dense = whole.view(rows, columns, height, width).transpose(1, 2).reshape(rows * height, columns * width)
    return dense[: layer.shape[0], : layer.shape[1]]


def weights_of(layer: Any) -> Tensor:
    """What the weights of a layer stand for, dense in float64, from its buffers."""
    dense = spread(layer, layer.weight_values)
    scales = getattr(layer, "weight_scales", None)
    return dense if scales is None else dense * scales.double()[:, None]


def assert_right(layer: Any, x: Tensor, y: Tensor) -> None:
    """Fail unless y is the float32 output of the layer for x (tokens, in_features)."""
    live = spread(layer, torch.ones(layer.weight_values.shape)).bool().numpy()
    bias = None if layer.bias is None else layer.bias.detach().double().numpy()
    exact = product(weights_of(layer).numpy(), x.detach().double().numpy().T, live=live, bias=bias)
    assert_close(y.detach().numpy().T, exact, np.float32)


def _blocks(draw: st.DrawFn, bias: bool) -> BlockSparseLinear:
    B = blocks.build(
        draw(st.sampled_from(blocks.SHAPES)), draw(st.sampled_from(blocks.BLOCKS)),
        draw(st.sampled_from(sorted(blocks.PATTERNS))), draw(strategies.generators()),
    )  # fmt: skip
    layer = BlockSparseLinear(B.shape[1], B.shape[0], bias, sparsity=1.0, block_shape=B.block_shape)
    layer._begin_with(torch.from_numpy(B.topology.positions().copy()), torch.from_numpy(B.values))
    return layer


def _single(draw: st.DrawFn, bias: bool, cls: Any, patterns: list[str]) -> Any:
    shape = draw(st.sampled_from(strategies.SIZES)), draw(st.sampled_from(strategies.SIZES))
    W = strategies.build(shape, draw(st.sampled_from(patterns)), draw(strategies.generators()))
    return cls.from_pattern(W.to_scipy(), bias)


@st.composite
def layers(draw: st.DrawFn) -> Any:
    """A layer of any kind and pattern, empty rows and rows of one included, not frozen yet.

    Some have weights of 0, rows of 0 and weights that float32 can hardly tell from 0.
    """
    bias, equal = draw(st.booleans()), ["empty and full rows", "one connection each", "nothing", "everything"]
    make = draw(
        st.sampled_from(
            [
                partial(_blocks, draw, bias),
                partial(_single, draw, bias, SparseLinear, sorted(strategies.PATTERNS)),
                partial(_single, draw, bias, FanInLinear, equal),
            ]
        )
    )
    layer = make()
    with torch.no_grad():
        if draw(st.booleans()):
            layer.weight_values[::3] = 0
            layer.weight_values[: layer.nnz // 3] = 0
            layer.weight_values[layer.nnz // 2 : layer.nnz // 2 + 5] *= 1e-40
    return layer
