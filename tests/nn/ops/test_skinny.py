"""The forward pass of few tokens: the same bits as with gradients, whatever the layer has been through."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from sparselab import BlockSparseLinear, FanInLinear, SparseLinear
from tests.nn.layers.test_linear import CountOperators

Kind = Callable[..., SparseLinear]

BLOCKS = partial(BlockSparseLinear, sparsity=0.5, block_shape=(4, 8))
KINDS = [SparseLinear, FanInLinear, BLOCKS]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["single", "fan-in", "blocks"])


@pytest.mark.parametrize("shape", [(20,), (1, 20), (1, 1, 20), (2, 20), (16, 20), (2, 4, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@every_kind
def test_without_gradients_it_computes_the_same_bits(
    kind: Kind, bias: bool, dtype: torch.dtype, shape: Any
) -> None:
    layer = kind(20, 10, bias=bias, dtype=dtype)
    assert layer.variant(16).name == "skinny"
    x = torch.randn(shape, dtype=dtype)
    expected = layer(x)
    assert expected.requires_grad
    torch.testing.assert_close(expected, layer.to_dense()(x))
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        assert layer(x.clone()).is_inference()
    assert torch.equal(layer.freeze()(x), expected)


def test_it_follows_weights_and_topology() -> None:
    layer = SparseLinear(20, 10)
    x = torch.randn(3, 20)
    changes: list[Callable[[], object]] = [
        lambda: layer.weight_values.mul_(2),
        lambda: setattr(layer.weight_values, "data", torch.randn(layer.nnz, 1, 1)),
        lambda: layer.rewrite(torch.arange(3), torch.empty(0, dtype=torch.int64)),
        layer.reset_parameters,
        lambda: layer.load_state_dict(SparseLinear(20, 10, sparsity=0.5).state_dict()),
        lambda: layer.double(),
        lambda: setattr(layer, "indices", layer.indices.clone()),
        lambda: setattr(layer, "forward_mask", layer.weight_values > 0),
    ]
    with torch.no_grad():
        for change in changes:
            change()
            x = x.to(layer.weight_values.dtype)
            for _ in range(2):  # the second time there is a plan
                torch.testing.assert_close(layer(x), layer.to_dense()(x))


def test_a_mode_sees_the_operator() -> None:
    layer = SparseLinear(20, 10).requires_grad_(False)
    x = torch.ones(2, 20)
    with CountOperators() as operators:
        layer(x)
    assert operators.called == ["linear"]
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
