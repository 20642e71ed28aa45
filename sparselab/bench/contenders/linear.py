"""One linear layer, module level: packing, autograd, bias and layout changes included."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparselab import BlockSparseLinear, FanInLinear, SparseLinear
from sparselab.bench.contenders.gate import Gate, WrongResultError
from sparselab.bench.measure.timing import Timing, interleave
from sparselab.kernels.arrays import n_connections
from sparselab.nn import SparseLayer, constant_fan_in_, find_sparse

Call = Callable[[], object]

#: The shapes of the published tables, ``(in_features, out_features)``, and their tokens.
SHAPES = {(768, 3072): 2048, (3072, 768): 2048, (384, 1536): 2048, (640, 2560): 1024}

#: The contender that all others are compared with.
OURS = "sparselab"

#: Share of the largest entry by which results in bfloat16 may differ.
_BFLOAT16 = 2e-2

#: `FanInLinear`. Where it takes part, the layer gets a constant fan-in, so that it can be the same matrix.
FAN_IN = "fan-in"

#: Ours under bfloat16 autocast.
OURS_NARROW = "sparselab bfloat16"

#: Contenders that only take part where they are asked for.
OPTIONAL = FAN_IN, OURS_NARROW


@dataclass(frozen=True)
class Case:
    """A layer and a batch."""

    in_features: int
    out_features: int
    tokens: int
    sparsity: float

    @property
    def nnz(self) -> int:
        """Live connections."""
        return n_connections((self.out_features, self.in_features), self.sparsity)

    def __str__(self) -> str:
        return f"{self.in_features}->{self.out_features}, {self.tokens} tokens, {self.sparsity:.4g}"


@dataclass(frozen=True)
class Operation:
    """What is timed: ``prepare(module, x, dy)`` gives the call, which computes `products` of a layer."""

    prepare: Callable[[nn.Module, Tensor, Tensor], Call]
    products: tuple[str, ...]


@dataclass(frozen=True)
class Contender:
    """How to make a module that computes the same as a layer, to a share of the largest result.

    Or, with a `reference`, another layer of the same sizes and sparsity, which is compared with itself.
    """

    make: Callable[[SparseLinear], nn.Module]
    tolerance: float
    reference: Callable[[nn.Module], SparseLayer] | None = None


@dataclass(frozen=True)
class Result:
    """One row of a table: an operation on a case, on some threads.

    `timings` has one entry for each contender; a text says why a contender was not timed. `variant` names the
    kernels that the layer chose.
    """

    case: Case
    operation: str
    threads: int
    timings: dict[str, Timing | str]
    variant: str

    def median(self, name: str) -> float | None:
        """Milliseconds of a contender, None if it was not timed."""
        timing = self.timings.get(name)
        return timing.median if isinstance(timing, Timing) else None

    def ratio(self, name: str) -> float | None:
        """Time of a contender over ours: how many times faster we are. None if either was not timed."""
        theirs, ours = self.median(name), self.median(OURS)
        return None if theirs is None or ours is None else theirs / ours

    @property
    def gflops(self) -> float | None:
        """Ours, GFLOP/s on live weights: 2 x nnz x tokens for each product. None if ours was not timed."""
        milliseconds = self.median(OURS)
        if milliseconds is None:
            return None
        flops = 2 * self.case.nnz * self.case.tokens * len(OPERATIONS[self.operation].products)
        return flops / milliseconds / 1e6


OPERATIONS: dict[str, Operation] = {}
CONTENDERS: dict[str, Contender] = {}


def operation(name: str, *products: str) -> Callable[..., Callable[..., Call]]:
    """Register how to prepare a call to time, ``(module, x, dy) -> call``.

    `products` are the operations of `SparseLinear.variant` that the call computes.
    """

    def register(prepare: Callable[[nn.Module, Tensor, Tensor], Call]) -> Callable[..., Call]:
        OPERATIONS[name] = Operation(prepare, products)
        return prepare

    return register


def contender(name: str, tolerance: float = 1e-5) -> Callable[..., Callable[..., nn.Module]]:
    """Register how to make a module that computes the same as a given sparse layer, within a tolerance."""

    def register(make: Callable[[SparseLinear], nn.Module]) -> Callable[..., nn.Module]:
        CONTENDERS[name] = Contender(make, tolerance)
        return make

    return register


@operation("forward", "forward")
def _forward(module: nn.Module, x: Tensor, dy: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            result: Tensor = module(x)
        return result

    return call


@operation("forward + backward", "forward", "input_grad", "values_grad")
def _forward_backward(module: nn.Module, x: Tensor, dy: Tensor) -> Call:
    x = x.clone().requires_grad_()

    def call() -> None:
        module.zero_grad()
        x.grad = None
        module(x).backward(dy)

    return call


@contender(OURS)
def _sparselab(layer: SparseLinear) -> nn.Module:
    return layer


@contender(FAN_IN)
def _fan_in(layer: SparseLinear) -> nn.Module:
    try:
        return FanInLinear.from_sparse(layer)
    except ValueError as error:
        raise RuntimeError(error) from error


@contender("dense")
def _dense(layer: SparseLinear) -> nn.Module:
    return layer.to_dense()


class _InBfloat16(nn.Module):
    """A layer under bfloat16 autocast, for CPUs with bfloat16 instructions or matrix units."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: Tensor = self.linear(x)
        return y.float()


