"""Initialisation that minds how many inputs each output really has."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from sparselab.kernels.rewiring.rows import sample_rows
from sparselab.nn.storage.contract import find_sparse

Module = TypeVar("Module", bound=nn.Module)


def fan_in_uniform_(values: Tensor, indptr: Tensor) -> Tensor:
    """Fill `values` in place from U(-b, b) with ``b = 1 / sqrt(fan_in)`` of each connection's row.

    `torch.nn.Linear` draws from the same distribution with the dense fan-in; with the live one the variance
    of a row's output does not shrink with its sparsity.

    Parameters
    ----------
    values : float, nnz entries row by row
    indptr : int64 (rows + 1,)

    References
    ----------
    Evci, Ioannou, Keskin, Dauphin: Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win,
    AAAI 2022, section 3.1.
    """
    with torch.no_grad():
        bound = torch.repeat_interleave(fan_in_bound(indptr, values.dtype), torch.diff(indptr))
        return values.uniform_(-1, 1).mul_(bound.view(values.shape))


def fan_in_bound(indptr: Tensor, dtype: torch.dtype) -> Tensor:
    """``1 / sqrt(fan_in)`` of each row, (rows,); 1 for an empty row."""
    return torch.diff(indptr).clamp(min=1).to(dtype).rsqrt()


@torch.no_grad()
def constant_fan_in_(model: Module) -> Module:
    """Give all outputs of a sparse layer equally many connections, drawn anew, with new weights.

    As `SRigL` needs it. Every layer keeps the largest multiple of its outputs that its connections amount to,
    ``nnz // out_features`` for each; sets of inputs are equally likely. Weights are drawn as by
    `fan_in_uniform_`. Biases are left.

    Parameters
    ----------
    model : torch.nn.Module
        A sparse layer, or what contains some. Changed in place, before training: state that an optimizer
        already has does not follow. Draws are from torch's random generator.

    Returns
    -------
    torch.nn.Module
        The same.

    Raises
    ------
    ValueError
        If a layer has fewer connections than outputs, or there is no sparse layer.

    Examples
    --------
    >>> from sparselab.nn import SparseLinear
    >>> constant_fan_in_(SparseLinear(64, 32, sparsity=0.9)).indptr.diff().unique()
    tensor([6])
    """
    layers = dict(find_sparse(model))
    if not layers:
        raise ValueError(f"model must have sparse layers, got a {type(model).__name__} without any")
    for name, layer in layers.items():
        rows, columns = layer.shape
        if layer.nnz < rows:
            raise ValueError(
                f"a layer must have at least one connection for each output, got {layer.nnz} for {rows} in "
                f"{name or type(layer).__name__}"
            )
        fan_in = layer.nnz // max(rows, 1)
        rng = np.random.default_rng(int(torch.randint(2**62, (), device="cpu").item()))
        grow = sample_rows(rng, np.full(rows, columns), np.full(rows, fan_in))
        layer.rewrite(torch.arange(layer.nnz), torch.from_numpy(grow))
        weights = layer.stored.new_empty(layer.nnz).uniform_(-1, 1) * max(fan_in, 1) ** -0.5
        layer.put(layer.stored.detach(), torch.arange(layer.nnz), weights)
    return model
