"""Products of dense blocks in bfloat16 by the CPU's matrix unit, where it has one.

Operands are bfloat16 and products exact; sums are float32, rounded once at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.amx.gradient import sample_blocks
from sparselab.kernels.cpu.amx.plan import fits
from sparselab.kernels.cpu.amx.product import multiply_blocks
from sparselab.kernels.cpu.bsr.plan import block_plan
from sparselab.kernels.cpu.runtime.matrix_unit import has_matrix_unit
from sparselab.kernels.layouts.block_csr import BlockTopology
from sparselab.nn.ops.cpu.memory import as_vector

#: Asked once, where torch's compiler does not look.
_HAS_UNIT = has_matrix_unit()


#: Multiply-adds from which the unit repays copies of weights and factors, as timed with 16 x 16 blocks.
_LEAST_WORK = 12_000_000


def is_native(block_shape: tuple[int, int]) -> bool:
    """Whether blocks of this shape are computed so here."""
    return _HAS_UNIT and fits(block_shape)


def pays(n_weights: int, n_tokens: int) -> bool:
    """Whether that is quicker than products in float32 of weights that need not be cast."""
    return n_weights * n_tokens >= _LEAST_WORK


def product(own: BlockTopology, values: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b``, in bfloat16."""
    y = torch.empty((len(x), own.shape[0]), dtype=torch.bfloat16)
    offset: Array | None = None if bias is None else as_vector(bias.detach().float())
    multiply_blocks(as_vector(values), block_plan(own, False), _bits(x), _bits(y), offset)
    return y


def input_grad(own: BlockTopology, values: Tensor, grad: Tensor) -> Tensor:
    """``dy W``, in bfloat16."""
    dx = torch.empty((len(grad), own.shape[1]), dtype=torch.bfloat16)
    multiply_blocks(as_vector(values), block_plan(own, True), _bits(grad), _bits(dx))
    return dx


def values_grad(own: BlockTopology, grad: Tensor, x: Tensor) -> Tensor:
    """``sum_t dy[t, i] x[t, j]`` for every entry of every block, in float32; anything beyond the matrix."""
    found = torch.empty((own.nnz, *own.block_shape), dtype=torch.float32)
    sample_blocks(block_plan(own, False), _bits(grad), _bits(x), as_vector(found))
    return found


def _bits(tokens: Tensor) -> Any:
    """The bits of tokens (n, features), whose features lie together; copied if they do not."""
    tokens = tokens.detach()
    if tokens.shape[1] > 1 and tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    return tokens.view(torch.uint16).numpy()
