"""The kernels as torch operators with gradients.

``sparselab::linear`` is differentiable; ``sparselab::linear_input_grad`` and
``sparselab::linear_values_grad`` are its two gradients and run only where autograd asks for them. All three
are opaque to torch: `torch.compile` puts them into its graph as they are. A device other than the CPU has no
implementation.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sparselab.kernels import Segments, TransposePlan
from sparselab.kernels._sddmm_dw import sample
from sparselab.kernels._spmm import multiply
from sparselab.kernels._spmm_t import multiply_t
from sparselab.nn._threads import use_torch_threads


class GradientWatcher(Protocol):
    """Sees the two factors of a layer's dense gradient, ``dW = dy^T x``, as they pass through autograd."""

    def forward_seen(self) -> None:
        """A forward pass whose backward pass may come."""

    def backward_seen(self, x: Tensor, dy: Tensor) -> None:
        """Its backward pass: x (tokens, in_features) and dy (tokens, out_features), detached, not copied."""


def pack_segments(plan: Segments) -> list[Tensor]:
    """A plan's arrays as tensors (sharing memory); its two numbers go along as a tensor of their own."""
    numbers = np.array([plan.n_connections, plan.block_columns], np.int64)
    return [torch.from_numpy(array) for array in (numbers, *plan[2:])]


def pack_transpose(plan: TransposePlan) -> list[Tensor]:
    """As `pack_segments`, for the plan of `spmm_t`."""
    return [torch.from_numpy(plan.indices), torch.from_numpy(plan.slots), *pack_segments(plan.segments)]


def _unpack_segments(tensors: Sequence[Tensor]) -> Segments:
    numbers, *arrays = (tensor.numpy() for tensor in tensors)
    return Segments(int(numbers[0]), int(numbers[1]), *arrays)


def _unpack_transpose(tensors: Sequence[Tensor]) -> TransposePlan:
    return TransposePlan(tensors[0].numpy(), tensors[1].numpy(), _unpack_segments(tensors[2:]))


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
    plan: Sequence[Tensor],
    input_grad_plan: Sequence[Tensor],
    values_grad_plan: Sequence[Tensor],
) -> Tensor:
    """``y = x W^T + b`` for x (tokens, in_features) and W in compressed rows without spare slots.

    Parameters
    ----------
    x : (tokens, in_features), any strides
    values : (nnz,), the dtype of x
    bias : (out_features,) or None
    indptr : int64 (out_features + 1,)
    indices : uint16, int32 or int64 (nnz,)
    plan, input_grad_plan, values_grad_plan : lists of tensors
        `pack_segments` of `plan_spmm`, `pack_transpose` of `plan_spmm_t` and `pack_segments` of
        `plan_sddmm_dw`; the last two may be empty where the gradient is not needed.

    Notes
    -----
    The topology and the plans are trusted; `SparseLinear` checks them where they come in.
    """
    use_torch_threads()
    y = x.new_empty((x.shape[0], indptr.shape[0] - 1))
    offset = None if bias is None else bias.detach().numpy()
    order = _unpack_segments(plan)
    multiply(values.detach().numpy(), indices.numpy(), order, _feature_major(x), y.numpy().T, offset)
    return y


@linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    indptr: Tensor,
    indices: Tensor,
    plan: Sequence[Tensor],
    input_grad_plan: Sequence[Tensor],
    values_grad_plan: Sequence[Tensor],
) -> Tensor:
    return x.new_empty((x.shape[0], indptr.shape[0] - 1))


@torch.library.custom_op("sparselab::linear_input_grad", mutates_args=(), device_types="cpu")
def linear_input_grad(grad: Tensor, values: Tensor, in_features: int, plan: Sequence[Tensor]) -> Tensor:
    """``dx = dy W`` for dy (tokens, out_features), any strides."""
    use_torch_threads()
    dx = grad.new_empty((grad.shape[0], in_features))
    multiply_t(values.detach().numpy(), _unpack_transpose(plan), _feature_major(grad), dx.numpy().T)
    return dx


@linear_input_grad.register_fake
def _(grad: Tensor, values: Tensor, in_features: int, plan: Sequence[Tensor]) -> Tensor:
    return grad.new_empty((grad.shape[0], in_features))


@torch.library.custom_op("sparselab::linear_values_grad", mutates_args=(), device_types="cpu")
def linear_values_grad(grad: Tensor, x: Tensor, indices: Tensor, plan: Sequence[Tensor]) -> Tensor:
    """``dW[slot] = sum_t dy[t, i] x[t, j]`` for each live connection (i, j)."""
    use_torch_threads()
    result = grad.new_empty(indices.shape[0])
    order = _unpack_segments(plan)
    sample(indices.numpy(), order, _feature_major(grad), _feature_major(x), result.numpy())
    return result


@linear_values_grad.register_fake
def _(grad: Tensor, x: Tensor, indices: Tensor, plan: Sequence[Tensor]) -> Tensor:
    return grad.new_empty(indices.shape[0])


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
    x, values, _, _, indices, plan, input_grad_plan, values_grad_plan = inputs
    needs_x, needs_values = ctx.needs_input_grad[:2]
    ctx.in_features = x.shape[1]
    ctx.watcher = _watching.watcher if needs_values else None
    ctx.plan_sizes = len(plan), len(input_grad_plan), len(values_grad_plan)
    ctx.n_input_plan = len(input_grad_plan) if needs_x else 0
    plans = (*(input_grad_plan if needs_x else ()), *(values_grad_plan if needs_values else ()))
    ctx.save_for_backward(x if needs_values else None, values if needs_x else None, indices, *plans)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, indices, *plans = ctx.saved_tensors
    needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
    dx = dvalues = dbias = None
    if ctx.watcher is not None:
        ctx.watcher.backward_seen(x.detach(), grad.detach())
    if needs_x:
        plan = plans[: ctx.n_input_plan]
        dx = linear_input_grad(grad, values, ctx.in_features, plan)
    if needs_values:
        dvalues = linear_values_grad(grad, x, indices, plans[ctx.n_input_plan :])
    if needs_bias:
        dbias = grad.sum(0)
    return dx, dvalues, dbias, None, None, *([None] * size for size in ctx.plan_sizes)


linear.register_autograd(_backward, setup_context=_setup_context)
