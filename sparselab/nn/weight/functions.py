"""Which of torch's functions take the weight of a sparse layer, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from sparselab.nn.weight.described import Described
from sparselab.nn.weight.products import convolve, convolve_transposed, linear
from sparselab.nn.weight.writing import refuse_to_write


def call(func: Any, args: Any, kwargs: Any) -> Any:
    """Call one of torch's functions, of which an argument is the weight of a sparse layer.

    Raises
    ------
    TypeError
        If it is none of those that are known here.
    """
    if func in _PRODUCTS:
        return _PRODUCTS[func](*args, **kwargs)
    initializes = getattr(func, "__module__", "") == "torch.nn.init"
    if not (initializes or func in _PLAIN):
        refuse(func)
    # The methods of the weight are found all the same.
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
    return [*args, *kwargs.values()][0] if initializes else result


def refuse(func: Any) -> NoReturn:
    """Raise TypeError for a function that is not computed with live weights alone."""
    if torch.compiler.is_compiling():  # where no name can be looked up
        refuse_named("a function of torch")
    name = torch.overrides.resolve_name(func) or getattr(func, "__name__", str(func))
    last = name.rsplit(".", 1)[-1]
    if last in ("__setitem__", "__set__") or (last.endswith("_") and not last.endswith("__")):
        refuse_to_write(None, name)
    refuse_named(name)


def refuse_named(name: str) -> NoReturn:
    """As `refuse`, by name."""
    # What torch.nn.Module and torch.nn.utils.prune ask of what they assign or prune.
    more = (
        "; another layer shares the weight as TiedLinear(layer), and sparselab.prune removes connections"
        if name == "torch.Tensor.type"
        else ""
    )
    raise TypeError(
        f"{name} must be given a dense tensor, got the weight of a sparse layer: write "
        "layer.weight.to_dense() for the dense matrix, or layer.weight_values for the live weights alone"
        f"{more}"
    )


def matmul(input: Any, other: Any) -> Tensor:
    """As `torch.matmul`."""
    if not isinstance(input, Described):
        return linear(input, other.T)
    if other.ndim == 1:
        return linear(other, input)
    return linear(other.transpose(-1, -2), input).transpose(-1, -2)


def _matmul_operator(input: Any, other: Any) -> Tensor:
    """As `matmul`, where `torch.compile` hands over both ``x @ weight`` and ``weight @ x`` as (x, weight)."""
    if torch.compiler.is_compiling() and isinstance(other, Described):
        before = input.shape[-1] == other.shape[0]
        after = input.shape[-min(input.ndim, 2)] == other.shape[-1]
        if before and after:
            raise TypeError(
                "torch.matmul must be written in place of @ under torch.compile, which does not tell "
                "x @ weight from weight @ x, where both have a meaning, got "
                f"{tuple(input.shape)} and {tuple(other.shape)}"
            )
        if after:
            return matmul(other, input)
    return matmul(input, other)


def mm(input: Any, mat2: Any) -> Tensor:
    """As `torch.mm`."""
    if input.ndim != 2 or mat2.ndim != 2:
        raise RuntimeError(f"mm must be given two matrices, got {input.ndim} and {mat2.ndim} dimensions")
    return matmul(input, mat2)


def mv(input: Any, vec: Any) -> Tensor:
    """As `torch.mv`."""
    if input.ndim != 2 or vec.ndim != 1:
        raise RuntimeError(
            f"mv must be given a matrix and a vector, got {input.ndim} and {vec.ndim} dimensions"
        )
    return matmul(input, vec)


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if isinstance(input, Described):
        refuse(torch.addmm)
    product = mm(mat1, mat2)
    product = product if alpha == 1 else product * alpha
    if beta == 0:
        return product
    added: Tensor = input if beta == 1 else input * beta
    return product + added


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    if not isinstance(weight, Described):
        refuse(F.linear)
    return linear(input, weight, bias)


def _convolution(func: Any, compute: Callable[..., Tensor], n_dims: int) -> Callable[..., Tensor]:
    """One of torch's convolutions, computed with live weights."""

    def convolution(input: Any, weight: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(weight, Described):
            refuse(func)
        return compute(n_dims, input, weight, *args, **kwargs)

    return convolution


#: What is computed, by the function that asks for it.
_PRODUCTS: dict[Any, Any] = {
    F.linear: _linear,
    **{each: _convolution(each, convolve, n) for n, each in enumerate((F.conv1d, F.conv2d, F.conv3d), 1)},
    **{
        each: _convolution(each, convolve_transposed, n)
        for n, each in enumerate((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), 1)
    },
    torch.matmul: matmul,
    **dict.fromkeys((Tensor.matmul, Tensor.__matmul__), _matmul_operator),
    Tensor.__rmatmul__: lambda other, input: matmul(input, other),
    **dict.fromkeys((torch.mm, Tensor.mm), mm),
    **dict.fromkeys((torch.mv, Tensor.mv), mv),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    torch.t: lambda input: input.T,
    torch.transpose: lambda input, dim0, dim1: input.transpose(dim0, dim1),
    torch.numel: lambda input: input.numel(),
    torch.detach: lambda input: input.detach(),
}

#: What a tensor without memory answers truly.
_PLAIN: set[Any] = {
    getattr(Tensor, name).__get__
    for name in ("is_cpu", "is_cuda", "is_nested", "is_quantized", "is_sparse", "is_sparse_csr", "layout")
} | {
    torch.is_floating_point, Tensor.is_floating_point, torch.is_complex, Tensor.is_complex,
    Tensor.__hash__,
}  # fmt: skip


def refused_operators() -> dict[str, Callable[..., NoReturn]]:
    """Methods that raise, for the operators of which torch would turn our TypeError into a shorter one."""

    def make(name: str) -> Callable[..., NoReturn]:
        def method(self: Any, *others: Any) -> NoReturn:
            refuse_named(name)

        method.__name__ = name
        return method

    binary = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
    names = [f"__{side}{each}__" for side in ("", "r", "i") for each in binary]
    names += [f"__{each}__" for each in ("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert")]
    return {name: make(name) for name in names if name not in ("__imul__", "__itruediv__")}
