"""How much the size of a sparse layer's output varies from one random layer to the next.

    python examples/output_variance.py                 # half a minute: a table and a picture
    python examples/output_variance.py --n 128 --layers 200

A layer has n inputs, n outputs and ReLU; its weights are normal with variance 2 / k, where k is the fan-in of
its outputs, on average or of each. For an input on the unit sphere the squared norm of the output is 1 in the
mean. Its variance depends on how connections are drawn, and is least where every output has exactly k: so
Lasby, Golubeva, Evci, Nica, Ioannou ("Dynamic Sparse Training with Structured Sparsity", ICLR 2024, section 3
and appendix) explain that a constant fan-in trains well. It matters at high sparsity only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
from options import at_least_one
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from sparselab import FanInLinear, SparseLinear

mpl.use("Agg")
from matplotlib import pyplot as plt

#: Standard errors by which a measured variance may miss the theory.
ALLOWED = 5


class Kind(NamedTuple):
    """How connections are drawn, ``(n, k) -> layer``, and the variance that follows, ``(n, k) -> number``."""

    draw: Callable[[int, int], SparseLinear]
    variance: Callable[[int, int], float]


# With g normal, b a fair coin (the sign that ReLU lets through) and s the sum of u^2 over the inputs u of an
# output, that output squared is z^2 = (2 / k) b g^2 s. On the sphere E u^4 is 3 / (n (n + 2)), E u^2 v^2 a
# third of it. So the variance is n E z^4 + n (n - 1) E z^2 z'^2 - 1, where
# E z^4 = (6 / k^2) (3 k + n (n - 1) q) / (n (n + 2)) and E z^2 z'^2 = q' / k^2,
# and q and q' are the probabilities that two positions of one row, and of two rows, are both connections.


def bernoulli(n: int, k: int) -> float:
    """Every position is a connection with probability k / n."""
    return (5 * n - 8 + 18 * n / k) / (n * (n + 2))


def per_layer(n: int, k: int) -> float:
    """Exactly n k of all positions."""
    c = (n - 1 / k) / (n - 1 / n)
    return ((n * n + 7 * n - 8) * c + 18 * n / k - n * n - 2 * n) / (n * (n + 2))


def constant_fan_in(n: int, k: int) -> float:
    """Exactly k of the positions of every output."""
    return bernoulli(n, k) - 6 * (n - k) / (k * n * (n + 2))


#: From the smallest variance to the largest.
KINDS = {
    "constant fan-in": Kind(lambda n, k: FanInLinear(n, n, bias=False, fan_in=k), constant_fan_in),
    "constant per layer": Kind(lambda n, k: SparseLinear(n, n, bias=False, sparsity=1 - k / n), per_layer),
    "Bernoulli": Kind(
        lambda n, k: SparseLinear.from_pattern(torch.rand(n, n) < k / n, bias=False), bernoulli
    ),
}


class Measured(NamedTuple):
    """A variance measured over random layers, its standard error, and the theory's."""

    kind: str
    k: int
    variance: float
    error: float
    theory: float


@torch.inference_mode()
def squared_norms(layer: SparseLinear, k: int, tokens: int) -> Tensor:
    """Of the outputs for inputs on the unit sphere, with new weights: (tokens,)."""
    layer.weight_values.normal_(std=(2 / k) ** 0.5)
    x = torch.nn.functional.normalize(torch.randn(tokens, layer.in_features))
    return layer(x).relu().square().sum(1)


def measure(name: str, n: int, k: int, layers: int, tokens: int) -> Measured:
    """The variance over layers and inputs; its error from how layers differ."""
    kind = KINDS[name]
    norms = torch.stack([squared_norms(kind.draw(n, k), k, tokens) for _ in range(layers)]).double()
    # The mean is known to be 1, so that layers are independent estimates.
    each = (norms - 1).square().mean(1)
    error = float(each.std() / layers**0.5)
    return Measured(name, k, float(each.mean()), error, kind.variance(n, k))


def judge(results: Sequence[Measured]) -> list[str]:
    """What contradicts the theory: variances too far off, and kinds in another order at the least fan-in."""
    wrong = [
        f"{each.kind}, fan-in {each.k}: {each.variance:.4f}, not {each.theory:.4f}"
        for each in results
        if not abs(each.variance - each.theory) <= ALLOWED * each.error
    ]
    least = min(each.k for each in results)
    sparse = sorted(
        (each for each in results if each.k == least), key=lambda each: list(KINDS).index(each.kind)
    )
    for low, high in pairwise(sparse):
        if not low.variance < high.variance:
            wrong.append(f"fan-in {least}: {low.kind} varies no less than {high.kind}")
    return wrong


def make_table(results: Sequence[Measured], n: int) -> Table:
    table = Table(title=f"Variance of the squared norm of the output, {n} inputs and outputs")
    for title in ("fan-in", "sparsity", *KINDS):
        table.add_column(title, justify="right")
    for k in sorted({each.k for each in results}):
        cells = [
            f"{each.variance:.4f} ± {each.error:.4f} ({each.theory:.4f})"
            for name in KINDS
            for each in results
            if (each.kind, each.k) == (name, k)
        ]
        table.add_row(str(k), f"{1 - k / n:.1%}", *cells)
    table.caption = "measured ± standard error (theory)"
    return table


def draw(results: Sequence[Measured], n: int, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, kind in KINDS.items():
        mine = [each for each in results if each.kind == name]
        ks = [each.k for each in mine]
        (line,) = axes.plot(ks, [kind.variance(n, k) for k in ks], label=f"{name}, theory")
        axes.errorbar(
            ks, [each.variance for each in mine], [each.error for each in mine],
            fmt="o", capsize=3, color=line.get_color(), label=f"{name}, measured",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="fan-in", ylabel="variance of the squared norm")
    axes.set_title(f"{n} inputs and outputs, ReLU")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(options: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--n", type=at_least_one, default=64, help="inputs and outputs (default: 64)")
    add("--layers", type=at_least_one, default=1000, help="random layers of each kind (default: 1000)")
    add("--tokens", type=at_least_one, default=64, help="inputs for each (default: 64)")
    add("--out", type=Path, default=Path("results"), help="folder for the picture (default: results)")
    args = parser.parse_args(sys.argv[1:] if options is None else options)
    if args.n < 2 or args.layers < 2:
        parser.error("--n and --layers must be at least 2")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    fan_ins = [2**i for i in range(args.n.bit_length()) if 2**i <= args.n]
    cases = [(name, k) for k in fan_ins for name in KINDS]
    results = [measure(name, args.n, k, args.layers, args.tokens) for name, k in tqdm(cases, leave=False)]
    console = Console()
    console.print(make_table(results, args.n))
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "output_variance.png"
    draw(results, args.n, picture)
    console.print(f"Picture: {picture.resolve()}", soft_wrap=True, highlight=False, markup=False)
    if wrong := judge(results):
        raise SystemExit("against the theory:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
