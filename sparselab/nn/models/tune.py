"""Choosing how sparse layers are computed by timing every way on this machine."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import nn

from sparselab._table import aligned
from sparselab.nn.layers.linear import LinearLayer
from sparselab.nn.ops.cpu.variants import FORWARD, Measured
from sparselab.nn.storage.checks import check_size

#: Seconds to spend on each product, and how many rounds that may mean.
_SECONDS = 0.03
_ROUNDS = 5, 51


@dataclass(frozen=True)
class TunedProduct:
    """What was measured of one kind of layer for one count of tokens.

    `layers` are the names of the layers that it stands for, `microseconds` the median of each variant that
    can compute them, `name` the fastest, and `rule` what would be taken without measurement.
    """

    layers: tuple[str, ...]
    shape: tuple[int, int]
    n_tokens: int
    microseconds: Mapping[str, float]
    name: str
    rule: str


@dataclass(frozen=True)
class TuneReport:
    """What `tune` measured; ``str()`` of it is a table, microseconds of each variant."""

    products: tuple[TunedProduct, ...]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "shape", "tokens", *FORWARD, "fastest", "by rule")]
        for each in self.products:
            name, more = each.layers[0] or "(the model)", len(each.layers) - 1
            times = (
                f"{each.microseconds[name]:,.1f}" if name in each.microseconds else "-" for name in FORWARD
            )
            rows.append((
                f"{name} and {more} more" if more else name, " x ".join(map(str, each.shape)),
                str(each.n_tokens), *times, each.name, each.rule,
            ))  # fmt: skip
        return aligned(rows)


@torch.no_grad()
def tune(model: nn.Module, n_tokens: Iterable[int] = (1, 4, 16, 64, 256, 1024)) -> TuneReport:
    """Time every way to compute the sparse layers of a model, here and now, and take the fastest from now on.

    Without it each layer goes by a rule on layout, sparsity and the number of tokens
    (``layer.variant(n_tokens)`` tells it). This is for the forward pass only: what inference repeats.

    Parameters
    ----------
    model : torch.nn.Module
        A `SparseLinear`, or a model that contains some. Layers of the same class, shape, dtype, number of
        connections and bias are measured once.
    n_tokens : iterable of int
        Rows of the batches to measure with, all leading dimensions together. What was measured for a count is
        used for those from half of it to twice it; others go by the rule.

    Returns
    -------
    TuneReport
        Medians of all variants, in microseconds; print it.

    Raises
    ------
    TypeError, ValueError
        If a count is not a positive integer, there are none, or the model has no such layer or one that is
        not in the CPU's memory. Nothing has been changed then.

    Notes
    -----
    Variants are timed in turns, with the threads that torch uses now; each kind of layer and count takes
    some 0.1 s, or a dozen products of each variant where that is longer. Tune last: the choice is made for
    this machine, these threads and this dtype. It is kept while the density of the layer stays the same, also
    when its connections move, and is neither saved nor copied.

    Variants differ in rounding. In the one named ``"dense blocks"`` an infinite input reaches every output of
    its token, as in a dense layer.

    Examples
    --------
    >>> import sparselab
    >>> layer = sparselab.SparseLinear(256, 128, sparsity=0.9)
    >>> report = tune(layer, n_tokens=[1, 64])
    >>> [each.n_tokens for each in report.products]
    [1, 64]
    >>> layer.variant(1).reason.startswith("measured: ")
    True
    >>> layer.variant(8).name
    'skinny'
    """
    counts = sorted({_check_count(n) for n in n_tokens})
    if not counts:
        raise ValueError("n_tokens must have at least one count, got none")
    alike: dict[tuple[Any, ...], dict[str, LinearLayer]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LinearLayer):
            alike.setdefault(_kind(name, layer), {})[name] = layer
    if not alike:
        raise ValueError(f"model must contain a SparseLinear to tune, got a {type(model).__name__} without")
    found: list[TunedProduct] = []
    for layers in alike.values():
        # A copy goes by the rule, and plans that only one variant needs go with it.
        first = copy.deepcopy(next(iter(layers.values())))
        rules = {n: first.variant(n).name for n in counts}
        times = {n: _measure(first, n) for n in counts}
        measured = Measured(first.density, times)
        for layer in layers.values():
            layer.use_measured(measured)
        for n in counts:
            name = min(times[n], key=times[n].__getitem__)
            found.append(TunedProduct(tuple(layers), first.shape, n, times[n], name, rules[n]))
    return TuneReport(tuple(found))


def _check_count(n: int) -> int:
    if check_size("n_tokens", n) == 0:
        raise ValueError("n_tokens must be positive, got 0")
    return int(n)


def _kind(name: str, layer: LinearLayer) -> tuple[Any, ...]:
    """Equal for layers that take the same time."""
    values = layer.weight_values
    if values.device.type != "cpu":
        raise ValueError(f"model must be in the CPU's memory, got {name!r} on the device {values.device}")
    return type(layer), layer.shape, values.dtype, layer.nnz, layer.bias is None


def _measure(layer: LinearLayer, n_tokens: int) -> dict[str, float]:
    """Median microseconds of each variant, timed in turns."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(n_tokens, layer.in_features, generator=random).to(layer.weight.dtype)
    runs = layer.ways(x)
    for run in runs.values():
        run()  # compiles, and makes the plan
    once = sum(_seconds(run) for run in runs.values())
    least, most = _ROUNDS
    rounds = min(max(int(_SECONDS / max(once, 1e-9)), least), most)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()  # what ran before leaves busy threads and its own data in the caches
            seconds[name].append(_seconds(run))
    return {name: 1e6 * statistics.median(each) for name, each in seconds.items()}


def _seconds(run: Callable[[], object]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start
