"""Whole training steps of character-level transformers, dense and sparse, on the same random tokens.

Time does not depend on which tokens they are; losses would, and none are reported.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import sparselab
from examples.gpt_model import GPT
from sparselab.bench.measure.timing import Timing, interleave

VOCABULARY = 65
N_BATCHES = 8
#: All linear layers but the output head.
SPARSITY = {"*.attn.*": 0.7, "*.mlp.*": 0.9}
UPDATE_FREQ = 100


@dataclass(frozen=True)
class Size:
    """A transformer, and the batches it is trained on: `batch` texts of `context` tokens."""

    n_layer: int
    d_model: int
    d_ff: int
    n_head: int
    context: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens in one step."""
        return self.batch * self.context


#: Projections without biases, an output head of its own, dense embeddings, norms and head. The first two are
#: those whose times the other project named sparselab has published; 124M is GPT-2 small, vocabulary aside.
SIZES = {
    "10M": Size(n_layer=6, d_model=384, d_ff=1536, n_head=6, context=128, batch=16),
    "40M": Size(n_layer=8, d_model=640, d_ff=2560, n_head=10, context=128, batch=8),
    "124M": Size(n_layer=12, d_model=768, d_ff=3072, n_head=12, context=256, batch=4),
}


@dataclass(frozen=True)
class Arm:
    """One way to train a model of some size.

    `parameters` counts those that exist, `weight_bytes` what inference needs, `training_bytes` weights,
    gradients, plans and optimizer state. `step_ms` leaves out steps that update the topology;
    `update_ms` is what such a step and the one after it, which rebuilds the plans, take more than two others
    (0 in the dense arm).
    """

    parameters: int
    weight_bytes: int
    training_bytes: int
    step_ms: Timing
    update_ms: float

    @property
    def mean_ms(self) -> float:
        """Milliseconds per step, topology updates included."""
        return self.step_ms.median + self.update_ms / UPDATE_FREQ

    @property
    def update_share(self) -> float:
        """Fraction of the time that topology updates take."""
        return self.update_ms / UPDATE_FREQ / self.mean_ms