@contender("dense bfloat16", _BFLOAT16)
def _dense_bfloat16(layer: SparseLinear) -> nn.Module:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise RuntimeError("this CPU has no bfloat16 instructions; emulated, a product takes seconds")
    return _InBfloat16(layer.to_dense())


@contender(OURS_NARROW, _BFLOAT16)
def _sparselab_bfloat16(layer: SparseLinear) -> nn.Module:
    return _InBfloat16(layer)


class _TorchCSR(nn.Module):
    """`torch.sparse_csr` weight; dX and dW by torch's own kernels for the sampled and sparse products."""

    def __init__(self, layer: SparseLinear) -> None:
        super().__init__()
        dense = layer.to_dense()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
            self.weight = nn.Parameter(dense.weight.detach().to_sparse_csr())
        self.bias = dense.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) + self.bias


@contender("torch CSR")
def _torch_csr(layer: SparseLinear) -> nn.Module:
    return _TorchCSR(layer)


def blocks(block_shape: tuple[int, int], narrow: bool = False) -> str:
    """Name of the contender that is a layer of blocks of this shape, as large and as sparse as the layer.

    Or, if `narrow`, such a layer under bfloat16 autocast.
    """
    return "blocks {}x{}".format(*block_shape) + (" bfloat16" if narrow else "")


def find_contender(name: str) -> Contender:
    """The contender of a name that is registered, or of `blocks`."""
    if name in CONTENDERS:
        return CONTENDERS[name]
    _, shape, *narrow = name.split()
    height, width = map(int, shape.split("x"))

    def make(layer: SparseLinear) -> nn.Module:
        made = BlockSparseLinear(
            layer.in_features, layer.out_features, sparsity=layer.sparsity, block_shape=(height, width)
        )
        return _InBfloat16(made) if narrow else made

    def reference(module: nn.Module) -> SparseLayer:
        ((_, layer),) = find_sparse(module)
        return layer

    return Contender(make, _BFLOAT16 if narrow else 1e-5, reference)


def run_case(
    case: Case, operations: Iterable[str], contenders: Iterable[str], rounds: int, threads: Sequence[int]
) -> list[Result]:
    """Time every contender on every number of threads, all in turns, one operation after the other.

    Parameters
    ----------
    case : Case
    operations, contenders : iterable of str
        Names in `OPERATIONS` and `CONTENDERS`, or those of `blocks`.
    rounds : int
        Timed calls of each contender.
    threads : sequence of int
        Torch's thread count, which is also the kernels'. It is left at the one timed last.

    Returns
    -------
    list of Result
        For each operation, one for each number of threads. A contender whose results are wrong is refused,
        one that raises `RuntimeError` is skipped; the reason stands in place of its time.
    """
    torch.manual_seed(0)
    layer = SparseLinear(case.in_features, case.out_features, sparsity=case.sparsity)
    if FAN_IN in contenders and layer.nnz >= layer.out_features:
        constant_fan_in_(layer)
    x = torch.randn(case.tokens, case.in_features)
    dy = torch.randn(case.tokens, case.out_features)
    gate = Gate(layer, x, dy)
    results = []
    for name in operations:
        products = OPERATIONS[name].products
        variants = dict.fromkeys(layer.variant(case.tokens, each).name for each in products)
        calls: dict[tuple[str, int], Call] = {}
        reasons: dict[str, str] = {}
        for which in contenders:
            try:
                made = find_contender(which)
                module = made.make(layer)
                judge = gate if made.reference is None else Gate(made.reference(module), x, dy)
                judge.check(module, made.tolerance, gradients=len(products) > 1)
                call = OPERATIONS[name].prepare(module, x, dy)
                call()
            except WrongResultError as error:
                reasons[which] = f"refused: {error}"
            except RuntimeError as error:  # torch CSR lacks some products on some builds
                reasons[which] = f"cannot run: {str(error).splitlines()[0]}"
            else:
                calls.update({(which, count): _on_threads(count, call) for count in threads})
        timings = interleave(calls, rounds, f"{case}, {name}")
        for count in threads:
            of_count = {which: reasons.get(which) or timings[which, count] for which in contenders}
            results.append(Result(case, name, count, of_count, " + ".join(variants)))
    return results


def _on_threads(count: int, call: Call) -> Call:
    def on_threads() -> None:
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)
        call()

    return on_threads
