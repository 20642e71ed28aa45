"""A text as numbers, for ``shakespeare.py``: what is trained on, and what is validated with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Data:
    """Characters as numbers: nine tenths to train on, fixed windows of the last tenth to validate with."""

    vocabulary: str
    train: Tensor
    val_x: Tensor
    val_y: Tensor


def min_chars(cfg: Any) -> int:
    """The shortest text whose last tenth holds one window."""
    return 10 * (cfg.context + 1)


def make_data(cfg: Any, characters: str) -> Data:
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
