"""Checks of what enters a sparse layer: sizes, dtypes, inputs and loaded states."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparselab.kernels import BlockCSR
from sparselab.kernels.layouts.block_csr import grid_of
from sparselab.kernels.layouts.padded_csr import RowTopology

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def check_input(x: Tensor, values: Tensor) -> Tensor:
    """x, brought to the dtype of the values under autocast; errors as documented at `SparseLinear`."""
    if x.dtype is values.dtype and x.dtype in _DTYPES and x.is_cpu and values.is_cpu:
        return x
    for name, tensor in (("input", x), ("layer", values)):
        if tensor.device.type not in ("cpu", "meta"):
            raise NotImplementedError(
                f"sparse layers have kernels for the CPU; the {name} must be there, got {tensor.device}"
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


def check_images(x: Tensor, in_channels: int) -> None:
    """Raise RuntimeError unless x is (n, in_channels, height, width), or one image."""
    if x.ndim not in (3, 4) or x.shape[-3] != in_channels:
        raise RuntimeError(
            f"input must have shape (n, in_channels={in_channels}, height, width), or that of one image, "
            f"got {tuple(x.shape)}"
        )


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
    if values.shape != indices.shape:
        raise ValueError(f"values must have shape {tuple(indices.shape)}, as indices, got {_kind(values)}")
    RowTopology(shape, begin, np.diff(begin), indices.numpy())
    columns: Tensor = indices.to(index_dtype)
    return columns


def check_fan_in(state: dict[str, Any], shape: tuple[int, int], index_dtype: torch.dtype) -> Tensor | None:
    """As `check_topology`, for rows of equal length.

    Parameters
    ----------
    state : dict
        What was loaded under the names values, indices and rows, or None. Rows may be missing: then every
        output has connections.
    shape, index_dtype
        As of `check_topology`.
    """
    given = {name: tensor for name, tensor in state.items() if name != "rows" or tensor is not None}
    if not _is_complete(given):
        return None
    values, indices, rows = (state[name] for name in ("values", "indices", "rows"))
    if values.ndim != 2 or (values.numel() == 0 and values.shape != (0, 0)):
        raise ValueError(f"values must have shape (rows left, fan_in), got {_kind(values)}")
    if indices.shape != values.shape:
        raise ValueError(f"indices must have shape {tuple(values.shape)}, as values, got {_kind(indices)}")
    left = torch.arange(shape[0]) if rows is None else rows
    if left.dtype != torch.int64 or left.shape != (len(values),):
        raise ValueError(f"rows must be int64 of shape ({len(values)},), got {_kind(left)}")
    if len(left) and not (left[0] >= 0 and left[-1] < shape[0] and bool((left[1:] > left[:-1]).all())):
        raise ValueError(f"rows must be strictly ascending outputs of 0..{shape[0] - 1}")
    indptr = fan_in_pointers(rows, shape[0], values.shape[1])
    flat = {"values": values.reshape(-1), "indptr": indptr, "indices": indices.reshape(-1)}
    columns = check_topology(flat, shape, index_dtype)
    return None if columns is None else columns.view(values.shape)


def fan_in_pointers(rows: Tensor | None, out_features: int, fan_in: int) -> Tensor:
    """int64 (out_features + 1,) row pointers where some outputs (None: all) have `fan_in` connections."""
    row_nnz = torch.zeros(out_features + 1, dtype=torch.int64)
    row_nnz[slice(1, None) if rows is None else rows.cpu() + 1] = fan_in
    return row_nnz.cumsum(0)


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
