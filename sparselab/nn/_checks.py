"""Checks of what enters a sparse layer: sizes, dtypes, inputs and loaded states."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparselab.kernels import BlockCSR, PaddedCSR
from sparselab.kernels.blocks import grid_of

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def check_input(x: Tensor, values: Tensor, in_features: int) -> Tensor:
    """x, brought to the dtype of the values under autocast; errors as documented at `SparseLinear`."""
    check_width(x, in_features)
    if x.dtype is values.dtype and x.dtype in _DTYPES and x.is_cpu and values.is_cpu:
        return x
    for name, tensor in (("input", x), ("layer", values)):
        if tensor.device.type not in ("cpu", "meta"):
            raise NotImplementedError(
                f"SparseLinear has kernels for the CPU; the {name} must be there, got {tensor.device}"
            )
    if x.device != values.device:
        raise RuntimeError(f"input must be on the layer's device, {values.device}, got {x.device}")
    check_dtype("values", values.dtype)
    if x.dtype != values.dtype:
        if not (x.is_floating_point() and torch.is_autocast_enabled("cpu")):
            raise RuntimeError(
                f"input must have the dtype of the layer's values, {values.dtype}, got {x.dtype}"
            )
        x = x.to(values.dtype)
    return x


def check_width(x: Tensor, in_features: int) -> None:
    """Raise RuntimeError unless x is (..., in_features)."""
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise RuntimeError(f"input must have shape (..., in_features={in_features}), got {tuple(x.shape)}")


def check_topology(state: dict[str, Any], shape: tuple[int, int], index_dtype: torch.dtype) -> Tensor | None:
    """The loaded columns in `index_dtype`; None if the state holds nothing of the topology.

    Parameters
    ----------
    state : dict
        What was loaded under the names values, indptr and indices, or None.
    shape : (int, int)
        ``(out_features, in_features)`` of the layer that loads.
    index_dtype : torch.dtype
        Dtype of the layer's columns.

    Raises
    ------
    TypeError, ValueError
        If a part is missing or is not what a kernel may be given.
    """
    if not _is_complete(state):
        return None
    values, indptr, indices = (state[name].detach().cpu() for name in ("values", "indptr", "indices"))
    if not values.is_floating_point() or values.ndim != 1:
        raise TypeError(f"values must be a 1-D floating point tensor, got {_kind(values)}")
    if indptr.dtype != torch.int64 or indptr.shape != (shape[0] + 1,):
        raise ValueError(f"indptr must be int64 of shape ({shape[0] + 1},), got {_kind(indptr)}")
    if indices.dtype not in (torch.uint16, torch.int32, torch.int64):
        raise TypeError(f"indices must be uint16, int32 or int64, got {_kind(indices)}")
    begin = indptr.numpy()
    if begin[0] != 0:
        raise ValueError(f"indptr must start at 0, got {begin[0]}")
    no_values = np.broadcast_to(np.float32(0), values.shape)
    PaddedCSR(shape, begin, np.diff(begin), indices.numpy(), no_values)
    columns: Tensor = indices.to(index_dtype)
    return columns


def check_blocks(
    state: dict[str, Any], shape: tuple[int, int], block_shape: tuple[int, int], index_dtype: torch.dtype
) -> Tensor | None:
    """As `check_topology`, for a layer of dense blocks of that shape."""
    if not _is_complete(state):
        return None
    values, indptr, indices = (state[name].detach().cpu() for name in ("values", "indptr", "indices"))
    if not values.is_floating_point() or values.ndim != 3:
        raise TypeError(f"values must be a 3-D floating point tensor, got {_kind(values)}")
    rows, _ = grid_of(shape, block_shape)
    if indptr.dtype != torch.int64 or indptr.shape != (rows + 1,):
        raise ValueError(f"indptr must be int64 of shape ({rows + 1},), got {_kind(indptr)}")
    if indices.dtype not in (torch.uint16, torch.int32, torch.int64):
        raise TypeError(f"indices must be uint16, int32 or int64, got {_kind(indices)}")
    known = values if values.dtype in (torch.float32, torch.float64) else values.float()
    BlockCSR(shape, block_shape, indptr.numpy(), indices.numpy(), known.numpy())
    narrow: Tensor = indices.to(index_dtype)
    return narrow


def _is_complete(state: dict[str, Any]) -> bool:
    """False if a state has none of its tensors; an error if it lacks some, or they hold no data."""
    missing = [name for name, tensor in state.items() if tensor is None]
    if len(missing) == len(state):
        return False
    if missing:
        raise ValueError(f"{', '.join(state)} must be loaded together, got no {missing[0]}")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_meta:
            raise ValueError(f"{name} must hold data, got a tensor on the meta device")
    return True


def check_size(name: str, value: int) -> int:
    """The size as an int; TypeError or ValueError if it is not a non-negative integer."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return int(value)


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise TypeError if a layer cannot have this dtype."""
    if dtype not in _DTYPES:
        raise TypeError(f"{name} must be torch.float32, torch.float64 or torch.bfloat16, got {dtype}")
