"""A ResNet-18 for small images: dense, sparse and simulated twins compared, trained with RigL, and timed.

    python examples/resnet.py                       # 90% sparse, batches of 64 images of 32 x 32
    python examples/resnet.py --sparsity 0.95 --batch 32 --steps 50

The stem and the classifier stay dense, as in the papers on sparse training; every other convolution is
sparse, with the budget shared out uniformly or by Erdos-Renyi-Kernel, which gives the early convolutions, on
large images, a much larger part of it. Images are noise around one mean for each class.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from options import at_least_one
from torch import Tensor, nn

import sparselab
from sparselab.bench.measure.timing import interleave
from sparselab.dst import allocate

SIZE = 32
CLASSES = 10


class Block(nn.Module):
    """Two 3 x 3 convolutions and the way around them."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.around = nn.Sequential()
        if stride > 1 or channels != out:
            self.around = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.around(x))


class ResNet18(nn.Module):
    """He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, with a stem for small images."""

    def __init__(self, width: int = 64, classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(Block(before, out, 1 if out == before else 2), Block(out, out, 1))
                for before, out in pairwise(widths)
            )
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor


def draw(size: int, seed: int) -> Batch:
    """Images whose mean says their class."""
    means = torch.randn(CLASSES, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    return Batch(means[labels] + torch.randn(size, 3, SIZE, SIZE, generator=generator), labels)


def make_sparse(dense: nn.Module, sparsity: float, method: str, layer: str = "sparse") -> nn.Module:
    """A sparse copy, or its simulated twin, with new weights."""
    rules = allocate(dense, sparsity, method, include="stages.*")
    torch.manual_seed(1)
    return sparselab.sparsify(copy.deepcopy(dense), rules, layer=layer)


def backward(model: nn.Module, batch: Batch) -> Tensor:
    """One forward and backward pass; the loss."""
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(batch.images), batch.labels)
    loss.backward()
    return loss.detach()


def difference(sparse: nn.Module, masked: nn.Module, batch: Batch) -> tuple[float, float]:
    """Largest differences of outputs and of gradients, each as a share of the largest entry.

    Rounding can move sums across the corner of a ReLU, which switches whole terms of a gradient: in
    float32 the gradients differ by more than each product is off.
    """
    models = [sparse, masked]
    outputs = [model(batch.images).detach() for model in models]
    for model in models:
        backward(model, batch)
    worst = 0.0
    for (name, ours), (other, theirs) in zip(sparse.named_modules(), masked.named_modules(), strict=True):
        assert name == other
        pairs = [
            (a.grad, b.grad)
            for a, b in zip(ours.parameters(recurse=False), theirs.parameters(recurse=False), strict=True)
        ]
        for a, b in pairs:
            b = theirs.per_connection(b).view(a.shape) if a.shape != b.shape else b
            worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    return float((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()), worst


def train(model: nn.Module, steps: int, batch: int) -> list[float]:
    """Train with SGD and RigL; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    algorithm = sparselab.RigL(
        drop_fraction=0.3, update_freq=max(1, min(5, steps // 4)), stop=max(steps * 3 // 4, 1)
    )
    algorithm.attach(model, optimizer)
    losses = []
    for step in range(steps):
        losses.append(float(backward(model, draw(batch, 100 + step))))
        optimizer.step()
    return losses


def report_equality(dense: nn.Module, args: argparse.Namespace) -> None:
    batch = draw(min(args.batch, 8), 1)
    for dtype in (torch.float64, torch.float32):
        twins = [
            make_sparse(copy.deepcopy(dense).to(dtype), args.sparsity, args.method, layer)
            for layer in ("sparse", "masked")
        ]
        outputs, gradients = difference(*twins, Batch(batch.images.to(dtype), batch.labels))
        name = str(dtype).removeprefix("torch.")
        print(f"sparse and simulated, {name}: outputs differ by {outputs:.1e}, gradients by {gradients:.1e}")


def report_size(dense: nn.Module, sparse: nn.Module) -> None:
    for name, model in (("dense", dense), ("sparse", sparse)):
        size = sparselab.memory_report(model)
        total = size.weight_bytes + size.gradient_bytes + size.plan_bytes
        print(
            f"{name}: {size.parameters_live:,} parameters, {size.weight_bytes / 2**20:.1f} MiB of weights "
            f"and topology, {total / 2**20:.1f} MiB with gradients and plans"
        )


def report_time(dense: nn.Module, sparse: nn.Module, args: argparse.Namespace) -> None:
    batch = draw(args.batch, 2)

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            model(batch.images)

    models = {"dense": dense, "sparse": sparse}
    runs: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        runs[f"{name} forward"] = lambda model=model: forward(model)
        runs[f"{name} forward + backward"] = lambda model=model: backward(model, batch)
    taken = interleave(runs, args.rounds, "speed")
    for what in ("forward", "forward + backward"):
        ours, theirs = taken[f"sparse {what}"].median, taken[f"dense {what}"].median
        print(f"{what}: dense {theirs:.0f} ms, sparse {ours:.0f} ms, {theirs / ours:.2f} times as fast")


def main(options: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsity", type=float, default=0.9, help="of the convolutions together")
    parser.add_argument("--method", choices=["uniform", "erk"], default="uniform", help="who gets how much")
    parser.add_argument("--batch", type=at_least_one, default=64, help="images of a batch")
    parser.add_argument("--steps", type=at_least_one, default=20, help="of training the sparse model")
    parser.add_argument("--rounds", type=at_least_one, default=5, help="timed passes; the median counts")
    parser.add_argument("--width", type=at_least_one, default=64, help="channels of the first stage")
    parser.add_argument("--threads", type=at_least_one, help="CPU threads (default: as torch chooses)")
    args = parser.parse_args(options)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dense = ResNet18(args.width)
    report_equality(dense, args)
    sparse = make_sparse(dense, args.sparsity, args.method)
    for model in (dense, sparse):
        backward(model, draw(args.batch, 2))
    report_size(dense, sparse)
    report_time(dense, sparse, args)
    losses = train(sparse, args.steps, args.batch)
    print(f"{args.steps} steps with RigL: loss {losses[0]:.2f} -> {losses[-1]:.2f}")


if __name__ == "__main__":
    main()
