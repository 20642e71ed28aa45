"""A small character-level GPT, trained three times for the same seconds.

Dense, sparse from first step to last, and dense again, as narrow as the memory of the sparse one asks.

    python examples/shakespeare.py                # Tiny Shakespeare, a table, pictures and a sentence
    python examples/shakespeare.py --text my.txt --seconds 600
    python examples/shakespeare.py --steps 500    # so many of each, however long they take
    python examples/shakespeare.py --set mlp_sparsity=0.95

Each arm runs in a process of its own, so its resident memory is its own. How many steps fit into the
seconds is judged by a few before the first, so that rates fall in time.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpt_model import GPT, initial_std
from options import at_least_one, changed
from resident import peak_resident_bytes, resident_bytes
from shakespeare_data import Data, bigram_loss, make_data, min_chars, windows
from text import Text, TextError, load_text
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import sparselab


@dataclass(frozen=True)
class Config:
    """Everything one may want to change; ``--set name=value`` changes it for one run."""

    # model
    n_layer: int = 4
    d_model: int = 384
    d_ff: int = 1536
    n_head: int = 6
    context: int = 128
    # what is sparse; embeddings, norms and the output head stay dense
    attention_sparsity: float = 0.7
    mlp_sparsity: float = 0.9
    block: str = "4x4"  # connections are dense blocks of so many outputs and inputs; "1x1": single ones
    drop_fraction: float = 0.3
    update_every: int = 100
    last_update: float = 0.75  # as a fraction of the steps; the last quarter trains a settled topology
    # training; each arm's rate is the best of a few tried, by the validation loss of one seed
    seconds: float = 110.0  # of each arm
    steps: int = 0  # of each arm; 0: as many as fit into the seconds
    batch: int = 16
    dense_lr: float = 2e-3
    narrow_lr: float = 4e-3
    sparse_lr: float = 5e-3
    final_lr: float = 0.1  # as a fraction of the arm's rate
    warmup: float = 0.1  # as a fraction of the steps
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 1
    # measuring
    evaluations: int = 8
    validation_windows: int = 192
    untimed_steps: int = 5
    sample_chars: int = 200


#: In the order in which they run; the last has the memory of the one before it.
ARMS = ("dense", "sparse", "narrow")
#: Of the width of a narrow model, and of its heads.
NARROW_HEAD = 32


# Models


def make_model(cfg: Config, vocabulary: int, arm: str) -> tuple[nn.Module, sparselab.RigL | None]:
    """The model of one arm; those of one width start from the same embeddings, norms and head."""
    torch.manual_seed(cfg.seed)
    model = GPT(vocabulary, cfg.context, cfg.n_layer, cfg.d_model, cfg.d_ff, cfg.n_head)
    if arm != "sparse":
        return model, None
    shape = block_shape(cfg.block)
    kind = {} if shape == (1, 1) else {"layer": "block", "block_shape": shape}
    return make_sparse(cfg, model, kind)


def make_sparse(
    cfg: Config, model: nn.Module, kind: Mapping[str, Any], scope: str = "layer"
) -> tuple[nn.Module, sparselab.RigL]:
    """Make a dense model sparse in place; `kind` is what rules say of its layers, `scope` is that of RigL."""
    sparsities = {"*.attn.*": cfg.attention_sparsity, "*.mlp.*": cfg.mlp_sparsity}
    model = sparselab.sparsify(
        model, {pattern: {"sparsity": sparsity, **kind} for pattern, sparsity in sparsities.items()}
    )
    for name, layer in sparselab.nn.find_sparse(model):  # outputs of the same variance as the dense arm's
        std = initial_std(name, cfg.n_layer) / math.sqrt(1 - layer.sparsity)
        weights = torch.empty_like(layer.per_connection(layer.stored)).normal_(std=std)
        layer.put(layer.stored.detach(), torch.arange(layer.nnz), weights)
        nn.init.zeros_(layer.bias)
    last = max(1, round(cfg.last_update * cfg.steps))  # of steps that are known by now
    algo = sparselab.RigL(
        drop_fraction=cfg.drop_fraction,
        update_freq=cfg.update_every,
        stop=last,
        seed=cfg.seed,
        scope=scope,
    )
    model.apply(algo)
    return model, algo


def narrowed(cfg: Config, vocabulary: int, training_bytes: int) -> Config:
    """The settings of the widest dense model that trains in so many bytes.

    Weights, gradients and AdamW's two moments are 16 bytes for each parameter.
    """
    width = NARROW_HEAD
    while width + NARROW_HEAD <= cfg.d_model:
        wider = with_width(cfg, width + NARROW_HEAD)
        if 16 * n_parameters(wider, vocabulary) > training_bytes:
            break
        width += NARROW_HEAD
    return with_width(cfg, width)


def with_width(cfg: Config, width: int) -> Config:
    return dataclasses.replace(
        cfg, d_model=width, d_ff=width * cfg.d_ff // cfg.d_model, n_head=width // NARROW_HEAD
    )


def n_parameters(cfg: Config, vocabulary: int) -> int:
    """Of the dense model."""
    with torch.device("meta"):
        model = GPT(vocabulary, cfg.context, cfg.n_layer, cfg.d_model, cfg.d_ff, cfg.n_head)
    return sum(parameter.numel() for parameter in model.parameters())


def block_shape(text: str) -> tuple[int, int]:
    try:
        rows, columns = map(int, text.split("x"))
    except ValueError:
        raise SystemExit(f"--set block={text}: expected rows and columns of a block, such as 4x4") from None
    return rows, columns


def make_optimizer(cfg: Config, model: nn.Module, arm: str) -> torch.optim.AdamW:
    """AdamW; weights decay, sparse ones too, biases and norms do not."""
    decayed, free = [], []
    for parameter in model.parameters():
        (decayed if parameter.ndim >= 2 else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": free, "weight_decay": 0.0}]
    lr = {"dense": cfg.dense_lr, "narrow": cfg.narrow_lr, "sparse": cfg.sparse_lr}[arm]
    return torch.optim.AdamW(groups, lr=lr, betas=(cfg.beta1, cfg.beta2))


# Training


def lr_factor(cfg: Config, step: int) -> float:
    """Share of the peak rate at `step` (from 0): a linear rise, then half a cosine down to `final_lr`."""
    warmup = max(1, round(cfg.warmup * cfg.steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, cfg.steps - warmup)
    return cfg.final_lr + (1 - cfg.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, batch: int) -> float:
    """Mean loss over the validation windows, nats per character."""
    total = 0.0
    for x, y in zip(data.val_x.split(batch), data.val_y.split(batch), strict=True):
        total += F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / data.val_y.numel()


def train(
    cfg: Config,
    data: Data,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    algo: sparselab.RigL | None,
    name: str,
) -> dict[str, list[float]]:
    """Train; return loss and seconds of every step, and the validation losses with their steps."""
    draw = torch.Generator().manual_seed(cfg.seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(cfg, step))
    curves: dict[str, list[float]] = {"loss": [], "seconds": [], "val_step": [], "val_loss": []}
    every = max(1, cfg.steps // cfg.evaluations)
    with tqdm(total=cfg.steps, desc=f"{name:6}", unit="step", dynamic_ncols=True) as bar:
        for step in range(1, cfg.steps + 1):
            start = time.perf_counter()
            starts = torch.randint(len(data.train) - cfg.context, (cfg.batch,), generator=draw)
            x, y = windows(data.train, starts, cfg.context)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            optimizer.step()
            if algo is not None:
                algo.step()
            schedule.step()
            curves["loss"].append(loss.item())
            curves["seconds"].append(time.perf_counter() - start)
            if step % every == 0 or step == cfg.steps:
                curves["val_step"].append(step)
                curves["val_loss"].append(evaluate(model, data, cfg.batch))
            val = f"{curves['val_loss'][-1]:.3f}" if curves["val_loss"] else "-"
            bar.set_postfix(loss=f"{curves['loss'][-1]:.3f}", val=val, refresh=False)
            bar.update()
    return curves


@torch.no_grad()
def sample(cfg: Config, data: Data, model: nn.Module, temperature: float = 0.8) -> str:
    """Characters drawn from the model, after a line break where the text has one."""
    draw = torch.Generator().manual_seed(cfg.seed)
    tokens = torch.tensor([[max(0, data.vocabulary.find("\n"))]])
    for _ in range(cfg.sample_chars):
        logits = model(tokens[:, -cfg.context :])[0, -1]
        following = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=draw)
        tokens = torch.cat([tokens, following[None]], dim=1)
    return "".join(data.vocabulary[token] for token in tokens[0, 1:].tolist())


# One arm, in a process of its own


def first_mlp_topology(model: nn.Module) -> tuple[str, tuple[int, int], np.ndarray]:
    """Name, shape and live positions of the first sparse feed-forward layer."""
    name, layer = next((name, layer) for name, layer in sparselab.nn.find_sparse(model) if ".mlp." in name)
    return name, layer.shape, layer.positions().numpy().copy()


def load_code(arm: str) -> float:
    """Train one small layer, so that libraries are loaded and kernels compiled; seconds that took."""
    start = time.perf_counter()
    layer = nn.Linear(64, 64) if arm == "dense" else sparselab.SparseLinear(64, 64)
    layer(torch.zeros(32, 64, requires_grad=True)).sum().backward()
    return time.perf_counter() - start


def steps_in(cfg: Config, data: Data, arm: str) -> int:
    """How many steps fit into the seconds, judged by the middle one of a few."""
    few = dataclasses.replace(cfg, steps=cfg.untimed_steps + 3, evaluations=1, validation_windows=1)
    model, algo = make_model(few, len(data.vocabulary), arm)
    curves = train(few, data, model, make_optimizer(few, model, arm), algo, f"{arm}, a few")
    return max(1, int(cfg.seconds / statistics.median(curves["seconds"][cfg.untimed_steps :])))


def run_arm(cfg: Config, characters: str, arm: str, out: Path) -> None:
    """Train one arm and write ``<arm>.json``, for the sparse one also ``topology.npz``, into `out`."""
    data = make_data(cfg, characters)
    load_s = load_code(arm)
    resident_before = resident_bytes()
    if not cfg.steps:
        cfg = dataclasses.replace(cfg, steps=steps_in(cfg, data, arm))
        gc.collect()
    model, algo = make_model(cfg, len(data.vocabulary), arm)
    optimizer = make_optimizer(cfg, model, arm)
    if algo is not None:
        name, shape, before = first_mlp_topology(model)
    curves = train(cfg, data, model, optimizer, algo, arm)
    resident, peak = resident_bytes(), peak_resident_bytes()
    memory = sparselab.memory_report(model, optimizer)
    timed = curves["seconds"][cfg.untimed_steps :] or curves["seconds"]
    result = {
        "width": cfg.d_model,
        "steps": cfg.steps,
        "parameters_live": memory.parameters_live,
        "weight_bytes": memory.weight_bytes,
        "training_bytes": memory.training_bytes,
        "resident_before": resident_before,
        "resident": resident,
        "resident_peak": peak,
        "step_ms": 1000 * statistics.median(timed),
        "load_s": load_s,
        "train_s": sum(curves["seconds"]),
        "val_loss": curves["val_loss"][-1],
        "threads": torch.get_num_threads(),
        "sample": sample(cfg, data, model),
        "curves": curves,
    }
    if algo is not None:
        after = first_mlp_topology(model)[2]
        np.savez_compressed(out / "topology.npz", name=name, shape=shape, before=before, after=after)
    (out / f"{arm}.json").write_text(json.dumps(result), encoding="utf-8")


# All arms


def run_all(cfg: Config, text: Text, out: Path, options: Sequence[str]) -> None:
    """Run the arms one after the other and show what came out."""
    from shakespeare_report import show  # drawing libraries stay out of the arms' memory

    data = make_data(cfg, text.characters)
    n = len(data.vocabulary)
    print(f"Text: {text.source} ({len(text.characters):,} characters, {n} distinct).")
    text_file = out / "text.txt"
    text_file.write_bytes(text.characters.encode("utf-8"))
    results: dict[str, Any] = {}
    for arm in ARMS:
        command = [sys.executable, __file__, *options, "--text", str(text_file), "--arm", arm]
        if arm == "narrow":
            slim = narrowed(cfg, n, results["sparse"]["training_bytes"])
            for name in ("d_model", "d_ff", "n_head"):
                command += ["--set", f"{name}={getattr(slim, name)}"]
        status = subprocess.run(command, check=False).returncode
        if status != 0:
            raise SystemExit(f"the {arm} arm failed (exit status {status}); its message is above")
        results[arm] = json.loads((out / f"{arm}.json").read_text(encoding="utf-8"))
    bigram = {
        "val_loss": bigram_loss(data.train, data.val_x, data.val_y, n),
        "parameters_live": n * n,
        "weight_bytes": 4 * n * n,
    }
    summary = {"config": dataclasses.asdict(cfg), "text": text.source, "bigram": bigram, **results}
    (out / "results.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    show(results, bigram, out)


def seconds(text: str) -> float:
    """A time on the command line."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return float(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a small character-level GPT dense and sparse for the same seconds, and compare."
    )
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to train on (default: Tiny Shakespeare)")
    parser.add_argument(
        "--seconds", type=seconds, help=f"of training for each arm (default: {Config.seconds:g})"
    )
    parser.add_argument("--steps", type=at_least_one, help="of each arm, in place of seconds")
    parser.add_argument(
        "--out", type=Path, default=Path("results/shakespeare"), help="folder for results and pictures"
    )
    parser.add_argument("--seed", type=int, help=f"of weights, batches and topology (default: {Config.seed})")
    parser.add_argument("--threads", type=at_least_one, help="CPU threads (default: as torch chooses)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change one line of the Config"
    )
    parser.add_argument("--arm", choices=ARMS, help="run only this arm, in this process")
    return parser


def main(options: Sequence[str] | None = None) -> None:
    options = sys.argv[1:] if options is None else list(options)
    args = make_parser().parse_args(options)
    cfg = changed(Config(), args.set)
    cfg = dataclasses.replace(
        cfg,
        steps=args.steps or cfg.steps,
        seconds=args.seconds or cfg.seconds,
        seed=cfg.seed if args.seed is None else args.seed,
    )
    try:
        text = load_text(args.text, min_chars(cfg))
        args.out.mkdir(parents=True, exist_ok=True)
    except TextError as error:
        raise SystemExit(f"error: {error}") from None
    except OSError as error:
        raise SystemExit(f"error: --out {args.out}: cannot be made ({error.strerror})") from None
    if args.arm:
        if args.threads:
            torch.set_num_threads(args.threads)
        run_arm(cfg, text.characters, args.arm, args.out)
    else:
        run_all(cfg, text, args.out, options)


if __name__ == "__main__":
    main()
