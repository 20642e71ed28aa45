"""RoBERTa and GPT-2 of transformers on the bytes of Tiny Shakespeare: dense, and sparse from the first step.

    pip install -e '.[examples,transformers]'
    python examples/transformers_models.py                # both models in their real sizes
    python examples/transformers_models.py --models gpt2 --layers 4 --width 384 --steps 500
    python examples/transformers_models.py --quick --layer fan_in

Models are made from their configurations and a byte is a token, so nothing but the text is downloaded. The
Trainer of Hugging Face trains both arms of a model on the same batches, the sparse one with RigL. Each arm
has a process of its own, so that its resident memory is its own, and they take their steps in turns, so that
whatever else the machine does slows both.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers
from options import at_least_one
from resident import peak_resident_bytes, resident_bytes
from text import Text, TextError, load_text
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import sparselab
from sparselab.integrations.transformers import SparsityCallback

ARMS = ("dense", "sparse")

#: Kinds of sparse layers, each with the settings it is used with here.
LAYERS: dict[str, dict[str, Any]] = {"sparse": {}, "fan_in": {}, "block": {"block_shape": (4, 4)}}

#: Byte b is token b + 2.
PAD, MASK, FIRST_BYTE, VOCABULARY = 0, 1, 2, 258


@dataclass(frozen=True)
class Config:
    """What one may want to change; the sizes are those of RoBERTa-base and of GPT-2 small."""

    layers: int = 12
    width: int = 768
    context: int = 128
    batch: int = 4
    steps: int = 20
    sparsity: float = 0.9
    layer: str = "sparse"
    lr: float = 5e-4
    warmup: int = 5
    drop_fraction: float = 0.3
    update_every: int = 5
    untimed_steps: int = 3
    masked_share: float = 0.15
    validation_windows: int = 16
    new_tokens: int = 200
    seed: int = 1
    threads: int = 0  # as torch chooses


QUICK = Config(
    layers=2, width=64, context=32, steps=6, update_every=2, untimed_steps=1, validation_windows=4,
    new_tokens=20,
)  # fmt: skip


# Models


def make_roberta(cfg: Config) -> nn.Module:
    return transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(
            vocab_size=VOCABULARY, hidden_size=cfg.width, num_hidden_layers=cfg.layers,
            num_attention_heads=max(1, cfg.width // 64), intermediate_size=4 * cfg.width,
            max_position_embeddings=cfg.context + 1, pad_token_id=PAD, bos_token_id=PAD, eos_token_id=PAD,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def make_gpt2(cfg: Config) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=cfg.width, n_layer=cfg.layers, n_head=max(1, cfg.width // 64),
            pad_token_id=PAD, bos_token_id=PAD, eos_token_id=PAD,
            embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Story:
    """A model, the layers of it that become sparse, and whether it fills in bytes or writes on."""

    make: Callable[[Config], nn.Module]
    sparse: tuple[str | re.Pattern[str], ...]
    masked: bool


STORIES = {
    # The patterns that the README of pytorch_block_sparse has for RoBERTa.
    "roberta": Story(
        make_roberta,
        tuple(
            re.compile(rf"roberta\.encoder\.layer\.[0-9]+\.{name}")
            for name in (r"intermediate\.dense", r"output\.dense", r"attention\.output\.dense")
        ),
        masked=True,
    ),
    # Layers of the class Conv1D.
    "gpt2": Story(make_gpt2, ("*.c_attn", "*.c_proj", "*.c_fc"), masked=False),
}


def make_model(cfg: Config, story: Story, arm: str) -> nn.Module:
    """The model of one arm; outputs of sparse layers start with the variance of the dense ones."""
    torch.manual_seed(cfg.seed)
    model = story.make(cfg)
    if arm == "dense":
        return model
    rule = {"layer": cfg.layer, "sparsity": cfg.sparsity, **LAYERS[cfg.layer]}
    rules = dict.fromkeys(story.sparse, rule)
    names = [each.name for each in sparselab.plan_sparsify(model, rules).layers]
    std = {name: model.get_submodule(name).weight.std().item() for name in names}
    sparselab.sparsify(model, rules)
    with torch.no_grad():
        for name, layer in sparselab.nn.find_sparse(model):
            # Drawn with the standard deviation 1 / sqrt(3 fan_in), each output with its own fan-in.
            layer.stored.mul_(std[name] * math.sqrt(3 * layer.shape[1]))
            layer.bias.zero_()
    return model


def make_algorithm(cfg: Config) -> sparselab.RigL:
    last = max(1, 3 * cfg.steps // 4)  # the last quarter trains a settled topology
    return sparselab.RigL(
        drop_fraction=cfg.drop_fraction,
        update_freq=cfg.update_every,
        stop=last,
        scope="row" if cfg.layer == "fan_in" else "layer",
        seed=cfg.seed,
    )


# Data


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows of the text that do not overlap, evenly spread, as tokens and labels."""

    def __init__(self, text: bytes, cfg: Config, masked: bool, most: int | None = None) -> None:
        self.tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long() + FIRST_BYTE
        self.cfg, self.masked = cfg, masked
        available = len(text) // cfg.context
        self.length = available if most is None else min(most, available)
        self.stride = available // max(self.length, 1) * cfg.context

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index * self.stride :][: self.cfg.context]
        if not self.masked:
            return {"input_ids": tokens, "labels": tokens}
        draw = torch.Generator().manual_seed(self.cfg.seed + index)
        hidden = torch.rand(len(tokens), generator=draw) < self.cfg.masked_share
        hidden[index % len(tokens)] = True  # so that there is one
        return {"input_ids": tokens.where(~hidden, MASK), "labels": tokens.where(hidden, -100)}


