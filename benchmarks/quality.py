"""How well a network learns whose sparse layers have some layout: MNIST by a perceptron, a text by a GPT.

Sparse networks differ in nothing but the layout: equal are the dense network that is made sparse, the output
layer, batches, steps, seeds, rates, and when and how much RigL rewires. The settings are those of
``examples/mnist.py`` and ``examples/shakespeare.py``, whose dense GPT has a rate of its own.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import nn

import sparselab

# The examples are scripts, which import each other by these names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import mnist  # type: ignore[import-not-found]
import shakespeare  # type: ignore[import-not-found]
from downloads import DownloadError  # type: ignore[import-not-found]
from mnist_data import CLASSES, SIDE, DataError, load_digits  # type: ignore[import-not-found]
from text import TextError, tiny_shakespeare  # type: ignore[import-not-found]


class MissingDataError(Exception):
    """What there is to learn is not on this computer and cannot be downloaded; the message says why."""


class Layout(NamedTuple):
    """How connections lie.

    `rule` is what `sparselab.sparsify` is told of the layers beside their sparsity, None of a dense network;
    `scope` is that of RigL.
    """

    rule: Mapping[str, Any] | None
    scope: Literal["layer", "row"] = "layer"


Result = TypeVar("Result")

#: Trains a network of a layout from a seed, under a name for the progress bar, and says how well it did.
Learn = Callable[[Layout, int, str], float]

#: The hidden layers have the layout; the output layer is dense.
HIDDEN = (512, 512)
DIGITS = mnist.Config()
#: All layers of the blocks have the layout; embeddings, norms and head are dense.
TEXT = shakespeare.Config(n_layer=2, context=64, update_every=25)


def digits(sparsity: float, epochs: int) -> Learn:
    """Learn MNIST; how well is the share of the test images that are told right.

    Raises
    ------
    MissingDataError
        If there are no images.
    """
    train = trained_digits(sparsity, epochs)
    return lambda layout, seed, name: accuracy(*train(layout, seed, name))


def trained_digits(sparsity: float, epochs: int) -> Callable[[Layout, int, str], tuple[nn.Sequential, Any]]:
    """Learn MNIST as `digits` does, and return the network and the images.

    Raises
    ------
    MissingDataError
        If there are no images.
    """
    settings = dataclasses.replace(DIGITS, epochs=epochs)
    try:
        images = load_digits(mean=settings.mean, std=settings.std)
    except DataError as error:
        raise MissingDataError(str(error)) from None

    def train(layout: Layout, seed: int, name: str) -> tuple[nn.Sequential, Any]:
        cfg = dataclasses.replace(settings, seed=seed)
        model, algorithm = perceptron(layout, sparsity), None
        if layout.rule is not None:
            steps = mnist.total_steps(cfg, images)
            algorithm = sparselab.RigL(scope=layout.scope, **mnist.rewiring(cfg, steps))
            model.apply(algorithm)
        mnist.train(cfg, images, model, algorithm, name)
        if algorithm is not None:
            algorithm.detach()
        return model, images

    return seeded(train)


@torch.no_grad()
def accuracy(model: nn.Module, images: Any, batch: int | None = None) -> float:
    """Share of the test images that are told right, all together or in batches of so many."""
    x, y = images.test_x, images.test_y
    if batch is None:
        return float(mnist.accuracy(model, x, y))
    answers = torch.cat([model(part).argmax(1) for part in x.split(batch)])
    return (answers == y).double().mean().item()


def perceptron(layout: Layout, sparsity: float) -> nn.Sequential:
    """The network for MNIST; equal states of torch's generator give equal output layers."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise((SIDE * SIDE, *HIDDEN, CLASSES)):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    if layout.rule is None:
        return model
    output = str(len(model) - 1)
    return sparselab.sparsify(model, {output: None, "*": {"sparsity": sparsity, **layout.rule}})


def text(sparsity: float, steps: int) -> Learn:
    """Learn Tiny Shakespeare; how well is the loss on its last tenth, in nats per character.

    Raises
    ------
    MissingDataError
        If there is no text.
    """
    settings = dataclasses.replace(
        TEXT, attention_sparsity=sparsity, mlp_sparsity=sparsity, steps=steps, evaluations=1
    )
    try:
        characters = tiny_shakespeare(shakespeare.min_chars(settings)).characters
    except (DownloadError, TextError) as error:
        raise MissingDataError(f"Tiny Shakespeare: {error}") from None
    data = shakespeare.make_data(settings, characters)

    def learn(layout: Layout, seed: int, name: str) -> float:
        cfg, arm = dataclasses.replace(settings, seed=seed), "dense" if layout.rule is None else "sparse"
        model, algorithm = shakespeare.make_model(cfg, len(data.vocabulary), "dense")
        if layout.rule is not None:
            model, algorithm = shakespeare.make_sparse(cfg, model, layout.rule, layout.scope)
        optimizer = shakespeare.make_optimizer(cfg, model, arm)
        curves = shakespeare.train(cfg, data, model, optimizer, algorithm, name)
        return float(curves["val_loss"][-1])

    return seeded(learn)


def seeded(learn: Callable[[Layout, int, str], Result]) -> Callable[[Layout, int, str], Result]:
    """The same, all draws from torch's generator made from the seed, which is then left as it was."""

    def run(layout: Layout, seed: int, name: str) -> Result:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return learn(layout, seed, name)

    return run
