"""Whole models: letting go of what only training needs."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from sparselab.nn.layers.base import find_sparse
from sparselab.nn.layers.linear import LinearLayer
from sparselab.nn.storage.narrow import hold, made_weights

Model = TypeVar("Model", bound=nn.Module)


def freeze(model: Model, weights: torch.dtype | None = None) -> Model:
    """Freeze the sparse layers of a model, in place, and hold the weights of linear ones in few bits.

    Each layer that has a ``freeze()`` is frozen by it; see `sparselab.SparseLinear.freeze`. Dense layers, and
    simulated ones, stay as they are.

    Parameters
    ----------
    model : torch.nn.Module
        A sparse layer, or a model that contains some.
    weights : torch.bfloat16, torch.int8 or torch.float32, optional
        For `SparseLinear`, `FanInLinear` and `BlockSparseLinear`, those inside attention and recurrent
        networks included; other layers keep theirs as they are. `memory_report` tells what a model takes.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError, ValueError
        As of a layer, which is named, and if the model has none that can be frozen so. Nothing has been
        changed then.

    Examples
    --------
    >>> import sparselab
    >>> model = nn.Sequential(sparselab.SparseLinear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> freeze(model, torch.int8)[0].weight_values.dtype
    torch.int8
    """
    layers: list[tuple[str, Any]] = [(n, each) for n, each in find_sparse(model) if hasattr(each, "freeze")]
    narrowed = [(name, layer) for name, layer in layers if isinstance(layer, LinearLayer)]
    if not (layers if weights is None else narrowed):
        what = "sparse" if weights is None else "sparse linear"
        raise ValueError(f"model must contain a {what} layer to freeze, got a {type(model).__name__} without")
    if weights is not None:
        _narrow(narrowed, weights)
    for _, layer in layers:
        layer.freeze()
    return model


def _narrow(layers: list[tuple[str, Any]], dtype: torch.dtype) -> None:
    """Hold the weights of layers in another dtype, of all of them or of none."""
    made = []
    for name, layer in layers:
        try:
            made.append(made_weights(layer, dtype))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name or 'the model'}: {error}") from error
    for (_, layer), weights in zip(layers, made, strict=True):
        hold(layer, dtype, weights)
