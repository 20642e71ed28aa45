"""What is known of an architecture: how it is made, what it is given, which layers become sparse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Sizes of the smallest inputs: entries of a vocabulary, tokens of a text, pixels of a side.
VOCABULARY, LENGTH, PIXELS = 40, 8, 32
#: What nearly all architectures are made sparse by.
RULES = 0.8


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes
    ----------
    name : str
    library : str
        That it is of, which must be installed.
    make : callable
        The dense model, with random weights.
    inputs : callable
        Keyword arguments of its call; the same ones every time.
    rules : as of `sparselab.sparsify`
    generate : mapping, optional
        What ``model.generate`` is given besides its prompt; None for a model that does not generate.
    prompt : callable, optional
        Keyword arguments that ``model.generate`` begins with.
    """

    name: str
    library: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    rules: Any = RULES
    generate: Mapping[str, Any] | None = None
    prompt: Callable[[], dict[str, Any]] | None = None


#: By name, in the order of the table.
CASES: dict[str, Case] = {}


def add(case: Case) -> None:
    """Put a case into the table."""
    assert case.name not in CASES, case.name
    CASES[case.name] = case


def tokens(n: int = LENGTH, seed: int = 0) -> Tensor:
    """int64 (2, n), none of the special ones."""
    return torch.randint(4, VOCABULARY, (2, n), generator=torch.Generator().manual_seed(seed))


def image(pixels: int = PIXELS, channels: int = 3) -> Tensor:
    """float32 (2, channels, pixels, pixels)."""
    return torch.rand(2, channels, pixels, pixels, generator=torch.Generator().manual_seed(0))


def noise(*shape: int) -> Tensor:
    """float32 of that shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
