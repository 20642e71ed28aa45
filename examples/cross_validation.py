"""Cross-validation with early stopping: dense, masked and sparse networks on the same folds.

    python examples/cross_validation.py             # five folds
    python examples/cross_validation.py --quick     # two small ones, some seconds
    python examples/cross_validation.py --set sparsity=0.95 --set folds=10

One algorithm serves all folds: `algorithm.reset()` begins anew with the model of the next. Where the loss on
validation has not fallen for some epochs, the best state comes back and the learning rate is halved;
``model.load_state_dict`` brings its connections along, and the optimizer's moments follow by position. After
some such returns the fold is over, and its best state is tested.

The task: points of which few coordinates matter, labelled by a small random network.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from options import changed
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import sparselab


@dataclass(frozen=True)
class Config:
    """What a study is made of."""

    points: int = 4_000
    features: int = 64
    informative: int = 12
    classes: int = 4
    noise: float = 0.05  # share of labels that are drawn anew
    width: int = 256
    sparsity: float = 0.9
    folds: int = 5
    epochs: int = 40  # at most
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 1e-2
    patience: int = 4  # epochs without a lower loss before the best state comes back
    returns: int = 2  # of the best state, each with half the learning rate
    update_freq: int = 20  # optimizer steps between two changes of the connections
    drop_fraction: float = 0.3
    seed: int = 0


QUICK = Config(points=600, width=64, folds=2, epochs=6, patience=1, update_freq=5)

#: What the two hidden layers are.
LAYERS = {"dense": None, "masked, RigL": "masked", "sparse, RigL": "sparse"}


class Fold(NamedTuple):
    """How one fold went."""

    accuracy: float
    epochs: int
    seconds: float


def make_data(cfg: Config) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(cfg.seed)
    x = torch.randn(cfg.points, cfg.features, generator=generator)
    hidden = torch.randn(cfg.informative, 24, generator=generator)
    scores = (x[:, : cfg.informative] @ hidden).tanh() @ torch.randn(24, cfg.classes, generator=generator)
    labels = scores.argmax(1)
    again = torch.rand(cfg.points, generator=generator) < cfg.noise
    labels[again] = torch.randint(cfg.classes, (int(again.sum()),), generator=generator)
    return x, labels


def split(cfg: Config) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each fold: points to train with, to stop by, and to test."""
    order = np.random.default_rng(cfg.seed).permutation(cfg.points)
    parts = [torch.from_numpy(part) for part in np.array_split(order, cfg.folds)]
    found = []
    for fold, test in enumerate(parts):
        rest = torch.cat([part for at, part in enumerate(parts) if at != fold])
        stop = len(rest) // 5
        found.append((rest[stop:], rest[:stop], test))
    return found


def make_model(layer: str | None, cfg: Config, fold: int) -> nn.Sequential:
    torch.manual_seed(1000 * cfg.seed + fold)
    model = nn.Sequential(
        nn.Linear(cfg.features, cfg.width), nn.ReLU(), nn.Linear(cfg.width, cfg.width), nn.ReLU(),
        nn.Linear(cfg.width, cfg.classes),
    )  # fmt: skip
    if layer is not None:
        sparselab.sparsify(model, {key: {"layer": layer, "sparsity": cfg.sparsity} for key in ("0", "2")})
    return model


@torch.no_grad()
def judge(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Loss and accuracy, %."""
    scores = model(x)
    return float(cross_entropy(scores, y)), 100 * float((scores.argmax(1) == y).float().mean())


def train(
    model: nn.Module,
    algorithm: sparselab.RigL | None,
    data: tuple[Tensor, Tensor],
    parts: Sequence[Tensor],
    cfg: Config,
) -> Fold:
    """One fold: the accuracy of the best state on points that nobody has looked at."""
    start, (x, y), (train_at, stop_at, test_at) = time.perf_counter(), data, parts
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    if algorithm is not None:
        algorithm.reset()
        algorithm.attach(model, optimizer)
    generator = torch.Generator().manual_seed(cfg.seed)
    lowest, best, waited, returned = float("inf"), copy.deepcopy(model.state_dict()), 0, 0
    done = 0
    while done < cfg.epochs:
        done += 1
        for batch in train_at[torch.randperm(len(train_at), generator=generator)].split(cfg.batch):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        loss, _ = judge(model, x[stop_at], y[stop_at])
        if loss < lowest:
            lowest, best, waited = loss, copy.deepcopy(model.state_dict()), 0
            continue
        waited += 1
        if waited == cfg.patience:
            if returned == cfg.returns:
                break
            model.load_state_dict(best)
            optimizer.param_groups[0]["lr"] /= 2
            waited, returned = 0, returned + 1
    model.load_state_dict(best)
    _, accuracy = judge(model, x[test_at], y[test_at])
    return Fold(accuracy, done, time.perf_counter() - start)


def study(name: str, cfg: Config, data: tuple[Tensor, Tensor]) -> tuple[int, list[Fold]]:
    """Live weights, and all folds."""
    layer, folds, weights = LAYERS[name], [], 0
    algorithm = None
    if layer is not None:
        algorithm = sparselab.RigL(
            cfg.sparsity, drop_fraction=cfg.drop_fraction, update_freq=cfg.update_freq, seed=cfg.seed
        )
    for fold, parts in enumerate(tqdm(split(cfg), desc=name, leave=False)):
        model = make_model(layer, cfg, fold)
        folds.append(train(model, algorithm, data, parts, cfg))
        weights = sum(
            each.n_weights if hasattr(each, "n_weights") else each.weight.numel() for each in model[::2]
        )
    return weights, folds


def main(options: Sequence[str] | None = None) -> dict[str, list[Fold]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few points and two folds")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting")
    args = parser.parse_args(options)
    cfg = changed(QUICK if args.quick else Config(), args.set)
    torch.set_num_threads(1)  # layers of this size gain nothing from more
    data, results = make_data(cfg), {}
    table = Table(title=f"{cfg.folds} folds of {cfg.points} points, {cfg.features} features")
    for title in ("network", "live weights", "accuracy, %", "epochs", "seconds"):
        table.add_column(title, justify="left" if title == "network" else "right")
    for name in LAYERS:
        weights, folds = study(name, cfg, data)
        results[name] = folds
        accuracy, epochs, seconds = (np.array(each) for each in zip(*folds, strict=True))
        spread = f"{accuracy.mean():.2f} ± {accuracy.std():.2f}"
        table.add_row(name, f"{weights:,}", spread, f"{epochs.mean():.1f}", f"{seconds.sum():.1f}")
    table.caption = "mean ± standard deviation over folds"
    Console().print(table)
    return results


if __name__ == "__main__":
    main()
