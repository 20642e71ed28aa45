"""Rows of a sparse table on CPU tensors; see `sparselab.nn.ops.contract.LookupProducts`."""

from __future__ import annotations

import torch
from torch import Tensor

from sparselab.kernels.cpu.csr.lookup import add_up, look_up
from sparselab.nn.ops.contract import OnTensors
from sparselab.nn.ops.cpu.memory import as_vector
from sparselab.nn.ops.cpu.threads import use_torch_threads


def product(topology: OnTensors, values: Tensor, tokens: Tensor) -> Tensor:
    """The rows with these numbers, dense: (tokens, columns)."""
    use_torch_threads()
    rows = topology.own.rows  # type: ignore[attr-defined]
    columns = topology.shape[1]
    y = values.new_empty((len(tokens), columns))
    look_up(as_vector(tokens), rows.indptr, rows.indices, as_vector(values), columns, as_vector(y))
    return y


def values_grad(topology: OnTensors, grad: Tensor, tokens: Tensor) -> Tensor:
    """What the gradients of these rows have at the connections, added up; shaped as the values.

    Those in bfloat16 are added up in float32.
    """
    use_torch_threads()
    rows = topology.own.rows  # type: ignore[attr-defined]
    wide = grad.float() if grad.dtype is torch.bfloat16 else grad
    sums = wide.new_zeros(topology.values_shape)
    add_up(as_vector(tokens), rows.indptr, rows.indices, as_vector(wide), topology.shape[1], as_vector(sums))
    return sums.to(grad.dtype)
