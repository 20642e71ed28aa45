"""Train a GPT of any size on any text: dense, masked, or sparse from the first step to the last.

    python examples/gpt.py                                  # 10M on Tiny Shakespeare, RigL
    python examples/gpt.py --preset 124M --text corpus/ --checkpoint-activations --accumulate 4
    python examples/gpt.py --arm dense --out results/dense
    python examples/gpt.py --resume results/gpt             # go on from the newest checkpoint that is whole
    torchrun --nproc-per-node 4 examples/gpt.py --algorithm static
    torchrun --nproc-per-node 2 --max-restarts 9 examples/gpt.py    # goes on if a process dies

Loss, speed and memory go to ``log.jsonl`` at every evaluation, checkpoints to ``checkpoints``, a picture to
``loss.png``; ``gpt_report.py`` draws several runs side by side.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import small_heap  # noqa: F401 - before torch
import torch
from downloads import write_atomically
from gpt_arms import Config, add_options, attach_algorithm, make_model, make_optimizer, read_config
from gpt_data import Tokens, load_tokens
from gpt_model import GPT, Past
from options import at_least_one
from ranks import Ranks, join_ranks
from resident import peak_resident_bytes, resident_bytes
from text import TextError
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import sparselab

#: Checkpoints that are kept: the newest, and what to go back to if it is damaged.
KEPT = 2
#: Attributes of a run that a checkpoint holds as they are.
PROGRESS = ("step", "seconds", "losses", "history")


class Run:
    """A model in training, and how far it is.

    Parameters
    ----------
    cfg : Config
    tokens : Tokens
    out : Path
        Where log, checkpoints and pictures go.
    ranks : Ranks
    """

    def __init__(self, cfg: Config, tokens: Tokens, out: Path, ranks: Ranks) -> None:
        self.cfg, self.tokens, self.out, self.ranks = cfg, tokens, out, ranks
        self.model = make_model(cfg, tokens.size)
        self.shared = ranks.share(self.model)
        self.compression = ranks.compress(self.shared, cfg.gradients, cfg.top_k)
        self.optimizer = make_optimizer(cfg, self.model)
        self.algorithm = attach_algorithm(cfg, self.model, self.optimizer)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, cfg.lr_factor)
        self.validation = tokens.validation_windows(cfg.context, cfg.validation_windows)
        self.step, self.seconds = 0, 0.0
        #: Of the steps since the last evaluation.
        self.losses: list[float] = []
        #: A line of the log for each evaluation.
        self.history: list[dict[str, Any]] = []

    # Training

    def train(self) -> None:
        """Take the steps that are left; evaluate and save on the way."""
        cfg = self.cfg
        shown = {"unit": "step", "dynamic_ncols": True, "disable": not self.ranks.first}
        with tqdm(total=cfg.steps, initial=self.step, **shown) as bar:
            while self.step < cfg.steps:
                start = time.perf_counter()
                self.losses.append(self.take_step())
                self.step += 1
                self.seconds += time.perf_counter() - start
                bar.set_postfix_str(self.status(), refresh=False)
                is_last = self.step == cfg.steps
                if self.step % cfg.evaluate_every == 0 or is_last:
                    self.note()
                if self.step % cfg.save_every == 0 or is_last:
                    self.save()
                bar.update()

    def take_step(self) -> float:
        """One optimizer step, as many passes as are accumulated; returns the mean loss of its tokens."""
        cfg, total = self.cfg, 0.0
        for index in range(cfg.accumulate):
            part, parts = index * self.ranks.world + self.ranks.rank, cfg.accumulate * self.ranks.world
            x, y = self.tokens.batch(cfg.context, cfg.batch, cfg.seed, self.step, part=part, parts=parts)
            with self.ranks.backward(self.shared, index == cfg.accumulate - 1):
                loss = self.loss(self.shared, x, y) / cfg.accumulate
                loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), cfg.clip)
        self.optimizer.step()  # and the algorithm with it
        self.schedule.step()
        self.optimizer.zero_grad()
        return total

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy, nats per token."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.cfg.bfloat16):
            logits = model(x)
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the windows of the text to validate with."""
        x, y = self.validation
        batches = zip(x.split(self.cfg.batch), y.split(self.cfg.batch), strict=True)
        return sum(self.loss(self.model, a, b).item() * len(a) for a, b in batches) / len(x)

    # What is told

    def note(self) -> None:
        """Evaluate, and write a line of the log."""
        losses = self.ranks.means(self.losses)
        self.losses = []
        if not self.ranks.first:
            return
        line = {
            "step": self.step,
            "seconds": round(self.seconds, 3),
            "tokens": self.n_tokens,
            "loss": sum(losses) / len(losses),
            "validation_loss": self.evaluate(),
            "lr": self.schedule.get_last_lr()[0],
            "tokens_per_second": self.n_tokens / self.seconds,
            "resident": resident_bytes(),
            "resident_peak": peak_resident_bytes(),
            "sparsity": sparselab.nn.measure_sparsity(self.model),
        }
        self.history.append(line)
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def status(self) -> str:
        """What the progress bar says."""
        parts = [
            f"loss {self.losses[-1]:.3f}",
            f"{self.n_tokens / self.seconds:,.0f} tokens/s",
            f"{resident_bytes() / 2**30:.2f} GiB",
        ]
        if self.history:
            last = self.history[-1]
            parts += [f"validation {last['validation_loss']:.3f}", f"{last['sparsity']:.1%} sparse"]
        return ", ".join(parts)

    @property
    def n_tokens(self) -> int:
        """Tokens that were trained on."""
        cfg = self.cfg
        return self.step * cfg.batch * cfg.accumulate * cfg.context * self.ranks.world

    # Checkpoints

    def save(self) -> None:
        """Write a checkpoint, and let the oldest go."""
        for part in (self.algorithm, self.compression):
            if part:  # all processes bring together what each has
                part.consolidate()
        self.losses = self.ranks.means(self.losses)
        if self.ranks.first:
            self.folder.mkdir(exist_ok=True)
            progress = {name: getattr(self, name) for name in PROGRESS}
            path = self.folder / f"step-{self.step:08}.checkpoint"
            sparselab.save_checkpoint(path, **self.parts, progress=progress)
            for old in self.checkpoints()[KEPT:]:
                old.unlink()
        self.ranks.wait()

    def resume(self) -> None:
        """Go on from the newest checkpoint that is whole; all processes from the one that the first took."""
        chosen, progress = "", {}
        for path in self.checkpoints() if self.ranks.first else ():
            try:
                progress, chosen = self.load(path), path.name
                break
            except sparselab.CheckpointError as error:
                print(f"{error}; trying the one before")
        chosen = self.ranks.agreed(chosen)
        if not chosen:
            raise SystemExit(f"error: --resume {self.out}: no whole checkpoint in {self.folder}")
        progress = progress or self.load(self.folder / chosen)
        for name in PROGRESS:
            setattr(self, name, progress[name])
        if self.ranks.first:  # without what was told, or half written, after that
            lines = "".join(json.dumps(line) + "\n" for line in self.history)
            (self.out / "log.jsonl").write_text(lines, encoding="utf-8")
            for unfinished in self.folder.glob("*.unfinished"):
                unfinished.unlink()

    def load(self, path: Path) -> dict[str, Any]:
        """Take back what a checkpoint holds; returns how far it was."""
        return sparselab.load_checkpoint(path, **self.parts)["progress"]  # type: ignore[no-any-return]

    @property
    def parts(self) -> dict[str, Any]:
        """What a run goes on from, beside its progress; which batches come follows from the step."""
        found = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        found |= {"algorithm": self.algorithm} if self.algorithm else {}
        found |= {"compression": self.compression} if self.compression else {}
        return {**found, "random": sparselab.RandomState()}

    @property
    def folder(self) -> Path:
        return self.out / "checkpoints"

    def checkpoints(self) -> list[Path]:
        """Those that are there, the newest first."""
        return sorted(self.folder.glob("step-*.checkpoint"), reverse=True)


