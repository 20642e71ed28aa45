"""A topology to start from in which every unit looks at its surroundings."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from sparselab.kernels.arrays import Array
from sparselab.nn.layers.base import find_sparse
from sparselab.nn.storage.base import draw_seed

_BLOCK_ITEMS = 1 << 20


def brf_(model: nn.Module, r: float = 0.0) -> nn.Module:
    """Draw bipartite receptive fields for the sparse layers of a model, and new weights, in place.

    Each unit of a layer's smaller side has its place on the ring of units of the larger side, and is
    connected without replacement to units at distance d with chances in proportion to
    ``(1 + d) ** -((1 - r) / r)``.
    Every layer keeps its number of connections; its smaller side shares them evenly, remainders at random.
    Weights are drawn as by `fan_in_uniform_`. Biases are left.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place, before an optimizer has state for it: that does not follow. Draws are from torch's
        random generator.
    r : float
        In [0, 1]: 0 takes the nearest, 1 any with equal chances. The authors' example of a language model
        has 0.3.

    Returns
    -------
    torch.nn.Module
        The same.

    Raises
    ------
    ValueError
        If `r` is outside its range, or the model has no sparse layer.

    Notes
    -----
    One random number for every position, in blocks of 8 MiB; O(nnz) memory beside them.

    References
    ----------
    Zhang et al., "Brain network science modelling of sparse neural networks enables Transformers and LLMs to
    perform as fully connected", NeurIPS 2025, arXiv 2501.19107 (bipartite receptive field, fixed degrees).

    Examples
    --------
    >>> from sparselab.nn import SparseLinear
    >>> brf_(SparseLinear(6, 6, sparsity=0.5)).positions()[:3]
    tensor([0, 1, 5])
    """
    if not 0 <= r <= 1:
        raise ValueError(f"r must lie in [0, 1]; got {r!r}")
    layers = [layer for _, layer in find_sparse(model)]
    if not layers:
        raise ValueError(f"model must have sparse layers, got a {type(model).__name__} without any")
    for layer in layers:
        rng = np.random.default_rng(draw_seed())
        rows, columns = layer.shape
        small, large = min(rows, columns), max(rows, columns)
        unit, place = np.divmod(_fields(rng, small, large, layer.nnz, r), max(large, 1))
        positions = unit * large + place if rows <= columns else np.sort(place * small + unit)
        slots = torch.arange(layer.nnz)
        layer.rewrite(slots, torch.from_numpy(positions))
        row = positions // max(columns, 1)
        bound = torch.from_numpy(np.bincount(row, minlength=rows)[row]).to(layer.stored.dtype).rsqrt()
        weights = torch.empty(layer.nnz, dtype=layer.stored.dtype).uniform_(-1, 1) * bound
        layer.put(layer.stored.detach(), slots, weights)
    return model


def _fields(rng: np.random.Generator, small: int, large: int, nnz: int, r: float) -> Array:
    """``unit * large + place`` of `nnz` connections, ascending."""
    if not nnz:
        return np.empty(0, np.int64)
    degree, left = divmod(nnz, small)
    has_more = rng.permutation(small) < left
    offset = np.arange(large)
    log_distance = np.log1p(np.minimum(offset, large - offset))
    wide = min(degree, large - 1)
    height = max(1, _BLOCK_ITEMS // large)
    found = []
    for start in range(0, small, height):
        unit = np.arange(start, min(start + height, small))
        keys = np.broadcast_to(log_distance, (unit.size, large))
        if r:
            # The lowest keys are a draw without replacement: noise of the Gumbel distribution on log chances.
            keys = keys * ((1 - r) / r) + np.log(rng.standard_exponential((unit.size, large)))
        nearest = np.argpartition(keys, wide, axis=1)[:, : wide + 1]
        taken = np.ones(nearest.shape, np.bool_)
        # The last one of a row is the farthest of them.
        taken[:, -1] = has_more[unit] | (degree > wide)
        places = (unit[:, None] * max(1, large // small) + nearest) % large
        found.append(np.sort((unit[:, None] * large + places)[taken]))
    return np.concatenate(found)
