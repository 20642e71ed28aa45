"""Embeddings, tied layers, transposed convolutions, sparse inputs: numbers and connections that are off."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn

import sparselab
from tests.hazards.cases import demand, hazard
from tests.hazards.programs.names import weights


def rewired(layer: sparselab.SparseLayer) -> None:
    """Drop the first connection and grow one where there is none."""
    taken = layer.positions()
    free = torch.arange(layer.shape[0] * layer.shape[1])
    free = free[~torch.isin(free, taken)]
    layer.rewrite(torch.tensor([0]), free[-1:])


@hazard("sparse inputs", "compressed columns whose offsets lead out of memory")
def hostile_columns() -> None:
    layer = sparselab.SparseLinear(30, 20, sparsity=0.8)
    x = (torch.rand(50, 30) < 0.1).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the layout is new
        good = x.to_sparse_csc()
    offsets = good.ccol_indices().clone()
    offsets[-1] = 2**40
    parts = offsets, good.row_indices(), good.values()
    y = layer(torch.sparse_csc_tensor(*parts, x.shape, check_invariants=False))
    demand(False, f"accepted, outputs up to {y.abs().max():.3g}")


@hazard("sparse inputs", "a COO matrix with column 30 of 30 into a transposed layer")
def hostile_transposed() -> None:
    layer = sparselab.TransposedLinear(sparselab.SparseLinear(20, 30, sparsity=0.8))
    indices = torch.tensor([[0, 1, 49], [3, 30, 2]])
    y = layer(torch.sparse_coo_tensor(indices, torch.ones(3), (50, 30), check_invariants=False))
    demand(False, f"accepted, outputs up to {y.abs().max():.3g}")


@hazard("sparse inputs", "a COO matrix called coalesced whose rows descend")
def false_order() -> None:
    layer = sparselab.SparseLinear(30, 20, sparsity=0.5)
    indices = torch.tensor([[4, 2, 0], [1, 2, 3]])
    x = torch.sparse_coo_tensor(
        indices, torch.ones(3), (5, 30), is_coalesced=True, check_invariants=False
    )  # fmt: skip
    dense = torch.zeros(5, 30)
    dense[indices[0], indices[1]] = 1
    off = (layer(x) - layer(dense)).abs().max()
    demand(off < 1e-5, f"off by {off:.3g}")


@hazard("embeddings", "rows -1 and 10 of 10")
def no_row() -> None:
    layer = sparselab.SparseEmbedding(10, 8, sparsity=0.5)
    refused = 0
    for number in (-1, 10, 2**40):
        try:
            layer(torch.tensor([0, number]))
        except IndexError:
            refused += 1
    demand(refused == 3, f"{3 - refused} of 3 numbers that are no row were looked up")


@hazard("embeddings", "an average by slots once the table was rewired")
def table_by_slots() -> None:
    model = nn.Sequential(sparselab.SparseEmbedding(40, 8, sparsity=0.5))
    average = copy.deepcopy(model)
    dense = [each[0].to_dense().weight.detach() for each in (model, average)]
    rewired(model[0])
    dense[0] = model[0].to_dense().weight.detach()
    with torch.no_grad():
        for own, other in zip(average.parameters(), model.parameters(), strict=True):
            own.lerp_(other, 0.5)
    numbers = torch.arange(40)
    off = (average(numbers) - (dense[0] + dense[1]) / 2).abs().max()
    demand(off < 1e-5, f"rows are off by {off:.3g}")


@hazard("tied layers", "the owner is rewired between the forward and the backward pass")
def rewired_owner() -> None:
    owner = sparselab.SparseEmbedding(40, 8, sparsity=0.5)
    head = sparselab.TiedLinear(owner)
    y = head(torch.randn(5, 8))
    rewired(owner)
    y.sum().backward()
    demand(False, f"accepted, gradient up to {weights(owner).grad.abs().max():.3g}")


@hazard("transposed", "channels_last into a transposed convolution, and its gradients", refusable=False)
def channels_last() -> str:
    torch.manual_seed(0)
    layer = sparselab.SparseConvTranspose2d(
        6, 4, 3, stride=2, padding=1, output_padding=1, groups=2, sparsity=0.5, dtype=torch.float64
    )
    dense, x = layer.to_dense(), torch.randn(3, 6, 5, 7, dtype=torch.float64)
    images = [x.to(memory_format=torch.channels_last).requires_grad_(), x.clone().requires_grad_()]
    y, expected = layer(images[0]), dense(images[1])
    demand(torch.allclose(y, expected), f"off by {(y - expected).abs().max():.3g}")
    upstream = torch.randn_like(expected)
    y.backward(upstream.to(memory_format=torch.channels_last))
    expected.backward(upstream)
    demand(torch.allclose(images[0].grad, images[1].grad), "another gradient of x")
    own = dense.weight.grad.reshape(-1)[layer.positions()].view(-1, 1, 1)
    demand(torch.allclose(weights(layer).grad, own), "another gradient of the weights")
    return "outputs and gradients of torch"