@torch.inference_mode()
def write(model: GPT, tokens: Tokens, n: int, seed: int, temperature: float = 0.8) -> str:
    """So many tokens drawn from the model, after a line break."""
    draw = torch.Generator().manual_seed(seed)
    written, context = [tokens.line_break()], model.places.num_embeddings
    past: list[Past] = []
    for _ in range(n):
        if not past or past[0][0].shape[2] == context:  # begin anew, half of the context back
            past, new = [[] for _ in model.blocks], written[-context // 2 :]
        logits = model(torch.tensor([new]), past)[0, -1]
        new = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=draw).tolist()
        written += new
    return tokens.text(written[1:])


def steps_in(cfg: Config, tokens: Tokens, out: Path, ranks: Ranks) -> Config:
    """The settings with so many steps as fit into ``--seconds``, judged by the second of two."""
    run = Run(dataclasses.replace(cfg, steps=1 << 30), tokens, out, ranks)
    run.take_step()
    start = time.perf_counter()
    run.take_step()
    seconds = time.perf_counter() - start
    del run
    gc.collect()
    return dataclasses.replace(cfg, steps=ranks.agreed(max(10, int(cfg.seconds / seconds))))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, metavar="PATH", help="a file or a folder of text files")
    parser.add_argument("--out", type=Path, default=Path("results/gpt"), help="folder of the run")
    parser.add_argument(
        "--resume", type=Path, metavar="OUT", help="go on with the run in that folder, with its settings"
    )
    parser.add_argument("--threads", type=at_least_one, help="CPU threads (default: as torch chooses)")
    add_options(parser)
    return parser


