"""CPU tensors as compiled code takes them, and small things that calls need again and again."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparselab.kernels.arrays import NONE_OF, Array
from sparselab.kernels.cpu.csr.skinny import Matrix
from sparselab.kernels.cpu.narrow import Weights

Cut = TypeVar("Cut")

#: Arrays that only tell a kernel the dtype of an address; bfloat16 as its bits.
LIKE: dict[torch.dtype, np.ndarray[Any, Any]] = {
    torch.float32: NONE_OF[np.dtype(np.float32)],
    torch.float64: NONE_OF[np.dtype(np.float64)],
    torch.bfloat16: NONE_OF[np.dtype(np.uint16)],
    torch.int8: NONE_OF[np.dtype(np.int8)],
}

#: The dtype in which products of tokens are summed.
SUMMED = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}

#: Counts of tokens for which a topology keeps how it cuts their products.
_MOST_CUTS = 32


class Cuts(dict[Hashable, Cut], Generic[Cut]):
    """How products are cut, by what that depends on beside the topology; the oldest ones are let go."""

    def add(self, key: Hashable, cut: Cut) -> Cut:
        """Keep a cut, and return it."""
        if len(self) >= _MOST_CUTS:
            self.pop(next(iter(self)), None)
        self[key] = cut
        return cut


def as_matrix(tokens: Tensor) -> Matrix:
    """Tokens (n, features) of any strides as a matrix with a column for each."""
    (n_tokens, n_features), (step, stride) = tokens.shape, tokens.stride()
    return tokens.data_ptr(), (stride, step), (n_features, n_tokens), LIKE[tokens.dtype]


def in_order(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it whose entries lie in C order."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def as_array(tensor: Tensor) -> Array:
    """The tensor's memory, of its shape and strides; the bits of bfloat16."""
    tensor = tensor.detach()
    array: Array = (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


def as_vector(tensor: Tensor) -> Array:
    """The entries in C order, copied only if they lie otherwise; the bits of bfloat16, which NumPy lacks."""
    tensor = tensor.detach()
    # NumPy reshapes, in a tenth of the time that torch takes.
    array: Array = (
        (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy().reshape(-1)
    )
    # A reshaped vector may be one that is read with a stride.
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def as_weights(values: Tensor, scales: Tensor | None) -> Weights:
    """Weights that are laid out in C order, and their scales, as kernels take them: by address."""
    return values.data_ptr(), LIKE[values.dtype], 0 if scales is None else scales.data_ptr()


@functools.lru_cache(maxsize=64)
def zeros(n: int, dtype: torch.dtype) -> Tensor:
    """So many zeros, to be read only."""
    with torch.inference_mode(False):
        return torch.zeros(n, dtype=dtype)


@functools.lru_cache(maxsize=64)
def zero_vector(n: int, dtype: torch.dtype) -> Array:
    """`zeros` as an array."""
    return as_vector(zeros(n, dtype))


def nbytes(plan: Any) -> int:
    """Bytes of the arrays of a plan."""
    if isinstance(plan, tuple):
        return sum(nbytes(part) for part in plan)
    return int(getattr(plan, "nbytes", 0))
