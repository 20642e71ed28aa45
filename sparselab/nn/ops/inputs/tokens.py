"""Inputs of linear layers that are no matrix: more or fewer dimensions, nested tensors, sparse vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def by_matrix(x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """The outputs (..., outputs) of tokens (..., features), by those of a matrix.

    Parameters
    ----------
    x : (..., features)
        Strided, jagged, or a sparse vector or matrix.
    product : callable
        Of a matrix (tokens, features): (tokens, outputs).

    Raises
    ------
    RuntimeError
        If x is nested but not jagged in its second dimension, or sparse with more than two dimensions or with
        dense ones.
    """
    if x.is_nested:
        return _of_jagged(x, product)
    if x.layout is not torch.strided:
        check_sparse(x)
        return product(x) if x.ndim == 2 else product(x.unsqueeze(0)).squeeze(0)
    if x.ndim == 2:
        return product(x)
    y = product(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _of_jagged(x: Any, product: Callable[[Tensor], Tensor]) -> Tensor:
    """Of a jagged nested tensor (batch, ragged, ..., features), jagged likewise."""
    refuse_strided_nested(x)
    if x._ragged_idx != 1:
        raise RuntimeError(
            "input must be jagged in its second dimension if it is nested, got one that is in dimension "
            f"{x._ragged_idx}"
        )
    y: Tensor = torch.nested.nested_tensor_from_jagged(
        by_matrix(x.values(), product), x.offsets(), lengths=x.lengths()
    )
    return y


def refuse_strided_nested(x: Tensor) -> None:
    """Raise RuntimeError if x is nested but not jagged: such a tensor has no sizes to ask for."""
    if x.is_nested and x.layout is not torch.jagged:
        raise RuntimeError(
            f"input must be jagged if it is nested, got one of layout {x.layout}; make it with "
            "torch.nested.nested_tensor(..., layout=torch.jagged)"
        )


def check_sparse(x: Tensor) -> None:
    """Raise RuntimeError unless a sparse x is a vector or a matrix of numbers."""
    dense_dims = x.dense_dim()
    if x.ndim > 2 or dense_dims:
        what = f"{dense_dims} of them dense" if dense_dims else "none of them dense"
        raise RuntimeError(
            "input must be a vector or a matrix of numbers if it is sparse, got one of layout "
            f"{x.layout} with {x.ndim} dimensions, {what}; give the layer input.to_dense()"
        )
