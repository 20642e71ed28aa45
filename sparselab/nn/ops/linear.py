"""The kernels as torch operators with gradients.

``sparselab::linear`` is differentiable; ``sparselab::linear_input_grad`` and
``sparselab::linear_values_grad`` are its two gradients and run only where autograd asks for them. All three
are opaque to torch: `torch.compile` puts them into its graph as they are. A device other than the CPU has no
implementation.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparselab.nn.ops.cpu.plans import LayerPlans, find_plans
from sparselab.nn.ops.cpu.products import few_tokens, input_grad, product, values_grad
from sparselab.nn.ops.cpu.threads import use_torch_threads
from sparselab.nn.ops.operands import GradientFactors, LinearFactors

_ORDINARY = (Tensor, torch.nn.Parameter)


class GradientWatcher(Protocol):
    """Sees the factors of a layer's dense gradient as they pass through autograd."""

    def forward_seen(self) -> None:
        """A forward pass whose backward pass may come."""

    def backward_seen(self, factors: GradientFactors) -> None:
        """Its backward pass: what its gradient is made of, detached, not copied."""


def _linear(
    x: Tensor, values: Tensor, bias: Tensor | None, indptr: Tensor, indices: Tensor, plans: int
) -> Tensor:
    """``y = x W^T + b`` for x (tokens, in_features) and W in compressed rows without spare slots.

    Parameters
    ----------
    x : (tokens, in_features), any strides
    values : (nnz,) or (rows, fan-in), the dtype of x
    bias : (out_features,) or None
    indptr : int64 (out_features + 1,)
    indices : uint16, int32 or int64, the shape of values
    plans : int
        Number of the `LayerPlans` to use; 0 for none.

    Raises
    ------
    RuntimeError
        If values or bias do not fit the topology or the dtype of x.
    TypeError, ValueError
        If the topology is not valid.
    """
    found = find_plans(plans, indptr, indices, x.shape[1])
    check_fit(x, values, bias, found.layout, found.shape[0])
    return product(x, values, bias, found)


def _input_grad(
    grad: Tensor, values: Tensor, indptr: Tensor, indices: Tensor, in_features: int, plans: int
) -> Tensor:
    """``dx = dy W`` for dy (tokens, out_features), any strides."""
    return input_grad(grad, values, find_plans(plans, indptr, indices, in_features))


def _values_grad(
    grad: Tensor, x: Tensor, indptr: Tensor, indices: Tensor, plans: int, with_bias: bool
) -> tuple[Tensor, Tensor]:
    """``dW[slot] = sum_t dy[t, i] x[t, j]`` for each live connection (i, j), and the bias' gradient.

    The latter, ``sum_t dy[t]``, costs little here, where dy is read anyway; empty if it is not wanted.
    """
    values, bias = values_grad(grad, x, find_plans(plans, indptr, indices, x.shape[1]), with_bias)
    return values.view(indices.shape), bias


linear = torch.library.custom_op("sparselab::linear", _linear, mutates_args=(), device_types="cpu")
linear_input_grad = torch.library.custom_op(
    "sparselab::linear_input_grad", _input_grad, mutates_args=(), device_types="cpu"
)
linear_values_grad = torch.library.custom_op(
    "sparselab::linear_values_grad", _values_grad, mutates_args=(), device_types="cpu"
)


@linear.register_fake
def _(x: Tensor, values: Tensor, bias: Tensor | None, indptr: Tensor, indices: Tensor, plans: int) -> Tensor:
    return x.new_empty((x.shape[0], indptr.shape[0] - 1))


@linear_input_grad.register_fake
def _(grad: Tensor, values: Tensor, indptr: Tensor, indices: Tensor, in_features: int, plans: int) -> Tensor:
    return grad.new_empty((grad.shape[0], in_features))


@linear_values_grad.register_fake
def _(
    grad: Tensor, x: Tensor, indptr: Tensor, indices: Tensor, plans: int, with_bias: bool
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(indices.shape), grad.new_empty(grad.shape[1] if with_bias else 0)


def check_fit(x: Tensor, values: Tensor, bias: Tensor | None, layout: tuple[int, ...], rows: int) -> None:
    """Raise RuntimeError if values or bias do not fit the topology or the dtype of x."""
    for name, tensor, shape in (("values", values, layout), ("bias", bias, (rows,))):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x.dtype):
            raise RuntimeError(
                f"{name} must be {x.dtype} of shape {tuple(shape)}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )


def sparse_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, indptr: Tensor, indices: Tensor, plans: LayerPlans
) -> Tensor:
    """As `linear`, by the shortest way; see `call`."""
    return call(linear, _with_gradient, _linear, x, values, bias, indptr, indices, plans.number)


def call(
    operator: Callable[..., Tensor],
    with_gradient: Callable[..., Tensor],
    without: Callable[..., Tensor],
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    *others: Any,
) -> Tensor:
    """Call an operator; without torch's dispatcher (20 us, 100 with gradients) where nobody would see it.

    Parameters
    ----------
    operator, with_gradient, without : callable
        The operator itself, the same for autograd alone, and for nobody.
    x, values, bias, others
        The arguments.
    """
    if not torch.compiler.is_compiling():
        tensors = (x, values) if bias is None else (x, values, bias)
        refuse_forward_mode(*tensors)
        if _is_plain(tensors):
            operator = with_gradient if _wants_gradient(tensors) else without
    return operator(x, values, bias, *others)