class Trainer:
    """A model, its AdamW, its algorithm if it has one, and an endless supply of the same few batches."""

    def __init__(
        self,
        model: nn.Module,
        size: Size,
        fused: bool,
        algorithm: sparselab.RigL | None = None,
        bfloat16: bool = False,
    ) -> None:
        self.model, self.algorithm, self.bfloat16 = model, algorithm, bfloat16
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        random = torch.Generator().manual_seed(0)
        shape = (N_BATCHES, 2, size.batch, size.context)
        self.batches = itertools.cycle(torch.randint(VOCABULARY, shape, generator=random))

    def backward(self) -> None:
        """Forward pass, loss and backward pass of the next batch."""
        x, y = next(self.batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            logits = self.model(x)
        loss: Tensor = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """One training step, with everything that belongs to it."""
        self.backward()
        self.optimizer.step()
        if self.algorithm is not None:
            self.algorithm.step()
        self.optimizer.zero_grad()

    def seconds_of_two_steps(self, update: bool) -> float:
        """Time two steps, the first of which updates the topology or does not."""
        assert self.algorithm is not None
        clock = self.algorithm.state_dict()
        self.algorithm.load_state_dict({**clock, "step": UPDATE_FREQ - 2 if update else 0})
        self.step()
        start = time.perf_counter()
        self.step()
        self.step()
        return time.perf_counter() - start

    def memory(self) -> sparselab.nn.MemoryReport:
        """What the model and its training hold; gradients are those of a backward pass of its own."""
        self.backward()
        report = sparselab.memory_report(self.model, self.optimizer)
        self.optimizer.zero_grad()
        return report


def make_models(size: Size, block_shape: tuple[int, int] | None = None) -> tuple[nn.Module, nn.Module]:
    """The dense model, and the sparse one, of single connections or blocks, with the same all else."""
    torch.manual_seed(0)
    dense = GPT(VOCABULARY, size.context, size.n_layer, size.d_model, size.d_ff, size.n_head, bias=False)
    if block_shape is None:
        return dense, sparselab.sparsify(copy.deepcopy(dense), SPARSITY)
    rules = {name: {"sparsity": sparsity, "block_shape": block_shape} for name, sparsity in SPARSITY.items()}
    return dense, sparselab.sparsify(copy.deepcopy(dense), rules, layer="block")


def gate(model: nn.Module, size: Size) -> None:
    """Refuse to time a sparse model whose loss is not that of its own weights in dense layers."""
    twin = copy.deepcopy(model)
    for name, layer in sparselab.nn.find_sparse(model):
        parent, _, child = name.rpartition(".")
        assert isinstance(layer, (sparselab.SparseLinear, sparselab.BlockSparseLinear))
        setattr(twin.get_submodule(parent), child, layer.to_dense())
    tokens = torch.randint(VOCABULARY, (size.batch, size.context))
    with torch.no_grad():
        actual, expected = model(tokens), twin(tokens)
    error = float((actual - expected).abs().max() / expected.abs().max())
    if not error <= 1e-4:
        raise AssertionError(f"the sparse model is off by {error:.1e} of the largest logit")


def run(
    size: Size,
    rounds: int,
    fused: bool = False,
    label: str = "model",
    *,
    bfloat16: bool = False,
    block_shape: tuple[int, int] | None = None,
) -> dict[str, Arm]:
    """Measure one size, dense and sparse in turns in this process.

    Parameters
    ----------
    size : Size
    rounds : int
        Steps of each arm that count, after two that do not; each follows an untimed one.
    fused : bool
        Take torch's fused AdamW in both arms instead of its default.
    label : str
        What the progress bar says.
    bfloat16 : bool
        Both arms under autocast.
    block_shape : (int, int), optional
        Of the connections of the sparse arm.

    Returns
    -------
    dict
        Results by "dense" and "sparse".

    Raises
    ------
    AssertionError
        If the sparse model does not compute what its weights say.

    Notes
    -----
    The cost of an update is timed apart, as the median difference of two pairs of adjacent steps, one with
    an update and one without, in as many pairs as a fifth of the rounds, at least three.
    """
    dense, sparse = make_models(size, block_shape)
    gate(sparse, size)
    algorithm = sparselab.RigL(update_freq=UPDATE_FREQ)
    sparse.apply(algorithm)
    trainers = {
        "dense": Trainer(dense, size, fused, bfloat16=bfloat16),
        "sparse": Trainer(sparse, size, fused, algorithm, bfloat16),
    }
    steps = interleave({name: trainer.step for name, trainer in trainers.items()}, rounds, label)
    extra = []
    for _ in range(max(3, rounds // 5)):
        with_update = trainers["sparse"].seconds_of_two_steps(update=True)
        extra.append(with_update - trainers["sparse"].seconds_of_two_steps(update=False))
    update_ms = {"dense": 0.0, "sparse": 1e3 * statistics.median(extra)}
    reports = {name: trainer.memory() for name, trainer in trainers.items()}
    return {
        name: Arm(
            report.parameters_live, report.weight_bytes, report.training_bytes, steps[name], update_ms[name]
        )
        for name, report in reports.items()
    }


def inference_bytes(size: Size) -> dict[str, int]:
    """Bytes that a model holds to run: all its parameters and buffers, with embeddings, norms and topology.

    Returns
    -------
    dict
        For the "dense float32", the "sparse float32" and the "sparse bfloat16" model. In the latter each
        sparse layer went through ``layer.to(torch.bfloat16)``, and all else is bfloat16 too.
    """
    dense, sparse = make_models(size)
    counts = {"dense float32": _bytes(dense), "sparse float32": _bytes(sparse)}
    return {**counts, "sparse bfloat16": _bytes(sparse.to(torch.bfloat16))}


def _bytes(model: nn.Module) -> int:
    return sparselab.memory_report(model).weight_bytes


def usual(what: str) -> str:
    """The batch or the context of each size, in words."""
    return ", ".join(f"{getattr(size, what)} for {name}" for name, size in SIZES.items())


def sizes(names: Sequence[str], batch: int | None, context: int | None) -> dict[str, Size]:
    """The named sizes, with another batch or context for those that are given."""
    chosen = {}
    for name in names:
        size = asdict(SIZES[name])
        size.update({key: value for key, value in (("batch", batch), ("context", context)) if value})
        chosen[name] = Size(**size)
    return chosen


def report(options: Namespace, console: Console) -> list[dict[str, Any]]:
    """The subcommand: run, print a table; returns the rows for ``--json``."""
    table = Table(title="training steps on random tokens (and share of dense)")
    for column in (
        "model",
        "parameters live",
        "weights, MB",
        "training, MB",
        "ms per step",
        "tokens/s",
        "RigL",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    rows = []
    for name, size in sizes(options.models, options.batch, options.context).items():
        arms = run(
            size, options.rounds, options.fused, name, bfloat16=options.bfloat16, block_shape=options.blocks
        )
        dense = arms["dense"]
        for which, arm in arms.items():
            table.add_row(
                f"{name} {which}, {size.batch}x{size.context}",
                f"{arm.parameters:,} ({arm.parameters / dense.parameters:.0%})",
                f"{arm.weight_bytes / 1e6:.1f} ({arm.weight_bytes / dense.weight_bytes:.0%})",
                f"{arm.training_bytes / 1e6:.1f} ({arm.training_bytes / dense.training_bytes:.0%})",
                f"{arm.mean_ms:.1f} ({arm.mean_ms / dense.mean_ms:.0%})",
                f"{1e3 * size.tokens / arm.mean_ms:,.0f}",
                f"{arm.update_share:.1%}" if which == "sparse" else "",
            )
            rows.append(
                {
                    "model": name, "arm": which, "size": asdict(size), "fused": options.fused,
                    "bfloat16": options.bfloat16, "blocks": options.blocks, **asdict(arm),
                    "mean_ms": arm.mean_ms, "tokens_per_second": 1e3 * size.tokens / arm.mean_ms,
                    "update_share": arm.update_share,
                }
            )  # fmt: skip
    console.print(table)
    for name in options.models:
        held = inference_bytes(SIZES[name])
        cells = (f"{which} {n / 1e6:.2f} MB ({n / held['dense float32']:.1%})" for which, n in held.items())
        console.print(f"{name} at inference, all parameters and buffers: {', '.join(cells)}")
    console.print(
        f"RigL: its share of the step, for one update in {UPDATE_FREQ} steps; ms per step includes it"
    )
    return rows
