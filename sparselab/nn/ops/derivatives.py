"""Derivatives of a layer's products: of any order, in reverse and forward mode, and under `torch.func`.

``y = x W^T + b`` is linear in x and in W, and so are its gradients ``dx = dy W`` and ``dW = dy^T x`` in
theirs. The derivatives of each are the other two, so three functions are enough for every order. They are
written once, for linear layers and for convolutions; what computes them are opaque operators, which see plain
tensors only.

W may be a layer's, whose gradient hook then sees what its gradient is made of, or something in its place: a
cotangent or a tangent of it, which no algorithm grows by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from sparselab.nn.ops.leaves import shown_form
from sparselab.nn.ops.tracing import uncompiled

#: A cotangent or a tangent; None is zero.
Maybe = Tensor | None


class Bilinear(Protocol):
    """The three products of a layer, as operators on the tensors of its topology."""

    def product(self, x: Tensor, values: Tensor, bias: Maybe, indptr: Tensor, indices: Tensor) -> Tensor:
        """``x W^T + b``."""

    def input_grad(self, grad: Tensor, values: Tensor, indptr: Tensor, indices: Tensor) -> Tensor:
        """``dy W``."""

    def values_grad(
        self, grad: Tensor, x: Tensor, indptr: Tensor, indices: Tensor, with_bias: bool
    ) -> tuple[Tensor, Tensor]:
        """``dy^T x`` at the connections, and the sum of dy for each output, or an empty tensor."""

    def is_trained(self, leaf: Tensor, indptr: Tensor, indices: Tensor) -> bool:
        """Whether gradients by a leaf of the graph are those of the layer's Parameter."""

    def hidden(self) -> Bilinear:
        """The same for something in place of the layer's values: no hook sees the operands."""