def start_run(args: argparse.Namespace, ranks: Ranks) -> Run:
    """A new run, with the settings of the command line."""
    cfg, text, out = read_config(vars(args)), args.text, args.out
    out.mkdir(parents=True, exist_ok=True)
    tokens = load_tokens(text, cfg.characters, cfg.context, out)
    if cfg.seconds:
        cfg = steps_in(cfg, tokens, out, ranks)
    run = Run(cfg, tokens, out, ranks)
    if ranks.first:
        for old in run.checkpoints():  # of another run
            old.unlink()
        said = {
            **dataclasses.asdict(cfg),
            "text": text and str(text.resolve()),
            "sha256": tokens.sha256,
            "processes": ranks.world,
        }
        write_atomically(out / "config.json", json.dumps(said, indent=1).encode())
        (out / "log.jsonl").write_text("", encoding="utf-8")
    return run


def was_begun(args: argparse.Namespace) -> bool:
    """Whether there is a checkpoint of a run with these settings, so many steps aside as fit into seconds."""
    try:
        saved = json.loads((args.out / "config.json").read_text(encoding="utf-8"))
    except OSError:
        return False
    asked = dataclasses.asdict(read_config(vars(args)))
    apart = {"steps"} if asked["seconds"] else set()
    same = all(saved.get(name) == value for name, value in asked.items() if name not in apart)
    return same and any((args.out / "checkpoints").glob("step-*.checkpoint"))


def shared_out(cfg: Config, before: int, now: int) -> Config:
    """The settings with which so many processes take the passes of a step that others took."""
    passes = cfg.accumulate * before
    if passes % now:
        raise ValueError(f"{passes} passes of each step cannot be shared out to {now} processes")
    return dataclasses.replace(cfg, accumulate=passes // now)


def resume_run(out: Path, ranks: Ranks) -> Run:
    """A run that goes on, with its own settings; with another number of processes, on the same batches."""
    try:
        saved = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise SystemExit(f"error: --resume {out}: no run there ({error.strerror})") from None
    cfg = shared_out(read_config(saved), saved["processes"], ranks.world)
    tokens = load_tokens(saved["text"] and Path(saved["text"]), cfg.characters, cfg.context, out)
    if tokens.sha256 != saved["sha256"]:
        raise SystemExit(f"error: --resume {out}: {tokens.source} is another text than the run began with")
    run = Run(cfg, tokens, out, ranks)
    run.resume()
    return run


def main(options: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(options)
    if args.threads:
        torch.set_num_threads(args.threads)
    ranks = join_ranks()
    try:
        out = args.resume or (args.out if ranks.agreed(ranks.again and was_begun(args)) else None)
        run = resume_run(out, ranks) if out else start_run(args, ranks)
    except (TextError, ValueError, TypeError) as error:
        raise SystemExit(f"error: {error}") from None
    if ranks.first:
        live, shape = sum(p.numel() for p in run.model.parameters()), run.cfg.shape
        print(
            f"{shape.n_layer} blocks of width {shape.d_model}, {live:,} parameters; "
            f"{len(run.tokens.train):,} tokens of {run.tokens.source}; {run.cfg.steps:,} steps",
            flush=True,
        )
    run.train()
    if ranks.first:
        from gpt_report import show  # drawing libraries stay out of the memory of the training

        show([run.out])
        print(write(run.model, run.tokens, run.cfg.sample, run.cfg.seed))


if __name__ == "__main__":
    main()
