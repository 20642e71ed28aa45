"""What ages of connections are worth: the loss around updates, and at the end, with them and without.

A small GPT learns Tiny Shakespeare (``examples/shakespeare.py``) with connections that SET or RigL replaces,
AdamW with betas of 0.9 and 0.999, each seed with the same batches in both arms. The loss at one fixed batch
is taken just before an update, just after it (weights are gone, new ones are 0), and some steps later.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from argparse import Namespace
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

import sparselab
from benchmarks.quality import DownloadError, TextError, shakespeare, tiny_shakespeare

ALGORITHMS = ("SET", "RigL")
#: Steps after an update at which the fixed batch is looked at.
LATER = (1, 2, 5, 10, 20)
SETTINGS = shakespeare.Config(
    n_layer=2, d_model=96, d_ff=384, n_head=4, context=48, batch=12, beta2=0.999, sparse_lr=5e-3, block="1x1",
    attention_sparsity=0.9, mlp_sparsity=0.9, validation_windows=384,
)  # fmt: skip


@torch.no_grad()
def loss_at(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Nats per character at a batch."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()


def learn(name: str, ages: bool, cfg: Any, data: Any) -> dict[str, float]:
    """Mean losses around the updates, the validation loss at the end, and the seconds of it all."""
    torch.manual_seed(cfg.seed)
    dense, _ = shakespeare.make_model(cfg, len(data.vocabulary), "dense")
    model, own = shakespeare.make_sparse(cfg, dense, {})
    own.detach()
    algorithm = getattr(sparselab, name)(
        drop_fraction=cfg.drop_fraction, update_freq=cfg.update_every, stop=own.stop, seed=cfg.seed,
        grown_state="young" if ages else "zero",
    )  # fmt: skip
    model.apply(algorithm)
    optimizer = shakespeare.make_optimizer(cfg, model, "sparse")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shakespeare.lr_factor(cfg, step))
    draw = torch.Generator().manual_seed(cfg.seed)
    fixed = [each[:: len(each) // 24] for each in (data.val_x, data.val_y)]
    seen: dict[int, list[float]] = {}
    last, start = -1 - LATER[-1], time.perf_counter()
    for step in range(1, cfg.steps + 1):
        starts = torch.randint(len(data.train) - cfg.context, (cfg.batch,), generator=draw)
        x, y = shakespeare.windows(data.train, starts, cfg.context)
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        if algorithm.is_update_step(step):
            last = step
            seen.setdefault(-1, []).append(loss_at(model, *fixed))
        algorithm.step()
        schedule.step()
        if (after := step - last) in (0, *LATER):
            seen.setdefault(after, []).append(loss_at(model, *fixed))
    found = {str(after): statistics.fmean(losses) for after, losses in sorted(seen.items())}
    seconds = time.perf_counter() - start
    return {**found, "validation": shakespeare.evaluate(model, data, cfg.batch), "seconds": seconds}


def report(options: Namespace, console: Console) -> list[dict[str, Any]]:
    """Train, print a table, and return its rows; nothing where there is no text."""
    torch.set_num_threads(options.threads)
    try:
        characters = tiny_shakespeare(shakespeare.min_chars(SETTINGS)).characters
    except (DownloadError, TextError) as error:
        console.print(f"skipped: {error}")
        return []
    data = shakespeare.make_data(SETTINGS, characters)
    rows = []
    for name in options.algorithms:
        for seed in range(1, options.seeds + 1):
            cfg = dataclasses.replace(SETTINGS, seed=seed, steps=options.steps, update_every=options.every)
            rows += [
                {"algorithm": name, "ages": ages, "seed": seed, **learn(name, ages, cfg, data)}
                for ages in (True, False)
            ]
    show(rows, console)
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the means over the seeds, and how the validation losses of pairs differ."""
    columns = [("before", "-1"), ("after", "0"), *((f"+{n}", str(n)) for n in LATER)]
    for name in dict.fromkeys(row["algorithm"] for row in rows):
        ends = {}
        for ages in (True, False):
            runs = [row for row in rows if row["algorithm"] == name and row["ages"] == ages]
            ends[ages] = [row["validation"] for row in runs]
            means = ", ".join(
                f"{title} {statistics.fmean(row[key] for row in runs):.4f}"
                for title, key in columns
                if all(key in row for row in runs)
            )
            each = " ".join(f"{value:.4f}" for value in ends[ages])
            console.print(f"{name}, ages {'on ' if ages else 'off'}: {means}; validation {each}")
        gains = [off - on for on, off in zip(ends[True], ends[False], strict=True)]
        spread = statistics.stdev(gains) if len(gains) > 1 else float("nan")
        console.print(
            f"{name}: validation is lower by {statistics.fmean(gains):.4f} ± {spread:.4f} with ages, by seed"
        )
