"""The kernels as torch operators with gradients.

``sparselab::linear`` is differentiable; ``sparselab::linear_input_grad`` and
``sparselab::linear_values_grad`` are its two gradients and run only where autograd asks for them. All three
are opaque to torch: `torch.compile` puts them into its graph as they are. A device other than the CPU has no
implementation.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparselab.kernels._sddmm_dw import sample
from sparselab.kernels._spmm import multiply
from sparselab.kernels._spmm_t import multiply_t
from sparselab.nn._plans import find_plans
from sparselab.nn._threads import use_torch_threads


class GradientWatcher(Protocol):
    """Sees the two factors of a layer's dense gradient, ``dW = dy^T x``, as they pass through autograd."""

    def forward_seen(self) -> None:
        """A forward pass whose backward pass may come."""

    def backward_seen(self, x: Tensor, dy: Tensor) -> None:
        """Its backward pass: x (tokens, in_features) and dy (tokens, out_features), detached, not copied."""


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory in C order, as the kernels walk it."""
    array: np.ndarray[Any, Any] = tensor.detach().contiguous().numpy()
    return array


def _feature_major(tokens: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tokens.detach().numpy().T
    return array


@torch.library.custom_op("sparselab::linear", mutates_args=(), device_types="cpu")
def linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    indptr: Tensor,
    indices: Tensor,
    plans: int,
) -> Tensor:
    """``y = x W^T + b`` for x (tokens, in_features) and W in compressed rows without spare slots.

    Parameters
    ----------
    x : (tokens, in_features), any strides
    values : (nnz,), the dtype of x
    bias : (out_features,) or None
    indptr : int64 (out_features + 1,)
    indices : uint16, int32 or int64 (nnz,)
    plans : int
        Number of the `LayerPlans` to use; 0 for none.

    Raises
    ------
    RuntimeError
        If values or bias do not fit the topology or the dtype of x.
    TypeError, ValueError
        If the topology is not valid.
    """
    plan = find_plans(plans, indptr, indices, x.shape[1]).forward
    rows = indptr.shape[0] - 1
    _check_fit("values", values, indices.shape[0], x.dtype)
    if bias is not None:
        _check_fit("bias", bias, rows, x.dtype)
    use_torch_threads()
    y = x.new_empty((x.shape[0], rows))
    offset = None if bias is None else _array(bias)
    multiply(_array(values), _array(indices), plan, _feature_major(x), _feature_major(y), offset)
    return y


@linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    indptr: Tensor,
    indices: Tensor,
    plans: int,
) -> Tensor:
    return x.new_empty((x.shape[0], indptr.shape[0] - 1))


@torch.library.custom_op("sparselab::linear_input_grad", mutates_args=(), device_types="cpu")
def linear_input_grad(
    grad: Tensor, values: Tensor, indptr: Tensor, indices: Tensor, in_features: int, plans: int
) -> Tensor:
    """``dx = dy W`` for dy (tokens, out_features), any strides."""
    plan = find_plans(plans, indptr, indices, in_features).input_grad
    use_torch_threads()
    dx = grad.new_empty((grad.shape[0], in_features))
    multiply_t(_array(values), plan, _feature_major(grad), _feature_major(dx))
    return dx


@linear_input_grad.register_fake
def _(grad: Tensor, values: Tensor, indptr: Tensor, indices: Tensor, in_features: int, plans: int) -> Tensor:
    return grad.new_empty((grad.shape[0], in_features))


@torch.library.custom_op("sparselab::linear_values_grad", mutates_args=(), device_types="cpu")
def linear_values_grad(grad: Tensor, x: Tensor, indptr: Tensor, indices: Tensor, plans: int) -> Tensor:
    """``dW[slot] = sum_t dy[t, i] x[t, j]`` for each live connection (i, j)."""
    plan = find_plans(plans, indptr, indices, x.shape[1]).values_grad
    use_torch_threads()
    result = grad.new_empty(indices.shape[0])
    sample(_array(indices), plan, _feature_major(grad), _feature_major(x), result.numpy())
    return result


@linear_values_grad.register_fake
def _(grad: Tensor, x: Tensor, indptr: Tensor, indices: Tensor, plans: int) -> Tensor:
    return grad.new_empty(indices.shape[0])


def _check_fit(name: str, tensor: Tensor, length: int, dtype: torch.dtype) -> None:
    if tensor.shape != (length,) or tensor.dtype != dtype:
        raise RuntimeError(
            f"{name} must be {dtype} of shape ({length},), got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise if a tensor carries a forward-mode tangent, which torch drops at an operator of Python's."""
    # The level only saves time: without it every tensor would be asked, at 2 us each.
    if torch.compiler.is_compiling() or getattr(forward_ad, "_current_level", 0) < 0:
        return
    for tensor in tensors:
        if tensor is None:
            continue
        if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(
                "SparseLinear has no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad); "
                "use reverse mode, as backward() and torch.autograd.grad do"
            )


class _Watching(threading.local):
    watcher: GradientWatcher | None = None


_watching = _Watching()


@contextlib.contextmanager
def watching(watcher: GradientWatcher) -> Iterator[None]:
    """Show `watcher` the operands of the backward passes of every `linear` called in this context."""
    _watching.watcher = watcher
    try:
        yield
    finally:
        _watching.watcher = None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, indptr, indices, ctx.plans = inputs
    needs_x, needs_values = ctx.needs_input_grad[:2]
    ctx.in_features = x.shape[1]
    ctx.watcher = _watching.watcher if needs_values else None
    ctx.save_for_backward(x if needs_values else None, values if needs_x else None, indptr, indices)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, indptr, indices = ctx.saved_tensors
    needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
    dx = dvalues = dbias = None
    if ctx.watcher is not None:
        ctx.watcher.backward_seen(x.detach(), grad.detach())
    if needs_x:
        dx = linear_input_grad(grad, values, indptr, indices, ctx.in_features, ctx.plans)
    if needs_values:
        dvalues = linear_values_grad(grad, x, indptr, indices, ctx.plans)
    if needs_bias:
        dbias = grad.sum(0)
    return dx, dvalues, dbias, None, None, None


linear.register_autograd(_backward, setup_context=_setup_context)
