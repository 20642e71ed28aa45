"""What a torch operator must return for any arguments, or that they are wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.case import Found
from tests.fuzz.judge import Twin

Array = np.ndarray[Any, Any]

#: Relative rounding of one operation.
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
_MOST_ENTRIES = 1 << 22


class Invalid(Exception):
    """The arguments have no right result."""


class TooLarge(Exception):
    """The result is right, but too large to be computed here."""


def need(condition: bool, what: str) -> None:
    """Raise `Invalid` unless the condition holds."""
    if not condition:
        raise Invalid(what)


def written(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own, if it only stands for numbers."""
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    return tensor.detach().resolve_neg()


def dense(tensor: Any, what: str) -> Tensor:
    """A floating tensor in float64."""
    need(isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu", what)
    need(tensor.is_floating_point(), f"{what} is {tensor.dtype}")
    return written(tensor).double()


def integers(tensor: Any, what: str) -> Array:
    """An integer tensor as int64."""
    need(isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu", what)
    need(not tensor.is_floating_point() and tensor.dtype != torch.bool and not tensor.is_complex(), what)
    return written(tensor).numpy().astype(np.int64)  # type: ignore[no-any-return]


def topology(args: dict[str, Any], shape: tuple[int, int], block: tuple[int, int]) -> Twin:
    """The positions that the arguments say, with weights of 0."""
    need(min(shape) >= 0 and min(block) >= 1, "sizes")
    twin = Twin(shape, block)
    rows, columns = twin.grid
    if rows * columns * math.prod(block) > _MOST_ENTRIES:
        raise TooLarge
    indptr, indices = integers(args["indptr"], "indptr"), integers(args["indices"], "indices").reshape(-1)
    need(indptr.shape == (rows + 1,), f"indptr of shape {indptr.shape} for {rows} rows")
    need(indptr[0] == 0 and indptr[-1] == len(indices) and bool(np.all(np.diff(indptr) >= 0)), "indptr")
    need(bool(np.all((indices >= 0) & (indices < columns))), "indices out of range")
    positions = np.repeat(np.arange(rows), np.diff(indptr)) * columns + indices
    need(bool(np.all(np.diff(positions) > 0)), "indices that do not ascend")
    return twin.set(positions, np.zeros((len(positions), *block)))


def weighted(args: dict[str, Any], shape: tuple[int, int]) -> Twin:
    """The matrix that the arguments say."""
    values = dense(args["values"], "values")
    block: Any = tuple(values.shape[1:]) if values.ndim == 3 else (1, 1)
    if "block_shape" in args:
        need(tuple(args["block_shape"]) == block, "block_shape")
    twin = topology(args, shape, block)
    need(values.numel() == twin.nnz * math.prod(block), f"{values.numel()} values for {twin.nnz} connections")
    return twin.set(twin.positions, values.numpy())


Results = list[tuple[Tensor, Tensor, int]]


def results(operator: str, args: dict[str, Any]) -> Results:
    """Each output with the magnitude of its terms and their number. Raises `Invalid`."""
    kind = "conv2d" if operator.startswith("conv2d") else "linear"
    if operator.endswith("_input_grad"):
        return (_conv_input_grad if kind == "conv2d" else _input_grad)(args)
    if operator.endswith("_values_grad"):
        return (_conv_values_grad if kind == "conv2d" else _values_grad)(args)
    return (_conv if kind == "conv2d" else _linear)(args)


def _pair(function: Any, *operands: Tensor) -> tuple[Tensor, Tensor]:
    """A product, and the magnitude of its terms."""
    return function(*operands), function(*(operand.abs() for operand in operands))


def _rows(args: dict[str, Any]) -> int:
    if "out_features" in args:
        return int(args["out_features"])
    need(isinstance(args["indptr"], Tensor) and args["indptr"].ndim == 1, "indptr")
    return len(args["indptr"]) - 1


def _linear(args: dict[str, Any]) -> Results:
    x = dense(args["x"], "x")
    need(x.ndim == 2, f"x of {x.ndim} dimensions")
    columns = args.get("in_features", x.shape[1])
    need(x.shape[1] == columns, f"x of shape {tuple(x.shape)} for {columns} inputs")
    rows = _rows(args)
    W = torch.from_numpy(weighted(args, (rows, columns)).dense())
    y, magnitude = _pair(lambda x, W: x @ W.T, x, W)
    if args["bias"] is not None:
        bias = dense(args["bias"], "bias")
        need(bias.shape == (rows,), f"bias of shape {tuple(bias.shape)}")
        y, magnitude = y + bias, magnitude + bias.abs()
    return [(y, magnitude, columns + 1)]


def _input_grad(args: dict[str, Any]) -> Results:
    grad = dense(args["grad"], "grad")
    need(grad.ndim == 2, f"grad of {grad.ndim} dimensions")
    rows = args.get(
        "out_features", _rows(args) if "values" in args and args["values"].ndim != 3 else grad.shape[1]
    )
    need(grad.shape[1] == rows, f"grad of shape {tuple(grad.shape)} for {rows} outputs")
    W = torch.from_numpy(weighted(args, (rows, args["in_features"])).dense())
    return [(*_pair(lambda grad, W: grad @ W, grad, W), rows)]


def _values_grad(args: dict[str, Any]) -> Results:
    grad, x = dense(args["grad"], "grad"), dense(args["x"], "x")
    need(grad.ndim == x.ndim == 2 and len(grad) == len(x), f"grad {tuple(grad.shape)}, x {tuple(x.shape)}")
    block: Any = tuple(args.get("block_shape", (1, 1)))
    need(len(block) == 2, "block_shape")
    rows = args.get("out_features", grad.shape[1] if "block_shape" in args else _rows(args))
    columns = args.get("in_features", x.shape[1])
    need((grad.shape[1], x.shape[1]) == (rows, columns), "sizes")
    twin = topology(args, (rows, columns), block)
    full, magnitude = _pair(lambda grad, x: grad.T @ x, grad, x)
    outputs = [
        (
            torch.from_numpy(twin.gather(full.numpy())),
            torch.from_numpy(twin.gather(magnitude.numpy())),
            len(x),
        )
    ]
    if "with_bias" in args:
        sums = (grad.sum(0), grad.abs().sum(0)) if args["with_bias"] else (torch.zeros(0), torch.zeros(0))
        outputs.append((*sums, len(x)))
    return outputs


class _Geometry:
    """A convolution, from the arguments of an operator."""

    def __init__(self, args: dict[str, Any]) -> None:
        if "geometry" not in args:
            raise NotImplementedError("this schema of conv2d")
        need(len(args["geometry"]) == 10, "geometry")
        self.channels, self.groups, *rest = args["geometry"]
        self.kernel, self.stride, self.padding, self.dilation = (rest[k : k + 2] for k in (0, 2, 4, 6))
        need(min(self.groups, *self.kernel, *self.stride, *self.dilation) >= 1, "geometry")
        need(self.channels >= 0 and min(self.padding) >= 0, "geometry")
        if max(args["geometry"]) >= 1000:
            raise TooLarge
        self.rows = _rows(args)
        need(self.channels % self.groups == 0 and self.rows % self.groups == 0, "groups")
        self.columns = self.channels // self.groups * math.prod(self.kernel)
        need(args.get("in_features", self.columns) == self.columns, "geometry of another matrix")

    def outputs(self, size: Any) -> tuple[int, ...]:
        """Height and width of the outputs for images of this size."""
        found = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        need(min(found) >= 1 and min(size) >= 0 and max(size) < 10_000, f"images of {size}")
        return found

    def convolve(self, x: Tensor, W: Tensor) -> Tensor:
        """The convolution of images by W, a matrix."""
        weight = W.reshape(self.rows, self.channels // self.groups, *self.kernel)
        return torch.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)


def _images(tensor: Any, name: str, channels: int) -> Tensor:
    images = dense(tensor, name)
    need(images.ndim == 4 and images.shape[1] == channels, f"{name} of shape {tuple(images.shape)}")
    return images


def _conv(args: dict[str, Any]) -> Results:
    geometry = _Geometry(args)
    x = _images(args["x"], "x", geometry.channels)
    geometry.outputs(x.shape[2:])
    W = torch.from_numpy(weighted(args, (geometry.rows, geometry.columns)).dense())
    y, magnitude = _pair(geometry.convolve, x, W)
    if args["bias"] is not None:
        bias = dense(args["bias"], "bias")
        need(bias.shape == (geometry.rows,), "bias")
        y, magnitude = y + bias[:, None, None], magnitude + bias.abs()[:, None, None]
    return [(y, magnitude, geometry.columns + 1)]


def _by(geometry: _Geometry, x: Tensor, W: Tensor, grad: Tensor, by_input: bool) -> Tensor:
    with torch.enable_grad():
        x, W = x.clone().requires_grad_(), W.clone().requires_grad_()
        (found,) = torch.autograd.grad(geometry.convolve(x, W), x if by_input else W, grad)
    return found


def _conv_input_grad(args: dict[str, Any]) -> Results:
    geometry = _Geometry(args)
    grad = _images(args["grad"], "grad", geometry.rows)
    size = args["height"], args["width"]
    need(geometry.outputs(size) == tuple(grad.shape[2:]), f"grad {tuple(grad.shape)} for images of {size}")
    W = torch.from_numpy(weighted(args, (geometry.rows, geometry.columns)).dense())
    x = torch.zeros(len(grad), geometry.channels, *size, dtype=torch.float64)
    pair = _pair(lambda W, grad: _by(geometry, x, W, grad, True), W, grad)
    return [(*pair, geometry.rows * math.prod(geometry.kernel))]


def _conv_values_grad(args: dict[str, Any]) -> Results:
    geometry = _Geometry(args)
    x = _images(args["x"], "x", geometry.channels)
    grad = _images(args["grad"], "grad", geometry.rows)
    need(
        len(x) == len(grad) and geometry.outputs(x.shape[2:]) == tuple(grad.shape[2:]), "sizes of grad and x"
    )
    twin = topology(args, (geometry.rows, geometry.columns), (1, 1))
    W = torch.zeros(twin.shape, dtype=torch.float64)
    full, magnitude = _pair(lambda x, grad: _by(geometry, x, W, grad, False), x, grad)
    n_terms = grad.numel() // max(1, geometry.rows)
    gathered = [torch.from_numpy(twin.gather(each.numpy())) for each in (full, magnitude)]
    outputs = [(gathered[0], gathered[1], n_terms)]
    if "with_bias" in args:
        none = torch.zeros(0)
        sums = (grad.sum((0, 2, 3)), grad.abs().sum((0, 2, 3))) if args["with_bias"] else (none, none)
        outputs.append((*sums, n_terms))
    return outputs


def judge(outputs: Any, expected: Results, eps: float) -> None:
    """Raise `Found` unless every output is right."""
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    if len(outputs) != len(expected):
        raise Found("wrong", f"{len(outputs)} outputs instead of {len(expected)}")
    for k, (got, (value, magnitude, terms)) in enumerate(zip(outputs, expected, strict=True)):
        expect_tensor(got, value, magnitude, terms, eps, f"output {k}")


def expect_tensor(got: Any, value: Tensor, magnitude: Tensor, terms: int, eps: float, what: str) -> None:
    """Raise `Found` unless a tensor is within the rounding bound; connections may have any layout."""
    if got is None or got.numel() != value.numel():
        raise Found("wrong", f"{what}: {None if got is None else tuple(got.shape)} for {tuple(value.shape)}")
    got = got.detach().double().reshape(value.shape)
    bound = (terms + 4) * eps * magnitude + 1.2e-38
    wrong = ~((got - value).abs() <= bound)
    if wrong.any():
        at = int(wrong.flatten().nonzero()[0, 0])
        raise Found(
            "wrong", f"{what}: {int(wrong.sum())} of {got.numel()} are off, first {got.flatten()[at]:.6g} "
            f"instead of {value.flatten()[at]:.6g}",
        )  # fmt: skip