def split(text: bytes) -> tuple[bytes, bytes]:
    """Nine tenths to train on, the last tenth to validate with."""
    at = len(text) * 9 // 10
    return text[:at], text[at:]


def to_text(tokens: Tensor) -> str:
    return bytes((tokens - FIRST_BYTE).tolist()).decode("utf-8", "replace")


# One arm, in a process of its own


class Turns(TrainerCallback):
    """Takes a step when it is told to and answers with its seconds; reports the memory of the last step."""

    def __init__(self, turn: Connection) -> None:
        self.turn = turn
        self.memory: sparselab.nn.MemoryReport | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.turn.recv()
        self.start = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == args.max_steps:  # gradients are still there
            optimizer = kwargs["optimizer"]
            self.memory = sparselab.memory_report(kwargs["model"], getattr(optimizer, "optimizer", optimizer))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.turn.send(time.perf_counter() - self.start)


def load_code(arm: str) -> None:
    """Train one small layer, so that libraries are loaded and kernels compiled."""
    layer = nn.Linear(64, 64) if arm == "dense" else sparselab.SparseLinear(64, 64)
    layer(torch.zeros(32, 64, requires_grad=True)).sum().backward()


def make_trainer(cfg: Config, story: Story, model: nn.Module, text: bytes, folder: str) -> Trainer:
    train, validation = split(text)
    arguments = TrainingArguments(
        output_dir=folder, max_steps=cfg.steps, per_device_train_batch_size=cfg.batch,
        per_device_eval_batch_size=cfg.batch, learning_rate=cfg.lr, warmup_steps=cfg.warmup,
        weight_decay=0.01, optim="adamw_torch", seed=cfg.seed, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        prediction_loss_only=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments,
        train_dataset=Windows(train, cfg, story.masked),
        eval_dataset=Windows(validation, cfg, story.masked, cfg.validation_windows),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def run_arm(cfg: Config, name: str, arm: str, text: bytes, turn: Connection) -> None:
    """Train one arm in turns, and send what came of it."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    transformers.logging.set_verbosity_error()
    load_code(arm)
    before = resident_bytes()
    story = STORIES[name]
    model = make_model(cfg, story, arm)
    turns = Turns(turn)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(cfg, story, model, text, folder)
        trainer.add_callback(turns)
        if arm == "sparse":
            trainer.add_callback(SparsityCallback(make_algorithm(cfg)))
        trainer.train()
        resident, peak = resident_bytes(), peak_resident_bytes()
        turn.recv()
        validation = trainer.evaluate()["eval_loss"]
    assert turns.memory is not None
    topology = sum(
        buffer.nbytes for _, layer in sparselab.nn.find_sparse(model) for buffer in layer.buffers()
    )
    result = {
        **dataclasses.asdict(turns.memory),
        "training_bytes": turns.memory.training_bytes,
        "topology_bytes": topology,
        "weight_bytes": turns.memory.weight_bytes - topology,
        "resident_before": before,
        "resident_growth": resident - before,
        "resident_peak": peak,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "validation": validation,
        "threads": torch.get_num_threads(),
    }
    turn.send(result if story.masked else {**result, **write(cfg, model)})


@torch.inference_mode()
def write(cfg: Config, model: nn.Module) -> dict[str, Any]:
    """What the model writes after a line break, and the milliseconds that a byte took."""
    torch.manual_seed(cfg.seed)
    prompt = torch.full((1, 1), ord("\n") + FIRST_BYTE)
    start = time.perf_counter()
    tokens = model.eval().generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=0.8,
        max_new_tokens=cfg.new_tokens, suppress_tokens=[PAD, MASK],
    )  # fmt: skip
    seconds = time.perf_counter() - start
    return {"sample": to_text(tokens[0, 1:]), "token_ms": 1000 * seconds / cfg.new_tokens}


# Both arms


def run_model(cfg: Config, name: str, text: bytes) -> dict[str, dict[str, Any]]:
    """Train both arms of a model, one step of each at a time; what came of them, with each step's seconds."""
    spawn = multiprocessing.get_context("spawn")
    arms: dict[str, tuple[Any, Connection]] = {}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    try:
        for arm in ARMS:
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=run_arm, args=(cfg, name, arm, text, theirs), daemon=True)
            process.start()
            theirs.close()
            arms[arm] = process, ours
        for _ in tqdm(range(cfg.steps), desc=name, unit="step of each", dynamic_ncols=True):
            for arm, (_, turn) in arms.items():
                seconds[arm].append(_take(arm, turn))
        return {arm: {**_take(arm, turn), "seconds": seconds[arm]} for arm, (_, turn) in arms.items()}
    finally:
        for process, _ in arms.values():
            process.terminate()
            process.join()


