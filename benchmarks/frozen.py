"""Layers frozen in float32, bfloat16 and int8: time of few tokens, accuracy on MNIST, and bytes.

A layer that is called again and again has its weights in the second-level cache. In a model each call finds
those of the layers before it there, so layers are also timed in turns, as many as no such cache holds.
"""

from __future__ import annotations

import copy
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import nn

import sparselab
from benchmarks import quality
from benchmarks.layouts import LAYOUTS
from benchmarks.quality import Layout, MissingDataError
from sparselab.bench.contenders.linear import FAN_IN, blocks
from sparselab.bench.output import tables
from sparselab.nn import find_sparse

PARTS = "speed", "mnist"
#: What weights are frozen in, by the title of their column; None leaves them as they are.
WEIGHTS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16, "int8": torch.int8}
#: in_features and out_features of the layers that are timed.
SHAPES = (3072, 768), (768, 3072)
TOKENS = 1, 8
#: Layers that take turns: 60 MB in float32.
COLD_LAYERS = 40
#: Seconds to spend on each case.
SECONDS = 2.0

#: Layouts that are looked at, by their names.
NAMES = "single", FAN_IN, blocks((4, 4)), blocks((16, 16))


def make(layout: Layout, shape: tuple[int, int], sparsity: float) -> Any:
    """A layer of a layout."""
    model = nn.Sequential(nn.Linear(*shape))
    return sparselab.sparsify(model, {"0": {"sparsity": sparsity, **(layout.rule or {})}})[0]


@torch.no_grad()
def fastest(layers: Mapping[str, Sequence[nn.Module]], x: torch.Tensor, seconds: float) -> dict[str, float]:
    """Microseconds of one call, the least of many rounds in which all go through their layers in turns."""
    best = dict.fromkeys(layers, float("inf"))
    for own in layers.values():
        for layer in own:
            layer(x)  # compiles
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, own in layers.items():
            own[-1](x)
            start = time.perf_counter()
            for layer in own:
                layer(x)
            best[name] = min(best[name], 1e6 * (time.perf_counter() - start) / len(own))
    return best


def time_layers(name: str, sparsity: float) -> list[dict[str, Any]]:
    """A row for each shape and count of tokens of a layout: microseconds of each way to hold weights."""
    rows = []
    for shape in SHAPES:
        plain = [make(LAYOUTS[name], shape, sparsity) for _ in range(COLD_LAYERS)]
        held = {
            title: [copy.deepcopy(layer).freeze(weights=dtype) for layer in plain]
            for title, dtype in WEIGHTS.items()
        }
        del plain
        for layer in (layer for own in held.values() for layer in own):
            layer.forget_origin()
        for tokens in TOKENS:
            x = torch.randn(tokens, shape[0])
            hot = fastest({title: own[:1] for title, own in held.items()}, x, SECONDS)
            cold = fastest(held, x, SECONDS)
            rows.append(
                {"layout": name, "layer": f"{shape[0]} -> {shape[1]}", "tokens": tokens}
                | {"again": hot, "in_turns": cold}
            )
    return rows


def frozen_networks(
    name: str, train: Callable[[Layout, int, str], tuple[nn.Module, Any]], seed: int
) -> list[dict[str, Any]]:
    """A network of a layout that has learnt MNIST, frozen each way: accuracy and bytes."""
    model, images = train(LAYOUTS[name], seed, f"mnist, {name}")
    rows = []
    for title, dtype in WEIGHTS.items():
        frozen = sparselab.freeze(copy.deepcopy(model.eval()), dtype)
        sparse = [layer for _, layer in find_sparse(frozen)]
        held = sum(sparselab.memory_report(layer).weight_bytes for layer in sparse)
        rows.append({
            "layout": name, "weights": title,
            "accuracy": quality.accuracy(frozen, images),
            # The kernels for few tokens.
            "accuracy_by_8": quality.accuracy(frozen, images, batch=8),
            "bytes": sparselab.memory_report(frozen).weight_bytes,
            "bytes_per_weight": held / sum(layer.n_weights for layer in sparse),
        })  # fmt: skip
    return rows


def print_speed(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    lines = [
        [row["layout"], row["layer"], str(row["tokens"])]
        + [f"{row[where][title]:.0f}" for where in ("again", "in_turns") for title in WEIGHTS]
        for row in rows
    ]
    titles = [f"{title}{where}" for where in ("", f", {COLD_LAYERS} in turns") for title in WEIGHTS]
    console.print(tables.plain("microseconds, the least", ["layout", "layer", "tokens", *titles], lines))


def print_quality(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    lines = [
        [
            row["layout"], row["weights"],
            *(f"{100 * row[key]:.2f}" for key in ("accuracy", "accuracy_by_8")),
            f"{row['bytes']:,}", f"{row['bytes_per_weight']:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    titles = [
        "layout",
        "weights",
        "MNIST, %",
        "by 8 images, %",
        "bytes of the network",
        "bytes per live weight",
    ]
    console.print(tables.plain("accuracy and bytes", titles, lines))


def report(options: Namespace, console: Console) -> list[dict[str, Any]]:
    """The subcommand: run, print tables; returns the rows for ``--json``."""
    rows: list[dict[str, Any]] = []
    if "speed" in options.parts:
        timed = [row for name in options.layouts for row in time_layers(name, options.sparsity)]
        print_speed(timed, console)
        rows += timed
    if "mnist" in options.parts:
        try:
            train = quality.trained_digits(options.sparsity, options.epochs)
        except MissingDataError as error:
            console.print(f"MNIST: no data: {error}", markup=False)
        else:
            learnt = [row for name in options.layouts for row in frozen_networks(name, train, options.seed)]
            print_quality(learnt, console)
            rows += learnt
    return rows
