"""A topology to start from in which every output has equally many connections."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import nn

from sparselab.kernels.rewiring.rows import sample_rows
from sparselab.nn.layers.base import find_sparse
from sparselab.nn.storage.base import draw_seed

Module = TypeVar("Module", bound=nn.Module)


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
        rng = np.random.default_rng(draw_seed())
        grow = sample_rows(rng, np.full(rows, columns), np.full(rows, fan_in))
        layer.rewrite(torch.arange(layer.nnz), torch.from_numpy(grow))
        weights = layer.stored.new_empty(layer.nnz).uniform_(-1, 1) * max(fan_in, 1) ** -0.5
        layer.put(layer.stored.detach(), torch.arange(layer.nnz), weights)
    return model
