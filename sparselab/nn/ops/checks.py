"""What every operator checks of its operands, before a kernel that checks no bounds sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparselab.nn.ops.tracing import has_memory

#: What kernels take.
DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16))
#: What operators and layers take.
ACCEPTED = DTYPES | {torch.float16}


def in_float32(*tensors: Tensor | None) -> list[Any] | None:
    """Operands of float16 in float32, in which they are computed with; None if one has another dtype."""
    if any(tensor is not None and tensor.dtype is not torch.float16 for tensor in tensors):
        return None
    return [None if tensor is None else tensor.float() for tensor in tensors]


def refuse_misfits(device: torch.device, dtype: torch.dtype, **operands: Any) -> None:
    """Raise RuntimeError or TypeError for the first operand that is not what it must be.

    Parameters
    ----------
    device : torch.device
        Of the topology.
    dtype : torch.dtype
        Of the first operand, which all have.
    operands
        ``name=(tensor, shape)``; None in a shape stands for any number of tokens, and for the tensor if there
        is none.
    """
    first = next(iter(operands))
    if dtype not in ACCEPTED:
        raise TypeError(f"{first} must be of a floating dtype of 16, 32 or 64 bits, got {dtype}")
    for name, (tensor, shape) in operands.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype or not _is(tensor.shape, shape):
            expected = tuple("tokens" if n is None else n for n in shape)
            raise RuntimeError(
                f"{name} must be {dtype} of shape ({', '.join(map(str, expected))}"
                f"{',' if len(expected) == 1 else ''}), got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        if tensor.device != device:
            raise RuntimeError(f"{name} must be on the device of the topology, {device}, got {tensor.device}")
    raise RuntimeError(f"{first} must fit the topology, got {operands[first][0].shape}")


def _is(shape: Any, expected: Any) -> bool:
    return len(shape) == len(expected) and all(
        m is None or n == m for n, m in zip(shape, expected, strict=True)
    )


def refuse_mixed_devices(**tensors: Tensor | None) -> None:
    """Raise RuntimeError unless all tensors that are there are on one device, as the fake operators must.

    A tensor on the device "meta" among others makes torch call these in place of the operators, and hand out
    what they return: memory that nobody has written to.
    """
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    (first, device), *others = [(name, tensor.device) for name, tensor in present.items()]
    for name, other in others:
        if other != device:
            raise RuntimeError(f"{name} must be on the device of {first}, {device}, got {other}")


def require_strided(**tensors: Tensor | None) -> None:
    """Raise RuntimeError unless all tensors that are there are dense ones with memory for all entries."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.layout is not torch.strided:
            raise RuntimeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
        if not has_memory(tensor):
            raise RuntimeError(
                f"{name} must have memory for all of its entries, got {tensor.untyped_storage().nbytes()} "
                f"bytes for {tensor.dtype} of shape {tuple(tensor.shape)}; its storage was resized"
            )
