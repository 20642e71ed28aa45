"""The arms of a comparison: dense, masked (a dense weight and a mask: the simulation) and sparse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import sparselab


class Arm(NamedTuple):
    """What the layers are that are sparse in some arms, and what rewires them."""

    layer: str | None
    algorithm: Callable[..., sparselab.dst.DynamicSparsityAlgorithm] | None


ARMS = {
    "dense": Arm(None, None),
    "masked, RigL": Arm("masked", sparselab.RigL),
    "sparse, RigL": Arm("sparse", sparselab.RigL),
    "sparse, SET": Arm("sparse", sparselab.SET),
}


def attach(arm: Arm, model: nn.Module, optimizer: torch.optim.Optimizer, cfg: Any, stop: int) -> None:
    """Rewire a model at the optimizer's steps, up to `stop`, as its arm and the settings say."""
    if arm.algorithm is not None:
        algorithm = arm.algorithm(
            cfg.sparsity,
            drop_fraction=cfg.drop_fraction,
            update_freq=cfg.update_freq,
            stop=stop,
            seed=cfg.seed,
        )
        algorithm.attach(model, optimizer)


def live_weights(model: nn.Module) -> int:
    """Weights that are trained: all of a dense layer, the connections of the others; biases do not count."""
    held = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    return held - sum(layer.stored.numel() - layer.n_weights for _, layer in sparselab.nn.find_sparse(model))


class Result(NamedTuple):
    """How an arm did."""

    name: str
    weights: int
    scores: tuple[float, ...]
    seconds: float
    losses: list[float]  # of all optimizer steps
    model: nn.Module


def print_results(
    title: str, results: Sequence[Result], scores: Mapping[str, str], caption: str | None = None
) -> None:
    """A table with a row for each arm; `scores` are the titles of the scores, each with its format."""
    table = Table(title=title, caption=caption)
    for column in ("arm", "live weights", *scores, "seconds"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for each in results:
        numbers = (format(*pair) for pair in zip(each.scores, scores.values(), strict=True))
        table.add_row(each.name, f"{each.weights:,}", *numbers, f"{each.seconds:.1f}")
    Console().print(table)