def infer(
    x: Tensor,
    parameters: Mapping[str, Any],
    buffers: Mapping[str, Any],
    layer_plans: LayerPlans,
    compute: Callable[..., None] = few_tokens,
) -> Tensor | None:
    """The output of a layer for few tokens that nobody differentiates or traces; None for all else.

    A shortcut. The product of one token takes 40 us and evicts from the caches what Python works with, so
    that each step of the general way costs microseconds then, 70 together. Here everything is looked at once,
    which takes 35. What is out of the ordinary in any way, an error included, is left to the general way.

    Parameters
    ----------
    x : (..., in_features)
    parameters, buffers
        Of the layer, by name.
    layer_plans : LayerPlans
        Of the layer.
    compute : callable
        The product for few tokens, as `few_tokens`.
    """
    plans, values, bias = layer_plans.current, parameters.get("values"), parameters.get("bias")
    if (
        plans is None
        or values is None
        or buffers["forward_mask"] is not None
        or torch.compiler.is_compiling()
    ):
        return None
    (rows, columns), dtype = plans.shape, x.dtype
    tensors = (x, values) if bias is None else (x, values, bias)
    if (
        x.numel() == 0
        or x.shape[-1] != columns
        or plans.variant("forward", x.numel() // columns) != "few tokens"
        or not _is_plain(tensors)
        or _wants_gradient(tensors)
        or not (dtype is torch.float32 or dtype is torch.float64)
        or dtype is not values.dtype
        or not x.is_contiguous()
        or getattr(forward_ad, "_current_level", 0) >= 0
        or not plans.is_of(buffers["indptr"], buffers["indices"], plans.sizes)
    ):
        return None
    check_fit(x, values, bias, plans.layout, rows)
    y = x.new_empty((*x.shape[:-1], rows))
    compute(x, values, bias, plans, y, use_torch_threads())
    return y


def plain_function(
    operator: Callable[..., Tensor], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Tensor]:
    """An operator with its gradients, known to autograd alone.

    Its context is set up in `forward`: for a `setup_context`, which only `torch.func` needs, torch would look
    at the operator's signature in every call.
    """

    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = operator(*inputs)
        setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type("PlainFunction", (torch.autograd.Function,), members)
    apply: Callable[..., Tensor] = function.apply
    return apply


def plain_gradient(*tensors: Tensor | None) -> bool:
    """Whether a gradient from these can be computed without an operator: nobody would see it."""
    present = tuple(tensor for tensor in tensors if tensor is not None)
    return _is_plain(present) and not _wants_gradient(present) and not torch.compiler.is_compiling()


def _wants_gradient(tensors: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _is_plain(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the tensors are ordinary ones, and nothing traces or transforms.

    A tensor whose sign is still to be turned (`Tensor.is_neg`), or of zeros without memory, is not ordinary:
    the dispatcher makes it so.
    """
    for tensor in tensors:
        if type(tensor) not in _ORDINARY or not tensor.is_cpu or tensor.is_neg() or tensor._is_zerotensor():
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def refuse_forward_mode(*tensors: Tensor) -> None:
    """Raise if a tensor carries a forward-mode tangent, which torch drops at an operator of Python's."""
    # The level only saves time: without it every tensor would be asked, at 2 us each.
    if getattr(forward_ad, "_current_level", 0) < 0:
        return
    for tensor in tensors:
        if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(
                "sparse layers have no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad); "
                "use reverse mode, as backward() and torch.autograd.grad do"
            )


class _Watching(threading.local):
    watcher: GradientWatcher | None = None


_watching = _Watching()


@contextlib.contextmanager
def watching(watcher: GradientWatcher) -> Iterator[None]:
    """Show `watcher` the factors of the gradients of every operator called in this context."""
    _watching.watcher = watcher
    try:
        yield
    finally:
        _watching.watcher = None


def keep_operands(ctx: Any, x: Tensor, values: Tensor, indptr: Tensor, indices: Tensor) -> None:
    """Keep what the gradients need of an operator's arguments, and who watches them."""
    needs_x, needs_values = ctx.needs_input_grad[:2]
    ctx.watcher = _watching.watcher if needs_values else None
    ctx.save_for_backward(x if needs_values else None, values if needs_x else None, indptr, indices)


def linear_gradients(
    ctx: Any,
    grad: Tensor,
    by_input: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    by_values: tuple[Callable[..., Any], Callable[..., Any]],
    *layout: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a linear layer by its input, values and bias, as far as they are wanted.

    Parameters
    ----------
    ctx
        With what `keep_operands` kept, ``in_features`` and ``plans``.
    grad : (tokens, out_features)
    by_input, by_values : (callable, callable)
        The operator of each gradient, and the function behind it, which does where nobody would see it.
    layout
        What the gradient by values must be told of their layout.
    """
    x, values, indptr, indices = ctx.saved_tensors
    needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
    dx = dvalues = dbias = None
    if ctx.watcher is not None:
        ctx.watcher.backward_seen(LinearFactors(x.detach(), grad.detach()))
    direct = plain_gradient(grad, x, values)
    if needs_x:
        dx = by_input[direct](grad, values, indptr, indices, ctx.in_features, ctx.plans)
    if needs_values:
        dvalues, sums = by_values[direct](grad, x, indptr, indices, *layout, ctx.plans, needs_bias)
        dbias = sums if needs_bias else None
    elif needs_bias:
        dbias = grad.sum(0)
    return dx, dvalues, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, indptr, indices, ctx.plans = inputs
    ctx.in_features = x.shape[1]
    keep_operands(ctx, x, values, indptr, indices)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    by_input, by_values = (linear_input_grad, _input_grad), (linear_values_grad, _values_grad)
    return *linear_gradients(ctx, grad, by_input, by_values), None, None, None


_with_gradient = plain_function(_linear, _setup_context, _backward)
linear.register_autograd(_backward, setup_context=_setup_context)
