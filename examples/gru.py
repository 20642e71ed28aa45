"""A language model by characters with a gated recurrent unit: dense, masked and sparse, side by side.

    python examples/gru.py                    # Tiny Shakespeare, four models, a table
    python examples/gru.py --quick            # a few seconds each: too short to learn much
    python examples/gru.py --set text=my.txt --set steps=2000

Input and recurrent weights and the output head are sparse. The recurrent weights are used once for every
character of a window, and growth by gradient sees the sum of all of these gradients. A window begins with the
state that the one before it ended with, which is truncated backpropagation through time.

Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine translation",
EMNLP 2014.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from arms import ARMS, Arm, Result, attach, live_weights, print_results
from options import configured
from text import TextError, load_text
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import sparselab


@dataclass(frozen=True)
class Config:
    """What a run is made of."""

    text: str = ""  # a UTF-8 file; empty: as `text.load_text` finds one
    embedding: int = 64
    width: int = 384
    sparsity: float = 0.9
    steps: int = 150
    batch: int = 32  # parts of the text that are read side by side
    window: int = 64  # characters between two optimizer steps
    validation: int = 32_768  # characters, at most a tenth of the text
    lr: float = 4e-3
    max_norm: float = 1.0  # of the gradient
    update_freq: int = 10  # optimizer steps between two changes of the connections
    drop_fraction: float = 0.3
    seed: int = 0


QUICK = Config(width=64, steps=30, batch=8, window=32, validation=2_048, update_freq=5)


class Data(NamedTuple):
    """Characters as numbers."""

    n_distinct: int
    train: Tensor
    validation: Tensor


def make_data(characters: str, cfg: Config) -> Data:
    codes = np.frombuffer(characters.encode("utf-32-le"), dtype=np.uint32)
    distinct, tokens = np.unique(codes, return_inverse=True)
    n = min(cfg.validation, len(tokens) // 10)
    found = torch.from_numpy(tokens)
    return Data(len(distinct), found[:-n], found[-n:])


def windows(tokens: Tensor, batch: int, window: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and the characters that follow them, (batch, window), which continue those before; one pass."""
    length = (len(tokens) - 1) // batch
    x, y = (tokens[at : at + batch * length].view(batch, length) for at in (0, 1))
    yield from zip(x.split(window, 1), y.split(window, 1), strict=True)


class Model(nn.Module):
    """Embedding, gated recurrent unit and output head."""

    def __init__(self, n_distinct: int, cfg: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_distinct, cfg.embedding)
        self.gru = nn.GRU(cfg.embedding, cfg.width, batch_first=True)
        self.head = nn.Linear(cfg.width, n_distinct)

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        y, state = self.gru(self.embedding(x), state)
        return self.head(y), state


def make_model(arm: Arm, n_distinct: int, cfg: Config) -> Model:
    torch.manual_seed(cfg.seed)
    model = Model(n_distinct, cfg)
    if arm.layer is not None:
        rule = {"layer": arm.layer, "sparsity": cfg.sparsity}
        sparselab.sparsify(model, {"gru.*": rule, "head": rule})
    return model


@torch.no_grad()
def judge(model: Model, tokens: Tensor, cfg: Config) -> float:
    """The loss per character, nats."""
    state, total, count = None, 0.0, 0
    for x, y in windows(tokens, cfg.batch, cfg.window):
        scores, state = model(x, state)
        total += cross_entropy(scores.flatten(0, 1), y.flatten(), reduction="sum").item()
        count += y.numel()
    return total / count


def train(name: str, data: Data, cfg: Config) -> Result:
    arm, start = ARMS[name], time.perf_counter()
    model = make_model(arm, data.n_distinct, cfg)
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr)
    attach(arm, model, optimizer, cfg, stop=cfg.steps * 3 // 4)
    losses: list[float] = []
    reader, state = windows(data.train, cfg.batch, cfg.window), None
    for _ in tqdm(range(cfg.steps), desc=name, leave=False):
        try:
            x, y = next(reader)
        except StopIteration:
            reader, state = windows(data.train, cfg.batch, cfg.window), None
            x, y = next(reader)
        optimizer.zero_grad()
        scores, state = model(x, None if state is None else state.detach())
        loss = cross_entropy(scores.flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.max_norm)
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    validation = judge(model, data.validation, cfg)
    return Result(name, live_weights(model), (validation,), seconds, losses, model)


def main(options: Sequence[str] | None = None) -> list[Result]:
    cfg = configured(__doc__, Config(), QUICK, options)
    torch.set_num_threads(1)  # layers of this size gain nothing from more
    try:
        text = load_text(cfg.text or None, min_chars=20 * cfg.batch * cfg.window)
    except TextError as error:
        raise SystemExit(str(error)) from None
    data = make_data(text.characters, cfg)
    results = [train(name, data, cfg) for name in ARMS]
    title = f"{text.source}: {cfg.steps} steps of {cfg.batch} x {cfg.window} characters"
    print_results(title, results, {"validation loss, nats": ".3f"})
    return results


if __name__ == "__main__":
    main()
