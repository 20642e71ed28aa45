"""The torch operators, given what does not fit, and exported programs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import sparselab
from tests.hazards.cases import demand, hazard
from tests.hazards.programs.names import weights


class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
    """Operators of the library as they are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, list[Any]]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "sparselab":
            self.calls[function._schema.name.split("::")[1]] = (function, list(args))
        return function(*args, **(kwargs or {}))


def calls_of(layer: Any, x: torch.Tensor) -> dict[str, tuple[Any, list[Any]]]:
    """The operators that a step of the layer calls."""
    with Recorded() as recorded:
        layer(x.requires_grad_()).sum().backward()
    return recorded.calls


def called(calls: Any, suffix: str, **other: Any) -> None:
    """Call an operator with some arguments replaced by what does not fit, which must be refused."""
    (name,) = [each for each in calls if each.endswith(suffix)]
    function, args = calls[name]
    for k, argument in enumerate(function._schema.arguments):
        if argument.name in other:
            args[k] = other[argument.name](args[k])
    got = function(*args)
    got = got[0] if isinstance(got, (tuple, list)) else got
    largest = got.abs().max() if got.numel() else 0.0
    demand(False, f"{name} returned {tuple(got.shape)}, up to {largest:.3g}")


@hazard("operators", "conv2d with 3 channels where the layer has 4")
def conv_channels() -> None:
    layer = sparselab.SparseConv2d(4, 8, 3, padding=1, sparsity=0.5)
    calls = calls_of(layer, torch.randn(2, 4, 64, 64))
    called(calls, "conv2d", x=lambda x: torch.randn(2, 3, 64, 64))


def linear_calls(n_tokens: int = 40) -> Any:
    layer = sparselab.SparseLinear(256, 512, sparsity=0.9)
    return calls_of(layer, torch.randn(n_tokens, 256))


@hazard("operators", "linear_values_grad with a gradient 3 wide")
def narrow_gradient() -> None:
    called(linear_calls(), "linear_values_grad", grad=lambda _: torch.randn(40, 3))


@hazard("operators", "linear_input_grad with 3 of 13107 values")
def few_values() -> None:
    called(linear_calls(), "linear_input_grad", values=lambda values: values[:3])


@hazard("operators", "a float64 gradient with float32 x")
def wide_gradient() -> None:
    called(
        linear_calls(), "linear_values_grad",
        grad=lambda grad: torch.ones(grad.shape, dtype=torch.float64),
    )  # fmt: skip


@hazard("operators", "a gradient of 9000 tokens against x of 40")
def many_tokens() -> None:
    called(linear_calls(), "linear_values_grad", grad=lambda grad: torch.randn(9000, 512))


@hazard("operators", "an unpack hook that returns a short tensor")
def short_saved() -> None:
    layer, x = sparselab.SparseLinear(256, 512, sparsity=0.9), torch.randn(400, 256)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t[:3] if t.shape == x.shape else t):
        y = layer(x)
    y.sum().backward()
    demand(False, f"accepted, gradient up to {weights(layer).grad.abs().max():.3g}")


@hazard(
    "exported", "a program exported from one kind of layer meets a layer of another kind", refusable=False
)
def exported_meets() -> None:
    import subprocess
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/program.pt2"
        make = (
            "import torch, sparselab; torch.manual_seed(0); x = torch.ones(40, 64); "
            "layer = sparselab.SparseLinear(64, 32, sparsity=0.8); "
            f"torch.export.save(torch.export.export(layer, (x,)), {path!r}); "
            f"torch.save(layer(x), {path + '.y'!r})"
        )
        subprocess.run([sys.executable, "-c", make], check=True, capture_output=True)
        layers = [sparselab.BlockSparseLinear(64, 32, sparsity=0.5) for _ in range(3)]
        x = torch.ones(40, 64)
        for layer in layers:
            layer(x)
        program = torch.export.load(path).module()
        got, expected = program(x), torch.load(path + ".y")
        demand(torch.allclose(got, expected, atol=1e-5), f"off by {(got - expected).abs().max():.2g}")


@hazard("exported", "a program without a layer makes its plans once", refusable=False)
def exported_plans() -> str:
    from unittest import mock

    import sparselab.kernels.cpu.csr.plan as plans

    layer = sparselab.SparseLinear(64, 32, sparsity=0.8)
    x = torch.ones(400, 64)
    program = torch.export.export(layer, (x,)).module()
    del layer
    with mock.patch.object(plans, "_segments", wraps=plans._segments) as made:
        for _ in range(5):
            program(x)
    demand(made.call_count <= 1, f"{made.call_count} plans were made in 5 calls")
    return "at most one plan in 5 calls"


@hazard("masks", "forward_mask over an infinite weight", refusable=False)
def infinite_masked() -> None:
    layer = sparselab.SparseLinear(16, 8, sparsity=0.5)
    mask = torch.ones_like(weights(layer), dtype=torch.bool)
    with torch.no_grad():
        weights(layer)[0] = np.inf
    mask[0] = False
    layer.forward_mask = mask
    y = layer(torch.ones(4, 16))
    demand(bool(y.isfinite().all()), "NaN from a weight that is masked out")
