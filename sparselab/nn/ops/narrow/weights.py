"""Weights of fewer bits than the float32 numbers they stand for: what they are, and how they are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from sparselab.nn.ops.contract import Narrow
from sparselab.nn.ops.topologies import TensorTopology

#: What weights can be narrowed to.
NARROW = torch.bfloat16, torch.int8

#: The largest magnitude of an int8 weight, so that there is one of either sign.
_MOST = 127


def word(dtype: torch.dtype) -> str:
    """The dtype as one says it."""
    return str(dtype).removeprefix("torch.")


def narrowed(
    values: Tensor, dtype: torch.dtype, indptr: Tensor, block_shape: tuple[int, int], n_rows: int
) -> Narrow:
    """Round weights to the nearest that the dtype has.

    In int8 ``|w - s q| <= s / 2`` with the scale ``s = max |w| / 127`` of an output, rounded up.

    Parameters
    ----------
    values : floating (connections, block_out, block_in)
    dtype : torch.bfloat16 or torch.int8
    indptr : int64 (block rows + 1,)
    block_shape : (int, int)
    n_rows : int

    Raises
    ------
    ValueError
        If a weight is infinite or NaN, or becomes so.
    """
    values = values.detach()
    if values.is_meta:
        scales = values.new_empty(n_rows, dtype=torch.float32) if dtype is torch.int8 else None
        return Narrow(values.new_empty(values.shape, dtype=dtype), scales)
    _require_finite(values, dtype, values)
    if dtype is torch.bfloat16:
        rounded = values.to(dtype, copy=True)
        _require_finite(rounded, dtype, values)
        return Narrow(rounded, None)
    rows, wide = _rows(indptr, len(values), block_shape, n_rows), values.double()
    largest = wide.new_zeros(n_rows).scatter_reduce_(0, rows.view(-1), wide.abs().amax(2).view(-1), "amax")
    scales = _scales(largest)
    units = scales.double().masked_fill_(scales == 0, 1)[rows].unsqueeze(2)
    return Narrow(wide.div_(units).round_().to(torch.int8), scales)


def _require_finite(values: Tensor, dtype: torch.dtype, given: Tensor) -> None:
    finite = values.isfinite()
    if not bool(finite.all()):
        wrong = ~finite
        raise ValueError(
            f"weights must be finite numbers of {word(dtype)} to be frozen in it, got {int(wrong.sum())} of "
            f"{values.numel()} that are not, such as {float(given[wrong][0])}"
        )


def _scales(largest: Tensor) -> Tensor:
    """float32: a 127th of each magnitude, or the next number above it, so that no quotient exceeds 127."""
    scales = (largest / _MOST).float()
    above = torch.nextafter(scales, torch.full_like(scales, torch.inf))
    return torch.where(scales.double() * _MOST < largest, above, scales)


def fits(narrow: Narrow, topology: TensorTopology) -> bool:
    """Whether a kernel may read these weights of a topology."""
    values, scales = narrow
    return (
        values.shape == topology.values_shape
        and (
            values.dtype is torch.bfloat16
            if scales is None
            else values.dtype is torch.int8
            and scales.dtype is torch.float32
            and scales.shape == topology.bias_shape
        )
        and (
            values.is_cpu and (scales is None or scales.is_cpu)
            if topology.is_cpu
            else values.device == topology.device and (scales is None or scales.device == topology.device)
        )
    )


def refuse_misfits(narrow: Narrow, topology: TensorTopology, **operands: Any) -> NoReturn:
    """Raise RuntimeError or TypeError for the first operand that is not what it must be.

    Parameters
    ----------
    narrow : Narrow
    topology : TensorTopology
    operands
        ``name=(tensor, dtype, shape)``; None in a shape stands for any number of tokens, and for the tensor
        if there is none.
    """
    values, scales = narrow
    if values.dtype not in NARROW or (values.dtype is torch.int8) != (scales is not None):
        raise TypeError(
            f"values must be torch.bfloat16 without scales, or torch.int8 with some, got {values.dtype} "
            f"{'without' if scales is None else 'with'}"
        )
    operands["values"] = values, values.dtype, topology.values_shape
    operands["scales"] = scales, torch.float32, topology.bias_shape
    for name, (tensor, dtype, shape) in operands.items():
        if tensor is None:
            continue
        is_shape = len(tensor.shape) == len(shape) and all(
            n is None or n == m for n, m in zip(shape, tensor.shape, strict=True)
        )
        if not is_shape or tensor.dtype is not dtype or tensor.device != topology.device:
            expected = ", ".join("tokens" if n is None else str(n) for n in shape)
            raise RuntimeError(
                f"{name} must be {dtype} of shape ({expected}) on {topology.device}, got {tensor.dtype} of "
                f"shape {tuple(tensor.shape)} on {tensor.device}"
            )
    raise RuntimeError(f"values must fit the topology, got {values.shape}")


def widened(narrow: Narrow, indptr: Tensor, sizes: Sequence[int]) -> Tensor:
    """The float32 weights that these stand for, by functions that torch traces and transforms.

    Parameters
    ----------
    narrow : Narrow
    indptr : int64 (block rows + 1,)
    sizes : (int, int, int, int)
        As of `TensorTopology`.
    """
    wide = narrow.values.float()
    if narrow.scales is None:
        return wide
    rows = _rows(indptr, wide.shape[0], (sizes[2], sizes[3]), sizes[0])
    return wide * narrow.scales[rows].unsqueeze(2)


def widen(narrow: Narrow, topology: TensorTopology) -> Tensor:
    """The same, a new tensor, in a fraction of the time where the products of the layout know how.

    Raises
    ------
    RuntimeError, TypeError
        If the weights are not those of the topology.
    """
    if not fits(narrow, topology):
        refuse_misfits(narrow, topology)
    by_kernel = getattr(topology.products, "widen", None)
    if by_kernel is None:
        return widened(narrow, topology.tensors[0], topology.sizes)
    wide: Tensor = by_kernel(topology, narrow)
    return wide


def _rows(indptr: Tensor, n: int, block_shape: tuple[int, int], n_rows: int) -> Tensor:
    """int64 (connections, block_out): the output of each row of each block; the last for those beyond W."""
    height = block_shape[0]
    # Of a size that is known, which that of `repeat_interleave` is not where torch traces.
    places = torch.arange(n, device=indptr.device)
    block_row = torch.searchsorted(indptr, places, right=True) - 1
    rows = block_row.unsqueeze(1) * height + torch.arange(height, device=indptr.device)
    return rows.clamp(max=max(n_rows - 1, 0))
