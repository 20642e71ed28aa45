"""Single connections and small blocks in bfloat16 by the matrix unit, where the CPU has one.

The unit multiplies a whole part of the dense matrix in the time of a twentieth of its connections or more, so
a product may as well expand weights, and a gradient take what it needs of such parts. Factors are rounded to
bfloat16, weights, too, as those of dense layers are; products are exact, sums float32, and subnormal numbers
count as 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.amx.sampled import sample_connections, serves
from sparselab.kernels.cpu.runtime.matrix_unit import has_matrix_unit
from sparselab.nn.ops.cpu.memory import as_array, as_vector

#: Asked once, where torch's compiler does not look: of the kernels, and of torch's own products.
_HAS_UNIT = has_matrix_unit()
_TORCH_HAS_UNIT = _HAS_UNIT and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Least(NamedTuple):
    """From which density and how many tokens on a product is quicker so, as timed (benchmarks/LOG.md)."""

    density: float
    tokens: int


_PRODUCT, _GRADIENT, _GRADIENT_OF_BLOCKS = _Least(0.07, 384), _Least(0.055, 192), _Least(0.09, 64)

#: Features of one instruction. Where a token ends with an incomplete one, torch's product reads on into the
#: next token, times zeros: a NaN or infinity there would spoil both.
_WHOLE = 32

#: Multiply-adds of the dense matrix below which nothing is gained.
_LEAST_WORK = 1 << 25


def _repays(least: _Least, shape: tuple[int, int], density: float, n_tokens: int) -> bool:
    work = shape[0] * shape[1] * n_tokens
    return n_tokens >= least.tokens and density >= least.density and work >= _LEAST_WORK


def takes_product(shape: tuple[int, int], density: float, n_tokens: int) -> bool:
    """Whether products of single connections are computed so, by torch's dense product."""
    return (
        _TORCH_HAS_UNIT
        and bool(torch.backends.mkldnn.enabled)
        and all(size % _WHOLE == 0 for size in shape)
        and _repays(_PRODUCT, shape, density, n_tokens)
    )


def takes_gradient(
    block_shape: tuple[int, int], shape: tuple[int, int], density: float, n_tokens: int
) -> bool:
    """Whether the gradient by single connections, (1, 1), or by the entries of blocks is computed so."""
    least = _GRADIENT if block_shape == (1, 1) else _GRADIENT_OF_BLOCKS
    return _HAS_UNIT and serves(block_shape) and _repays(least, shape, density, n_tokens)


def values_grad(
    values_shape: torch.Size | tuple[int, ...], shape: tuple[int, int], block_shape: tuple[int, int],
    indices: Array, begin: Array, end: Array, grad: Tensor, x: Tensor, with_bias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient by every entry and by the bias, or an empty tensor, in float32.

    Block row r has the slots ``begin[r] : end[r]``, whose block columns are in `indices`.
    """
    result = torch.zeros(values_shape, dtype=torch.float32)
    sums = torch.zeros(shape[0] if with_bias else 0, dtype=torch.float32)
    if result.numel() + sums.numel():
        sample_connections(
            shape, block_shape, indices, begin, end, _by_token(grad), _by_token(x), as_vector(result),
            as_vector(sums) if with_bias else None,
        )  # fmt: skip
    return result, sums


def _by_token(tokens: Tensor) -> Array:
    """Tokens whose features lie together; a copy if they do not."""
    if tokens.shape[1] > 1 and tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    return as_array(tokens)
