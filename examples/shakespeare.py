"""A small character-level GPT, trained twice on the same batches: dense, and sparse from first step to last.

    python examples/shakespeare.py                # Tiny Shakespeare, both arms, a table and pictures
    python examples/shakespeare.py --text my.txt --steps 1000
    python examples/shakespeare.py --set mlp_sparsity=0.95

Each arm runs in a process of its own, so its resident memory is its own.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from text import Text, TextError, load_text
from torch import Tensor, nn
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
    block: str = ""  # such as 4x4: connections are dense blocks of so many outputs and inputs
    drop_fraction: float = 0.3
    update_every: int = 100
    last_update: float = 0.75  # as a fraction of the steps; the last quarter trains a settled topology
    # training; each arm's rate is the best of a few tried, by the validation loss of one seed
    steps: int = 180
    batch: int = 16
    dense_lr: float = 2e-3
    sparse_lr: float = 5e-3
    final_lr: float = 0.1  # as a fraction of the arm's rate
    warmup: int = 30
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 1
    # measuring
    evaluate_every: int = 50
    validation_windows: int = 192
    untimed_steps: int = 5
    sample_chars: int = 200


ARMS = ("dense", "sparse")


# Models


def make_model(cfg: Config, vocabulary: int, arm: str) -> tuple[nn.Module, sparselab.RigL | None]:
    """The model of one arm; both start from the same embeddings, norms and head."""
    torch.manual_seed(cfg.seed)
    model = GPT(vocabulary, cfg.context, cfg.n_layer, cfg.d_model, cfg.d_ff, cfg.n_head)
    if arm == "dense":
        return model, None
    kind = {"layer": "block", "block_shape": block_shape(cfg.block)} if cfg.block else {}
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
    last = max(1, round(cfg.last_update * cfg.steps))
    algo = sparselab.RigL(
        drop_fraction=cfg.drop_fraction,
        update_freq=cfg.update_every,
        stop=last,
        seed=cfg.seed,
        scope=scope,
    )
    model.apply(algo)
    return model, algo


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
    lr = cfg.dense_lr if arm == "dense" else cfg.sparse_lr
    return torch.optim.AdamW(groups, lr=lr, betas=(cfg.beta1, cfg.beta2))


# Data


@dataclass(frozen=True)
class Data:
    """Characters as numbers: nine tenths to train on, fixed windows of the last tenth to validate with."""

    vocabulary: str
    train: Tensor
    val_x: Tensor
    val_y: Tensor


def min_chars(cfg: Config) -> int:
    """The shortest text whose last tenth holds one window."""
    return 10 * (cfg.context + 1)


def make_data(cfg: Config, characters: str) -> Data:
    codes = np.frombuffer(characters.encode("utf-32-le"), dtype=np.uint32)
    distinct, tokens = np.unique(codes, return_inverse=True)
    vocabulary = "".join(chr(code) for code in distinct)
    n_val = max(len(tokens) // 10, cfg.context + 1)
    train, val = torch.from_numpy(tokens[:-n_val]), torch.from_numpy(tokens[-n_val:])
    last_start = n_val - cfg.context - 1
    n_windows = min(cfg.validation_windows, last_start // cfg.context + 1)
    starts = torch.linspace(0, last_start, n_windows, dtype=torch.float64).long()
    val_x, val_y = windows(val, starts, cfg.context)
    return Data(vocabulary, train, val_x, val_y)


def windows(tokens: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The characters from each start, and those one place further on."""
    at = starts[:, None] + torch.arange(length)
    return tokens[at], tokens[at + 1]


def bigram_loss(train: Tensor, val_x: Tensor, val_y: Tensor, n: int) -> float:
    """Nats per character of a table of pair counts plus one, on the very characters the GPT is judged by."""
    pairs = torch.bincount(train[:-1] * n + train[1:], minlength=n * n).view(n, n).double() + 1
    log_p = (pairs / pairs.sum(1, keepdim=True)).log()
    return -log_p[val_x, val_y].mean().item()


# Training


def lr_factor(cfg: Config, step: int) -> float:
    """Share of the peak rate at `step` (from 0): a linear rise, then half a cosine down to `final_lr`."""
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
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
            if step % cfg.evaluate_every == 0 or step == cfg.steps:
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


def run_arm(cfg: Config, characters: str, arm: str, out: Path) -> None:
    """Train one arm and write ``<arm>.json``, for the sparse one also ``topology.npz``, into `out`."""
    data = make_data(cfg, characters)
    load_s = load_code(arm)
    resident_before = resident_bytes()
    model, algo = make_model(cfg, len(data.vocabulary), arm)
    optimizer = make_optimizer(cfg, model, arm)
    if algo is not None:
        name, shape, before = first_mlp_topology(model)
    curves = train(cfg, data, model, optimizer, algo, arm)
    resident, peak = resident_bytes(), peak_resident_bytes()
    memory = sparselab.memory_report(model, optimizer)
    timed = curves["seconds"][cfg.untimed_steps :] or curves["seconds"]
    result = {
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


# Both arms


def run_both(cfg: Config, text: Text, out: Path, options: Sequence[str]) -> None:
    """Run the arms one after the other and show what came out."""
    from shakespeare_report import show  # drawing libraries stay out of the arms' memory

    data = make_data(cfg, text.characters)
    n = len(data.vocabulary)
    print(f"Text: {text.source} ({len(text.characters):,} characters, {n} distinct).")
    text_file = out / "text.txt"
    text_file.write_bytes(text.characters.encode("utf-8"))
    for arm in ARMS:
        command = [sys.executable, __file__, *options, "--text", str(text_file), "--arm", arm]
        status = subprocess.run(command, check=False).returncode
        if status != 0:
            raise SystemExit(f"the {arm} arm failed (exit status {status}); its message is above")
    results = {arm: json.loads((out / f"{arm}.json").read_text(encoding="utf-8")) for arm in ARMS}
    bigram = {
        "val_loss": bigram_loss(data.train, data.val_x, data.val_y, n),
        "parameters_live": n * n,
        "weight_bytes": 4 * n * n,
    }
    summary = {"config": dataclasses.asdict(cfg), "text": text.source, "bigram": bigram, **results}
    (out / "results.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    show(results, bigram, out)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a small character-level GPT dense and sparse, and compare."
    )
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to train on (default: Tiny Shakespeare)")
    parser.add_argument(
        "--steps", type=at_least_one, help=f"training steps per arm (default: {Config.steps})"
    )
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
        cfg, steps=args.steps or cfg.steps, seed=cfg.seed if args.seed is None else args.seed
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
        run_both(cfg, text, args.out, options)


if __name__ == "__main__":
    main()
