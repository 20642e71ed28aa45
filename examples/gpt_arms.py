"""What is trained: settings of a run, and the model, the optimizer and the algorithm that they ask for."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gpt_model import GPT, PRESETS, Shape, initial_std
from options import at_least_one
from torch import nn

import sparselab

LAYERS = {"single": "sparse", "fan-in": "fan_in", "block": "block"}


# Algorithms


def timing(cfg: Config) -> dict[str, Any]:
    """When algorithms rewire."""
    return {"update_freq": cfg.period, "stop": cfg.last, "seed": cfg.seed}


def rewiring(cfg: Config) -> dict[str, Any]:
    """When and how much they rewire."""
    return {"drop_fraction": cfg.drop_fraction, **timing(cfg)}


def by_row(cfg: Config) -> dict[str, Any]:
    """The same, with as many connections for every output as it has."""
    return {**rewiring(cfg), **({"scope": "row"} if cfg.layer == "fan-in" else {})}


def rising(cfg: Config, start: float, end: float) -> dict[str, Any]:
    """A sparsity that rises over the first two thirds of the updates, and when that is."""
    whole = cfg.last * 2 // 3 // cfg.period * cfg.period
    schedule = sparselab.PolynomialSchedule(start, end, max(1, whole))
    return {"sparsity": schedule, "scope": "layer", **timing(cfg)}


def falling(cfg: Config, sparsity: float) -> sparselab.LinearSchedule:
    """What MEST drops beyond its connections: a fifth of them at first."""
    return sparselab.LinearSchedule(0.2 * (1 - sparsity), 0.0, stop=cfg.last)


@dataclass(frozen=True)
class Algorithm:
    """``build(cfg, sparsity)``, and the sparsity to begin with where layers get to theirs on the way."""

    build: Callable[[Config, float], sparselab.dst.SparsityAlgorithm]
    start: Callable[[float], float] = lambda sparsity: sparsity


def _half(sparsity: float) -> float:
    return min(0.5, sparsity)


ALGORITHMS = {
    "static": Algorithm(lambda cfg, end: sparselab.Static()),
    "set": Algorithm(lambda cfg, end: sparselab.SET(**by_row(cfg))),
    "rigl": Algorithm(lambda cfg, end: sparselab.RigL(**by_row(cfg))),
    "srigl": Algorithm(lambda cfg, end: sparselab.SRigL(**rewiring(cfg))),
    "snfs": Algorithm(lambda cfg, end: sparselab.SNFS(momentum_bytes=0, **rewiring(cfg))),
    "dsr": Algorithm(lambda cfg, end: sparselab.DSR(**timing(cfg))),
    "deepr": Algorithm(lambda cfg, end: sparselab.DeepR(l1=1e-4, **timing(cfg))),
    "gse": Algorithm(lambda cfg, end: sparselab.GSE(**rewiring(cfg))),
    "chts": Algorithm(lambda cfg, end: sparselab.CHTs(**rewiring(cfg))),
    "mest": Algorithm(
        lambda cfg, end: sparselab.MEST(delta=falling(cfg, end), soft_bound=False, **timing(cfg))
    ),
    "gmp": Algorithm(lambda cfg, end: sparselab.GMP(**rising(cfg, 0.0, end)), start=lambda end: 0.0),
    "granet": Algorithm(lambda cfg, end: sparselab.GraNet(**rising(cfg, _half(end), end)), start=_half),
}


# Settings


def option(default: Any, text: str, **more: Any) -> Any:
    """A setting that the command line can change, with what its help says."""
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run does."""

    # model
    preset: str = option("10M", "size of the model", choices=PRESETS)
    layers: int = option(0, "blocks, if not those of the preset", type=int)
    width: int = option(0, "if not that of the preset", type=int)
    heads: int = option(0, "if not those of the preset", type=int)
    context: int = option(256, "tokens that the model sees", type=at_least_one)
    # what is sparse; embeddings, norms and the output head stay dense
    arm: str = option(
        "sparse", "masked simulates sparse at the cost of dense", choices=["dense", "masked", "sparse"]
    )
    layer: str = option("single", "what a connection is, or how many an output has", choices=LAYERS)
    block: str = option("4x4", "outputs and inputs of a block", metavar="OUTxIN")
    attention_sparsity: float = option(0.7, "of the projections of attention; 0 leaves them dense")
    mlp_sparsity: float = option(0.9, "of the feed-forward blocks; 0 leaves them dense")
    algorithm: str = option("rigl", "what rewires", choices=ALGORITHMS)
    drop_fraction: float = option(0.3, "of the connections, replaced by an update; falls to 0")
    update_every: int = option(100, "steps from one update to the next", type=at_least_one)
    last_update: float = option(0.75, "as a share of the steps; then a settled topology is trained")
    # training
    steps: int = option(1000, "optimizer steps", type=at_least_one)
    seconds: float = option(0.0, "instead of --steps: so many as fit, judged by the first ones")
    batch: int = option(4, "windows of one pass", type=at_least_one)
    accumulate: int = option(1, "passes of one step", type=at_least_one)
    lr: float = option(0.0, "peak rate (default: 0.8 / width, twice that where layers are sparse)")
    final_lr: float = option(0.1, "as a share of the peak rate")
    warmup: float = option(0.05, "as a share of the steps")
    beta1: float = option(0.9, "of AdamW")
    beta2: float = option(0.95, "of AdamW")
    weight_decay: float = option(0.1, "of weights; biases and norms have none")
    clip: float = option(1.0, "largest norm of the gradient")
    checkpoint_activations: bool = option(False, "keep one block's activations, and compute them again")
    bfloat16: bool = option(False, "autocast; weights stay in float32")
    # several processes
    gradients: str = option(
        "whole",
        "how processes send them: as they are, in bfloat16, or the largest, holding the rest back",
        choices=["whole", "bfloat16", "top-k"],
    )
    top_k: float = option(0.01, "share of the entries of a gradient that is sent with --gradients top-k")
    # measuring and saving
    evaluate_every: int = option(50, "steps", type=at_least_one)
    save_every: int = option(100, "steps from one checkpoint to the next", type=at_least_one)
    validation_windows: int = option(64, "of the last tenth of the text", type=at_least_one)
    sample: int = option(200, "tokens to write at the end", type=int)
    characters: bool = option(False, "a character is a token; else a byte is")
    seed: int = option(1, "of weights, batches and topologies", type=int)

    @property
    def shape(self) -> Shape:
        """Layers, width and heads."""
        given = {"n_layer": self.layers, "d_model": self.width, "n_head": self.heads}
        return PRESETS[self.preset]._replace(**{name: size for name, size in given.items() if size})

    @property
    def sparsities(self) -> dict[str, float]:
        """Of the layers that are sparse in the end, by the pattern of their names."""
        if self.arm == "dense":
            return {}
        found = {"*.attn.*": self.attention_sparsity, "*.mlp.*": self.mlp_sparsity}
        return {pattern: sparsity for pattern, sparsity in found.items() if sparsity}

    @property
    def peak_lr(self) -> float:
        """The rate that is given, or one that falls with the width."""
        return self.lr or (1.6 if self.sparsities else 0.8) / self.shape.d_model

    @property
    def last(self) -> int:
        """The step from which on nothing is rewired."""
        return max(2, round(self.last_update * self.steps))

    @property
    def period(self) -> int:
        """Steps from one update to the next, so few that there is one."""
        return min(self.update_every, self.last - 1)

    def lr_factor(self, step: int) -> float:
        """Share of the peak rate at `step` (from 0): a linear rise, then half a cosine."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, self.steps - warmup))
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


# The three of a run


def make_model(cfg: Config, vocabulary: int) -> GPT:
    """The model of an arm; of a sparse one, no dense weight exists at any time."""
    torch.manual_seed(cfg.seed)
    shape = cfg.shape
    with torch.device("cpu" if cfg.arm == "masked" else "meta"):  # a mask must hold data
        model = GPT(vocabulary, cfg.context, shape.n_layer, shape.d_model, shape.d_ff, shape.n_head)
    if cfg.sparsities:
        start = ALGORITHMS[cfg.algorithm].start
        kind = "masked" if cfg.arm == "masked" else LAYERS[cfg.layer]
        blocks = {"block_shape": block_shape(cfg.block)} if kind == "block" else {}
        rules = {name: {"sparsity": start(end), **blocks} for name, end in cfg.sparsities.items()}
        sparselab.sparsify(model, rules, layer=kind)
    sparselab.materialize(model)
    initialise(model, shape.n_layer)
    model.recompute = cfg.checkpoint_activations
    return model


@torch.no_grad()
def initialise(model: GPT, n_layer: int) -> None:
    """Weights as those of GPT-2; outputs of sparse layers have the variance of dense ones."""
    sparse = dict(sparselab.nn.find_sparse(model))
    inside = {id(parameter) for layer in sparse.values() for parameter in layer.parameters()}
    for name, layer in sparse.items():
        std = initial_std(f"{name}.", n_layer) / math.sqrt(max(layer.density, 1e-9))
        weights = torch.empty_like(layer.per_connection(layer.stored)).normal_(std=std)
        layer.put(layer.stored, torch.arange(layer.nnz), weights)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 2 and id(parameter) not in inside:
            parameter.normal_(std=initial_std(name, n_layer))


def block_shape(text: str) -> tuple[int, int]:
    """Rows and columns of a block."""
    try:
        rows, columns = map(int, text.split("x"))
    except ValueError:
        raise SystemExit(f"--block {text}: expected outputs and inputs of a block, such as 4x4") from None
    return rows, columns


def make_optimizer(cfg: Config, model: nn.Module) -> torch.optim.AdamW:
    """AdamW in one pass over memory; weights decay, sparse ones too, biases and norms do not."""
    decayed, free = [], []
    for parameter in model.parameters():
        (decayed if parameter.ndim >= 2 else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.peak_lr, betas=(cfg.beta1, cfg.beta2), fused=True)


def attach_algorithm(
    cfg: Config, model: nn.Module, optimizer: torch.optim.Optimizer
) -> sparselab.Group | None:
    """Rewire the model at the optimizer's steps; None where nothing is sparse."""
    if not cfg.sparsities:
        return None
    build = ALGORITHMS[cfg.algorithm].build
    group = sparselab.Group({pattern: build(cfg, end) for pattern, end in cfg.sparsities.items()})
    group.attach(model, optimizer)
    group.expect_passes(cfg.accumulate)  # so that nothing is held for passes to come
    return group


# The command line


def add_options(parser: argparse.ArgumentParser) -> None:
    """An option for each setting."""
    for field in dataclasses.fields(Config):
        more = dict(field.metadata)
        text, name = more.pop("help"), f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(name, action="store_true", help=text)
        else:
            kind = {} if "choices" in more else {"type": type(field.default)}
            text += "" if "default" in text else " (default: %(default)s)"
            parser.add_argument(name, default=field.default, help=text, **{**kind, **more})


def read_config(values: Mapping[str, Any]) -> Config:
    """The settings among some values."""
    return Config(**{field.name: values[field.name] for field in dataclasses.fields(Config)})