class _Product(torch.autograd.Function):
    """``x W^T + b``."""

    n_operands = 3

    @staticmethod
    def forward(
        x: Tensor, values: Tensor, bias: Maybe, indptr: Tensor, indices: Tensor, form: Bilinear
    ) -> Tensor:
        return form.product(x, values, bias, indptr, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, _, indptr, indices, ctx.form = inputs
        ctx.shape = output.shape
        _save(ctx, x, values, indptr, indices)

    @staticmethod
    def gradients(needs: Any, grads: Any, saved: Any, form: Bilinear) -> tuple[Maybe, ...]:
        """By x, W and b."""
        (grad,), (x, values, *topology) = grads, saved
        dx = dvalues = dbias = None
        if grad is None:
            return dx, dvalues, dbias
        _refuse_batched(grad)
        if needs[0]:
            dx = input_grad(grad, values, topology, form)
        if needs[1]:
            dvalues, sums = values_grad(grad, x, topology, form, needs[2])
            dbias = sums if needs[2] else None
        elif needs[2]:
            dbias = sum_of_outputs(grad)
        return dx, dvalues, dbias

    @staticmethod
    @uncompiled
    def backward(ctx: Any, *grads: Maybe) -> tuple[Maybe, ...]:
        saved = ctx.saved_tensors
        form = shown_form(ctx, 1, ctx.form, *saved[2:])
        return *_Product.gradients(ctx.needs_input_grad, grads, saved, form), None, None, None

    @staticmethod
    @uncompiled
    def jvp(ctx: Any, *tangents: Maybe) -> Tensor:
        (x, values, *topology), (dx, dvalues, dbias, *_) = ctx.saved_tensors, tangents
        terms = []
        if dx is not None:
            terms.append(product(dx, values, None, topology, ctx.form))
        if dvalues is not None:
            terms.append(product(x, dvalues, None, topology, ctx.form.hidden()))
        if dbias is not None:
            terms.append(_spread(dbias, ctx.shape))
        return _sum(terms)

    @staticmethod
    @uncompiled
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        (x, values, bias, *rest), (of_x, of_values, of_bias, *others) = args, in_dims
        if of_values is not None or any(each is not None for each in others):
            return each_of_batch(_Product, info.batch_size, in_dims, args)
        y = _folded(_Product, x, of_x, values, bias if of_bias is None else None, *rest)
        if of_bias is not None:
            bias = bias.movedim(of_bias, 0)
            y = y + bias.reshape(info.batch_size, 1, bias.shape[1], *[1] * (y.ndim - 3))
        return y, 0


class _InputGrad(torch.autograd.Function):
    """``dy W``."""

    n_operands = 2

    @staticmethod
    def forward(grad: Tensor, values: Tensor, indptr: Tensor, indices: Tensor, form: Bilinear) -> Tensor:
        return form.input_grad(grad, values, indptr, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *operands, ctx.form = inputs
        _save(ctx, *operands)

    @staticmethod
    def gradients(needs: Any, grads: Any, saved: Any, form: Bilinear) -> tuple[Maybe, ...]:
        """By dy and W."""
        (along,), (grad, values, *topology) = grads, saved
        if along is None:
            return None, None
        _refuse_batched(along)
        return (
            product(along, values, None, topology, form) if needs[0] else None,
            values_grad(grad, along, topology, form, False)[0] if needs[1] else None,
        )

    @staticmethod
    @uncompiled
    def backward(ctx: Any, *grads: Maybe) -> tuple[Maybe, ...]:
        saved = ctx.saved_tensors
        form = shown_form(ctx, 1, ctx.form, *saved[2:])
        found = _InputGrad.gradients(ctx.needs_input_grad, grads, saved, form)
        return *found, None, None, None

    @staticmethod
    @uncompiled
    def jvp(ctx: Any, *tangents: Maybe) -> Tensor:
        (grad, values, *topology), (dgrad, dvalues, *_) = ctx.saved_tensors, tangents
        terms = []
        if dgrad is not None:
            terms.append(input_grad(dgrad, values, topology, ctx.form))
        if dvalues is not None:
            terms.append(input_grad(grad, dvalues, topology, ctx.form.hidden()))
        return _sum(terms)

    @staticmethod
    @uncompiled
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        of_grad, *others = in_dims
        if any(each is not None for each in others):
            return each_of_batch(_InputGrad, info.batch_size, in_dims, args)
        return _folded(_InputGrad, args[0], of_grad, *args[1:]), 0


class _ValuesGrad(torch.autograd.Function):
    """``dy^T x`` at the connections, and the sum of dy for each output if it is wanted."""

    n_operands = 2

    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, indptr: Tensor, indices: Tensor, with_bias: bool, form: Bilinear
    ) -> tuple[Tensor, Tensor]:
        return form.values_grad(grad, x, indptr, indices, with_bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *operands, ctx.with_bias, ctx.form = inputs
        ctx.n_sums = len(output[1])
        _save(ctx, *operands)

    @staticmethod
    def gradients(needs: Any, grads: Any, saved: Any, form: Bilinear) -> tuple[Maybe, ...]:
        """By dy and x."""
        V, sums = grads[0], grads[1] if len(grads) > 1 and grads[1] is not None and len(grads[1]) else None
        grad, x, *topology = saved
        if V is None:
            return None if sums is None or not needs[0] else _spread(sums, grad.shape), None
        _refuse_batched(V)
        return (
            product(x, V, sums, topology, form.hidden()) if needs[0] else None,
            input_grad(grad, V, topology, form.hidden()) if needs[1] else None,
        )

    @staticmethod
    @uncompiled
    def backward(ctx: Any, *grads: Maybe) -> tuple[Maybe, ...]:
        found = _ValuesGrad.gradients(ctx.needs_input_grad, grads, ctx.saved_tensors, ctx.form)
        return *found, None, None, None, None

    @staticmethod
    @uncompiled
    def jvp(ctx: Any, *tangents: Maybe) -> tuple[Tensor, Tensor]:
        (grad, x, *topology), (dgrad, dx, *_) = ctx.saved_tensors, tangents
        terms, sums = [], grad.new_zeros(ctx.n_sums)
        if dgrad is not None:
            dvalues, sums = values_grad(dgrad, x, topology, ctx.form.hidden(), ctx.with_bias)
            terms.append(dvalues)
        if dx is not None:
            terms.append(values_grad(grad, dx, topology, ctx.form.hidden(), False)[0])
        return _sum(terms), sums

    @staticmethod
    @uncompiled
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        # A sum over the tokens of each, which cannot be told apart when they are folded.
        return each_of_batch(_ValuesGrad, info.batch_size, in_dims, args)


def _refuse_batched(grad: Tensor) -> None:
    """Raise RuntimeError for a batch of gradients that are to be differentiated again: no graph is kept."""
    if torch.is_grad_enabled() and torch._C._functorch.is_legacy_batchedtensor(grad):
        raise RuntimeError(
            "create_graph must be False where gradients of sparse layers are batched (is_grads_batched=True, "
            "vectorize=True), got True; take vectorize=False, or torch.func.jacrev and its kin"
        )


@uncompiled
def product(x: Tensor, values: Tensor, bias: Maybe, topology: Any, form: Bilinear) -> Tensor:
    """``x W^T + b``, differentiable without limits.

    Parameters
    ----------
    x : as the layer's product takes it
    values : (connections, block_out, block_in)
    bias : (outputs,) or None
    topology : sequence of two tensors
    form : Bilinear
    """
    y: Tensor = _Product.apply(x, values, bias, *topology, form)  # type: ignore[no-untyped-call]
    return y


def input_grad(grad: Tensor, values: Tensor, topology: Any, form: Bilinear) -> Tensor:
    """``dy W``, differentiable without limits."""
    dx: Tensor = _InputGrad.apply(grad, values, *topology, form)  # type: ignore[no-untyped-call]
    return dx


def values_grad(
    grad: Tensor, x: Tensor, topology: Any, form: Bilinear, with_bias: bool
) -> tuple[Tensor, Tensor]:
    """``dy^T x`` at the connections, and the sum of dy for each output, differentiable without limits."""
    both = _ValuesGrad.apply(grad, x, *topology, with_bias, form)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, Tensor]", both)


def product_gradients(
    needs: tuple[bool, ...], grad: Tensor, operands: tuple[Maybe, Maybe], topology: Any, form: Bilinear
) -> tuple[Maybe, ...]:
    """The gradients of `product` by x, values and bias, as far as they are needed, differentiable.

    Parameters
    ----------
    needs : tuple of bool
        Which of the three.
    grad : Tensor
        Of the output.
    operands : x and values
        Either is None if no gradient needs it.
    topology, form
        As of `product`.
    """
    return _Product.gradients(needs, (grad,), (*operands, *topology), form)


def register_derivatives(
    product: Any, input_grad: Any, values_grad: Any, form_of: Callable[..., Bilinear]
) -> None:
    """Make the three operators of a family differentiable.

    Parameters
    ----------
    product, input_grad, values_grad : custom operators
        They take their operands, then indptr and indices, then what is no tensor.
    form_of : callable
        ``form_of(operand, *rest)``: the products, from the second operand of `values_grad` or the first of
        the others, and from what is no tensor.
    """
    for operator, function, which in (
        (product, _Product, 0), (input_grad, _InputGrad, None), (values_grad, _ValuesGrad, 1),
    ):  # fmt: skip
        _register(operator, function, form_of, which)


def _register(operator: Any, function: Any, form_of: Callable[..., Bilinear], which: int | None) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.n_inputs, n_operands = len(inputs), function.n_operands
        ctx.form = form_of(None if which is None else inputs[which], *inputs[n_operands + 2 :])
        needs, (first, second) = ctx.needs_input_grad, inputs[:2]
        ctx.save_for_backward(
            first if needs[1] else None, second if needs[0] else None,
            *inputs[n_operands : n_operands + 2],
        )  # fmt: skip

    def backward(ctx: Any, *grads: Maybe) -> tuple[Maybe, ...]:
        saved = ctx.saved_tensors
        form = ctx.form if which == 1 else shown_form(ctx, 1, ctx.form, *saved[2:])
        found = function.gradients(ctx.needs_input_grad, grads, saved, form)
        return *found, *[None] * (ctx.n_inputs - len(found))

    operator.register_autograd(backward, setup_context=setup_context)


def _save(ctx: Any, *tensors: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _sum(terms: list[Tensor]) -> Tensor:
    """One or two of them, as many as there are."""
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)


def sum_of_outputs(grad: Tensor) -> Tensor:
    """(outputs,)"""
    return grad.sum([0, *range(2, grad.ndim)])


def _spread(bias: Tensor, shape: Any) -> Tensor:
    """What (outputs,) adds to an output of a shape."""
    return bias.reshape(len(bias), *[1] * (len(shape) - 2)).expand(shape)


def _folded(function: Any, tokens: Tensor, dim: int | None, *rest: Any) -> Tensor:
    """The function of a batch of tokens, as one of more tokens."""
    if dim is None:
        alone: Tensor = function.apply(tokens, *rest)
        return alone.unsqueeze(0)
    tokens = tokens.movedim(dim, 0)
    together: Tensor = function.apply(tokens.flatten(0, 1), *rest)
    return together.reshape(*tokens.shape[:2], *together.shape[1:])


def each_of_batch(function: Any, n: int, in_dims: Any, args: Any) -> tuple[Any, Any]:
    """The function of each element of a batch alone."""
    batched = {i for i, dim in enumerate(in_dims) if dim is not None}
    moved = [arg.movedim(in_dims[i], 0) if i in batched else arg for i, arg in enumerate(args)]
    if n == 0:  # the shapes are those of one
        moved = [arg.new_zeros(1, *arg.shape[1:]) if i in batched else arg for i, arg in enumerate(moved)]
    found = [
        function.apply(*(arg[k] if i in batched else arg for i, arg in enumerate(moved)))
        for k in range(max(n, 1))
    ]
    if isinstance(found[0], Tensor):
        return torch.stack(found)[:n], 0
    return tuple(torch.stack(parts)[:n] for parts in zip(*found, strict=True)), (0,) * len(found[0])
