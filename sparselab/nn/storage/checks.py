"""Checks of what enters a sparse layer: sizes, dtypes, inputs and loaded states."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparselab.kernels.arrays import check_fraction
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.nn.ops.checks import ACCEPTED
from sparselab.nn.ops.inputs.tokens import refuse_strided_nested
from sparselab.nn.ops.products import has_products
from sparselab.nn.ops.tracing import has_memory


def check_tokens(x: Tensor, values: Tensor, in_features: int) -> Tensor:
    """x (..., in_features); errors as of `SparseLinear`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"input must be a torch.Tensor, got {type(x).__name__}")
    try:
        shape, dtype = x.shape, x.dtype
    except RuntimeError:
        refuse_strided_nested(x)
        raise
    fits = shape and shape[-1] == in_features and dtype is values.dtype and dtype in ACCEPTED
    if fits and x.is_cpu and values.is_cpu:
        return x
    check_width(x, in_features)
    return check_input(x, values)


def in_precision(compute: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """``compute(x)``, as `under_autocast` where that is on."""
    return under_autocast(compute, x, dtype) if torch.is_autocast_enabled("cpu") else compute(x)


def under_autocast(compute: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a product returns under CPU autocast: of the dtype that dense layers give, unless it is float64.

    It is computed in the dtype of the weights, which autocast would round before.

    Parameters
    ----------
    compute : callable
        Takes x in the dtype of the weights, and is called without autocast.
    x : Tensor
        Of any floating dtype.
    dtype : torch.dtype
        Of the weights.
    """
    found = torch.get_autocast_dtype("cpu")
    if isinstance(x, Tensor) and x.is_floating_point():
        x = x.to(dtype)
    with torch.autocast("cpu", enabled=False):
        y = compute(x)
    return y if y.dtype == torch.float64 else y.to(found)


def check_input(x: Tensor, values: Tensor) -> Tensor:
    """x; errors as documented at `SparseLinear`."""
    device, dtype = x.device, x.dtype
    if dtype is values.dtype and dtype in ACCEPTED and device == values.device and device.type == "cpu":
        return x
    for name, tensor in (("input", x), ("layer", values)):
        if not has_products(tensor.device.type):
            raise NotImplementedError(
                f"sparse layers have products for the CPU; the {name} must be there, got {tensor.device}"
            )
    if x.device != values.device:
        raise RuntimeError(f"input must be on the layer's device, {values.device}, got {x.device}")
    check_dtype("values", values.dtype)
    if x.dtype != values.dtype:
        raise RuntimeError(f"input must have the dtype of the layer's values, {values.dtype}, got {x.dtype}")
    return x


def check_width(x: Tensor, in_features: int) -> None:
    """Raise RuntimeError unless x is (..., in_features)."""
    refuse_strided_nested(x)
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise RuntimeError(f"input must have shape (..., in_features={in_features}), got {tuple(x.shape)}")


def check_images(x: Tensor, in_channels: int, n_dims: int = 2) -> None:
    """Raise RuntimeError unless x is (n, in_channels, *size), of so many dimensions, or that without n."""
    if x.ndim not in (n_dims + 1, n_dims + 2) or x.shape[-n_dims - 1] != in_channels:
        size = ", ".join(("length",) if n_dims == 1 else ("depth", "height", "width")[-n_dims:])
        raise RuntimeError(
            f"input must have shape (n, in_channels={in_channels}, {size}), or that without n, got "
            f"{tuple(x.shape)}"
        )


def check_rows(
    state: dict[str, Any], grid: tuple[int, int], block_shape: tuple[int, int], columns: torch.dtype
) -> Tensor | None:
    """The loaded columns, in the dtype that the layer has them in; None if nothing of W is there.

    Parameters
    ----------
    state : dict
        What was loaded under the names weight_values, indptr and indices, or None.
    grid : (int, int)
        Rows and columns of the positions of the layer that loads.
    block_shape : (int, int)
        Of its connections.
    columns : torch.dtype
        Of its columns.

    Raises
    ------
    TypeError, ValueError
        If a part is missing or is not what a kernel may be given.
    """
    if not _is_complete(state):
        return None
    values, indptr, indices = (state[name].detach().cpu() for name in ("weight_values", "indptr", "indices"))
    if indptr.dtype != torch.int64 or indptr.shape != (grid[0] + 1,):
        raise ValueError(f"indptr must be int64 of shape ({grid[0] + 1},), got {_kind(indptr)}")
    if indices.dtype not in (torch.uint16, torch.int32, torch.int64) or indices.ndim != 1:
        raise TypeError(f"indices must be uint16, int32 or int64 of one dimension, got {_kind(indices)}")
    expected = len(indices), *block_shape
    is_number = values.is_floating_point() or values.dtype is torch.int8  # of a layer that is frozen so
    if not is_number or values.shape != expected:
        raise TypeError(f"weight_values must be floating point of shape {expected}, got {_kind(values)}")
    begin = indptr.numpy()
    if begin[0] != 0:
        raise ValueError(f"indptr must start at 0, got {begin[0]}")
    RowTopology(grid, begin, np.diff(begin), indices.numpy())
    narrow: Tensor = indices.to(columns)
    return narrow


def check_fan_in(
    state: dict[str, Any], shape: tuple[int, int], columns: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """As `check_rows`, for rows of equal length, some of which may be empty: the row pointers, too.

    Parameters
    ----------
    state : dict
        What was loaded under the names weight_values, indices, fan_in and rows, or None. Rows, the outputs
        that have connections, may be missing: then every output has as many.
    shape : (int, int)
    columns : torch.dtype
    """
    given = {name: tensor for name, tensor in state.items() if name != "rows" or tensor is not None}
    if not _is_complete(given):
        return None
    indices, each, rows = state["indices"], state["fan_in"], state["rows"]
    if indices.ndim != 1:
        raise ValueError(f"indices must have one dimension, got {_kind(indices)}")
    left = torch.arange(shape[0]) if rows is None else rows.cpu()
    if left.dtype != torch.int64 or left.ndim != 1:
        raise ValueError(f"rows must be int64 of one dimension, got {_kind(left)}")
    if len(left) and not (left[0] >= 0 and left[-1] < shape[0] and bool((left[1:] > left[:-1]).all())):
        raise ValueError(f"rows must be strictly ascending outputs of 0..{shape[0] - 1}")
    fan_in, rest = divmod(len(indices), max(len(left), 1))
    if rest or (len(indices) and not len(left)):
        raise ValueError(
            f"indices must have equally many columns for each of {len(left)} rows, got {len(indices)}"
        )
    if each.dtype != torch.int64 or each.ndim:
        raise ValueError(f"fan_in must be int64 of no dimension, got {_kind(each)}")
    if int(each) != fan_in:
        raise ValueError(
            f"fan_in must be {fan_in} for {len(indices)} columns of {len(left)} rows, got {int(each)}; are "
            f"the rows missing?"
        )
    row_nnz = torch.zeros(shape[0] + 1, dtype=torch.int64)
    row_nnz[left + 1] = fan_in
    indptr = row_nnz.cumsum(0)
    parts = {"weight_values": state["weight_values"], "indptr": indptr, "indices": indices}
    narrow = check_rows(parts, shape, (1, 1), columns)
    return None if narrow is None else (narrow, indptr)


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
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
        if not has_memory(tensor):
            raise ValueError(f"{name} must have memory for all of its entries; its storage was resized")
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
    if dtype not in ACCEPTED:
        known = "torch.float32, torch.float64, torch.bfloat16 or torch.float16"
        raise TypeError(f"{name} must be {known}, got {dtype}")


def check_bias(bias: object, example: str) -> bool:
    """Whether there are biases; TypeError, with the call that may have been meant, if it is no bool.

    Parameters
    ----------
    bias : object
    example : str
        A call up to `bias`, without its closing parenthesis.
    """
    if isinstance(bias, (bool, np.bool_)):
        return bool(bias)
    meant = f"; for a sparsity write {example}, sparsity={bias!r})" if isinstance(bias, (int, float)) else ""
    raise TypeError(f"bias must be True or False, got {bias!r}{meant}")


def read_sparsity(sparsity: float | None, density: float | None, fan_in: int | None = None) -> float:
    """The sparsity, from either way to say it; 0.9 if neither is given, or something else says it.

    Raises
    ------
    TypeError, ValueError
        If more than one is given, or one is not a finite number in [0, 1].
    """
    amounts = {"sparsity": sparsity, "density": density, "fan_in": fan_in}
    said = {name: amount for name, amount in amounts.items() if amount is not None}
    if len(said) > 1:
        names, numbers = " or ".join(said), " and ".join(str(amount) for amount in said.values())
        raise ValueError(f"only one of {names} must be given, got {numbers}")
    if density is not None:
        check_fraction("density", density)
        return 1 - float(density)
    if sparsity is None:
        return 0.9
    check_fraction("sparsity", sparsity)
    return float(sparsity)


def warn_if_none(nnz: int, grid: tuple[int, int], sparsity: float, stacklevel: int = 4) -> None:
    """Warn that nothing is left of a layer that was asked to have something.

    Parameters
    ----------
    nnz : int
        Its connections.
    grid : (int, int)
        Rows and columns of their positions.
    sparsity : float
        What was asked for.
    stacklevel : int
        As of `warnings.warn`, from here.
    """
    if nnz == 0 and sparsity < 1 and grid[0] * grid[1]:
        warnings.warn(
            f"a sparsity of {sparsity:.6g} leaves no connection among {grid[0]} x {grid[1]} positions: every "
            f"output will be its bias; ask for a lower sparsity, smaller blocks, or leave the layer dense",
            stacklevel=stacklevel,
        )


def read_fan_in(columns: int, fan_in: int) -> int:
    """The connections of each output; TypeError or ValueError unless there are so many inputs."""
    if check_size("fan_in", fan_in) > columns:
        raise ValueError(f"fan_in must be at most {columns}, the inputs of an output, got {fan_in}")
    return int(fan_in)
