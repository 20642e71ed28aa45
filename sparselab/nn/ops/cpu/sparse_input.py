"""Products with sparse tokens on the CPU; see `sparselab.nn.ops.contract.SparseInputProducts`."""

from __future__ import annotations

import torch
from torch import Tensor

from sparselab.kernels.cpu.csr.plan import transpose_plan
from sparselab.kernels.cpu.csr.sparse_input import SparseTokens, multiply_sparse, sample_sparse
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.nn.ops.contract import OnTensors
from sparselab.nn.ops.cpu.memory import as_vector, zero_vector
from sparselab.nn.ops.cpu.threads import use_torch_threads
from sparselab.nn.ops.inputs.sparse import TokenRows

#: Density of the tokens from which dense chunks of them are faster.
DENSE_FROM = 0.06


def as_tokens(rows: TokenRows) -> SparseTokens:
    """Tokens as kernels take them."""
    return SparseTokens(*map(as_vector, rows.tensors))


def pays(rows: TokenRows) -> bool:
    """Whether products by stored entries are the faster ones."""
    return rows.density < DENSE_FROM


def product(topology: OnTensors, values: Tensor, rows: TokenRows, bias: Tensor | None) -> Tensor:
    """``x W^T + b``."""
    use_torch_threads()
    dtype, n_rows = rows.entries.dtype, topology.shape[0]
    y = torch.empty((len(rows.starts) - 1, n_rows), dtype=dtype)
    offset = zero_vector(n_rows, dtype) if bias is None else as_vector(bias)
    own: RowTopology = topology.own  # type: ignore[assignment]
    multiply_sparse(as_tokens(rows), as_vector(values), own.rows, transpose_plan(own), offset, as_vector(y))
    return y


def values_grad(topology: OnTensors, grad: Tensor, rows: TokenRows) -> Tensor:
    """``sum_t dy[t, i] x[t, j]`` for each connection (i, j)."""
    use_torch_threads()
    found = torch.empty(topology.values_shape, dtype=grad.dtype)
    own: RowTopology = topology.own  # type: ignore[assignment]
    sample_sparse(as_tokens(rows), own.rows, transpose_plan(own), as_vector(grad), as_vector(found))
    return found
