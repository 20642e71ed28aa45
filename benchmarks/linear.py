"""One linear layer, module level: packing, autograd, bias and layout changes included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.timing import Timing, interleave
from sparselab import SparseLinear

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A layer and a batch."""

    in_features: int
    out_features: int
    tokens: int
    sparsity: float

    def __str__(self) -> str:
        return f"{self.in_features}->{self.out_features}, {self.tokens} tokens, {self.sparsity:.0%}"


#: The shapes of the published tables, ``(in_features, out_features, tokens)``.
SHAPES = ((768, 3072, 2048), (3072, 768, 2048), (384, 1536, 2048), (640, 2560, 1024))

OPERATIONS: dict[str, Callable[[nn.Module, Tensor, Tensor], Call]] = {}
CONTENDERS: dict[str, Callable[[SparseLinear], nn.Module]] = {}


def operation(name: str) -> Callable[..., Callable[..., Call]]:
    """Register how to prepare a call to time: ``(module, x, dy) -> call``."""

    def register(prepare: Callable[[nn.Module, Tensor, Tensor], Call]) -> Callable[..., Call]:
        OPERATIONS[name] = prepare
        return prepare

    return register


def contender(name: str) -> Callable[..., Callable[..., nn.Module]]:
    """Register how to make a module that computes the same as a given sparse layer."""

    def register(make: Callable[[SparseLinear], nn.Module]) -> Callable[..., nn.Module]:
        CONTENDERS[name] = make
        return make

    return register


@operation("forward")
def _forward(module: nn.Module, x: Tensor, dy: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            result: Tensor = module(x)
        return result

    return call


@operation("forward + backward")
def _forward_backward(module: nn.Module, x: Tensor, dy: Tensor) -> Call:
    x = x.clone().requires_grad_()

    def call() -> None:
        module.zero_grad()
        x.grad = None
        module(x).backward(dy)

    return call


@contender("sparselab")
def _sparselab(layer: SparseLinear) -> nn.Module:
    return layer


@contender("dense")
def _dense(layer: SparseLinear) -> nn.Module:
    return layer.to_dense()


class _InBfloat16(nn.Module):
    """A dense layer under bfloat16 autocast, for CPUs with bfloat16 matrix units."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.linear(x).float()


@contender("dense bfloat16")
def _dense_bfloat16(layer: SparseLinear) -> nn.Module:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise RuntimeError("this CPU has no bfloat16 instructions; emulated, a product takes seconds")
    return _InBfloat16(layer.to_dense())


class _TorchCSR(nn.Module):
    """`torch.sparse_csr` weight; dX and dW by torch's own kernels for the sampled and sparse products."""

    def __init__(self, layer: SparseLinear) -> None:
        super().__init__()
        dense = layer.to_dense()
        self.weight = nn.Parameter(dense.weight.detach().to_sparse_csr())
        self.bias = dense.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) + self.bias


@contender("torch CSR")
def _torch_csr(layer: SparseLinear) -> nn.Module:
    return _TorchCSR(layer)


def gate(module: nn.Module, layer: SparseLinear, x: Tensor, tolerance: float) -> None:
    """Refuse to time a contender whose output is not that of the layer."""
    with torch.no_grad():
        expected, actual = layer.to_dense()(x), module(x)
    error = float((actual - expected).abs().max() / expected.abs().max())
    if not error <= tolerance:
        raise AssertionError(f"{type(module).__name__} is off by {error:.1e} of the largest output")


def run_case(
    case: Case, operations: list[str], contenders: list[str], rounds: int
) -> dict[str, dict[str, Timing | str]]:
    """Timings by operation and contender; a text says why a contender could not run."""
    torch.manual_seed(0)
    layer = SparseLinear(case.in_features, case.out_features, sparsity=case.sparsity)
    x = torch.randn(case.tokens, case.in_features)
    dy = torch.randn(case.tokens, case.out_features)
    results: dict[str, dict[str, Timing | str]] = {}
    for name in operations:
        calls: dict[str, Call] = {}
        results[name] = {}
        for which in contenders:
            try:
                module = CONTENDERS[which](layer)
                gate(module, layer, x, 2e-2 if "bfloat16" in which else 1e-5)
                call = OPERATIONS[name](module, x, dy)
                call()
                calls[which] = call
            except RuntimeError as error:  # torch CSR lacks some products on some builds
                results[name][which] = str(error).splitlines()[0]
        results[name].update(interleave(calls, rounds, f"{case}, {name}"))
    return results