def _take(arm: str, turn: Connection) -> Any:
    """Let an arm do its next piece of work, and return its answer."""
    try:
        turn.send("go")
        return turn.recv()
    except (EOFError, OSError):
        raise SystemExit(f"the {arm} arm failed; its message is above") from None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train RoBERTa and GPT-2 dense and sparse, and compare.")
    parser.add_argument(
        "--models", nargs="+", choices=list(STORIES), default=list(STORIES), help="default: both"
    )
    parser.add_argument("--layers", type=at_least_one, help=f"default: {Config.layers}")
    parser.add_argument("--width", type=at_least_one, help=f"default: {Config.width}")
    parser.add_argument("--steps", type=at_least_one, help=f"of each arm (default: {Config.steps})")
    parser.add_argument("--batch", type=at_least_one, help=f"default: {Config.batch}")
    parser.add_argument("--context", type=at_least_one, help=f"bytes of a window (default: {Config.context})")
    parser.add_argument("--sparsity", type=float, help=f"default: {Config.sparsity}")
    parser.add_argument("--layer", choices=list(LAYERS), help=f"kind of layer (default: {Config.layer})")
    parser.add_argument("--lr", type=float, help=f"of both arms (default: {Config.lr})")
    parser.add_argument("--seed", type=int, help=f"default: {Config.seed}")
    parser.add_argument("--threads", type=at_least_one, help="default: as torch chooses")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to train on (default: Tiny Shakespeare)")
    parser.add_argument("--quick", action="store_true", help="two narrow layers and a few steps")
    return parser


def read_options(options: Sequence[str] | None) -> tuple[Config, list[str], Text]:
    args = vars(make_parser().parse_args(options))
    cfg = QUICK if args.pop("quick") else Config()
    models, file = args.pop("models"), args.pop("text")
    cfg = dataclasses.replace(cfg, **{name: value for name, value in args.items() if value is not None})
    try:
        return cfg, models, load_text(file, min_chars=10 * cfg.context)
    except TextError as error:
        raise SystemExit(f"error: {error}") from None


def main(options: Sequence[str] | None = None) -> None:
    from transformers_report import show

    cfg, models, text = read_options(options)
    print(f"Text: {text.source}", flush=True)
    for name in models:
        show(name, run_model(cfg, name, text.characters.encode("utf-8")), cfg.untimed_steps)


if __name__ == "__main__":
    main()
