"""Layers made of lists of edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparselab import FanInLinear, SparseLinear

KINDS = [SparseLinear, FanInLinear]
INPUTS, OUTPUTS = [4, 0, 2, 3, 1, 0], [2, 0, 1, 2, 0, 1]


def as_is(numbers: Any) -> Any:
    return numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [as_is, np.array, torch.tensor, lambda n: np.array(n, np.uint8)])
def test_edges_are_connections_with_their_weights(kind: Any, form: Any) -> None:
    weights = [0.5, 1.0, 2.0, -1.0, 3.0, -2.0]
    layer = kind.from_edges(form(INPUTS), form(OUTPUTS), weights, dtype=torch.float64)
    expected = torch.zeros(3, 5, dtype=torch.float64)
    expected[OUTPUTS, INPUTS] = torch.tensor(weights, dtype=torch.float64)
    assert torch.equal(layer.to_dense().weight, expected)
    assert (layer.shape, layer.bias.shape) == ((3, 5), (3,))


@pytest.mark.parametrize("kind", KINDS)
def test_edges_without_weights_get_those_of_a_pattern(kind: Any) -> None:
    pattern = np.zeros((4, 7), bool)
    pattern[OUTPUTS, INPUTS] = True
    torch.manual_seed(1)
    layer = kind.from_edges(np.stack([INPUTS, OUTPUTS]), in_features=7, out_features=4)
    torch.manual_seed(1)
    other = kind.from_pattern(pattern)
    assert layer.state_dict().keys() == other.state_dict().keys()
    for name, tensor in other.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name


def test_an_edge_that_is_named_twice_is_one_connection() -> None:
    inputs, outputs = [1, 0, 1, 1], [0, 1, 0, 0]
    summed = SparseLinear.from_edges(inputs, outputs, torch.tensor([1.0, 5.0, 2.0, 4.0]), bias=False)
    assert summed.weight_values.flatten().tolist() == [7.0, 5.0]
    assert SparseLinear.from_edges(inputs, outputs).positions().tolist() == [1, 2]


def test_nothing_of_dense_size_is_made() -> None:
    n = 1 << 30  # a dense weight would have 2**60 entries
    inputs, outputs = np.arange(0, n, n // 8), np.arange(n - 1, 0, -(n // 8))
    layer = SparseLinear.from_edges(inputs[:2], outputs[:2] // (1 << 20), in_features=n, out_features=1 << 10)
    assert layer.nnz == 2
    assert layer.indices.tolist() == [n // 8, 0]


def test_no_edges_need_the_numbers_of_features() -> None:
    layer = SparseLinear.from_edges([], [], in_features=3, out_features=2)
    assert torch.equal(layer(torch.ones(1, 3)), layer.bias[None])
    with pytest.raises(ValueError, match="in_features must be given where there is no edge"):
        SparseLinear.from_edges([], [], out_features=2)


def test_gradients_are_those_of_the_dense_twin() -> None:
    edges = torch.tensor([INPUTS, OUTPUTS])
    layer = SparseLinear.from_edges(edges, dtype=torch.float64)
    dense = layer.to_dense()
    x = torch.randn(4, 5, dtype=torch.float64)
    upstream = torch.randn(4, 3, dtype=torch.float64)
    for each in (layer, dense):
        each(x).backward(upstream)
    assert isinstance(dense, nn.Linear)
    grad = dense.weight.grad.reshape(-1)[layer.positions()]
    torch.testing.assert_close(layer.weight_values.grad.flatten(), grad)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([0.5], [1]), TypeError, "inputs must be integers, got float64"),
        (([True], [1]), TypeError, "inputs must be integers, got bool"),
        (([0, 1], [1]), ValueError, "inputs and outputs must be equally long, got 2 and 1"),
        (([0], [[1]]), ValueError, r"outputs must have one dimension, got shape \(1, 1\)"),
        (([0], [-1]), ValueError, r"outputs must be at least 0, got -1\.\.-1"),
        (([0, 1],), ValueError, r"edge_index of shape \(2, n\) if outputs is not given, got \(2,\)"),
        (([0], [1], [2]), TypeError, "weights must be floating, got torch.int64"),
        (([0], [1], [2.0, 3.0]), ValueError, r"one for each of 1 edges, got shape \(2,\)"),
    ],
)
def test_what_is_no_list_of_edges_is_refused(arguments: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        SparseLinear.from_edges(*arguments)


def test_an_edge_outside_the_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"inputs must be at least 0 and below in_features, 3, got 1\.\.3"):
        SparseLinear.from_edges([1, 3], [0, 0], in_features=3)


def test_unequal_rows_have_no_constant_fan_in() -> None:
    with pytest.raises(ValueError, match="equally many"):
        FanInLinear.from_edges([0, 1, 0], [0, 0, 1])
