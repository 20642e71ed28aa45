"""What a rule of `sparsify` says of a layer: its kind, how sparse it is, and the kind's own settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from sparselab._names import Pattern
from sparselab.kernels.layout import check_fraction
from sparselab.nn._checks import check_size
from sparselab.nn._layer import SparseLayer
from sparselab.nn.linear import SparseLinear
from sparselab.nn.masked import MaskedLinear

#: A sparsity, or what the docstring of `sparsify` lists.
Given: TypeAlias = float | Mapping[str, Any]


class Kind(NamedTuple):
    """A class of layers, and what a rule may say of it besides ``sparsity`` and ``density``."""

    make: type[SparseLayer]
    settings: tuple[str, ...] = ()


KINDS = {
    "sparse": Kind(SparseLinear),
    "masked": Kind(MaskedLinear),
}

#: What says how sparse a layer is.
_AMOUNTS = ("sparsity", "density", "fan_in")


class Rule(NamedTuple):
    """One rule, checked as far as it can be without a layer."""

    kind: Kind
    #: One of `_AMOUNTS`.
    said: str
    amount: float
    settings: dict[str, Any]

    def check(self, name: str, linear: nn.Linear) -> None:
        """Raise ValueError if the rule asks more of a layer than it has."""
        if self.said == "fan_in" and self.amount > linear.in_features:
            raise ValueError(
                f"fan_in must be at most the {linear.in_features} inputs of {name!r}, got {self.amount}"
            )

    def sparsity(self, linear: nn.Linear) -> float:
        """Of the layer that is made from a dense one."""
        if self.said == "sparsity":
            return self.amount
        return 1 - (self.amount / max(linear.in_features, 1) if self.said == "fan_in" else self.amount)

    def make(self, linear: nn.Linear, init: str = "random", device: str | None = None) -> SparseLayer:
        """The layer: a new one on `device` (that of the dense one by default), or its largest weights."""
        new: Callable[..., SparseLayer] = self.kind.make._like
        if init == "magnitude":
            return self.kind.make.from_dense(linear, self.sparsity(linear), **self.settings)
        return new(linear, self.sparsity(linear), device, **self.settings)

    def sketch(self, linear: nn.Linear) -> SparseLayer:
        """As the new layer of `make`, to read sizes of; takes no memory where the kind allows it."""
        # A MaskedLinear counts its connections in its mask, so it must exist and draw them.
        if self.kind.make is not MaskedLinear:
            return self.make(linear, device="meta")
        with torch.random.fork_rng(devices=()):
            return self.make(linear)


def read_rules(rules: Mapping[Pattern, Given], layer: str) -> dict[Pattern, Rule]:
    """The rules, where a number is a sparsity of the kind named `layer`.

    Raises
    ------
    TypeError, ValueError
        If a kind is unknown, a rule says what its kind does not have, or an amount is missing, said twice or
        out of range.
    """
    read_kind(layer)
    return {pattern: _read(pattern, given, layer) for pattern, given in rules.items()}


def rule_of_saved(state: Mapping[str, torch.Tensor]) -> Given | None:
    """What makes a layer into which the tensors that a layer has saved load; None if that one was dense.

    Its sparsity is any: a layer takes that of what it loads.
    """
    if "mask" in state:
        return {"layer": "masked", "sparsity": 0.9}
    return {"layer": "sparse", "sparsity": 0.9} if "indptr" in state else None


def read_kind(name: object) -> Kind:
    """The kind of that name."""
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"layer must be one of {_quoted(KINDS)}, got {name!r}")
    return KINDS[name]


def _read(pattern: Pattern, given: Given, default: str) -> Rule:
    said = dict(given) if isinstance(given, Mapping) else {"sparsity": given}
    name = said.pop("layer", default)
    kind = read_kind(name)
    known = ("sparsity", "density", *kind.settings)
    if unknown := [key for key in said if key not in known]:
        raise ValueError(
            f"rules must say no more of a layer of kind {name!r} than {_quoted(('layer', *known))}, got "
            f"{unknown[0]!r} for {pattern!r}"
        )
    amounts = [key for key in _AMOUNTS if key in known]
    found = [key for key in amounts if key in said]
    if len(found) != 1:
        raise ValueError(
            f"rules must say exactly one of {_quoted(amounts)} of a layer of kind {name!r}, got "
            f"{_quoted(found) or 'none'} for {pattern!r}"
        )
    amount: Any = said.pop(found[0])
    if found[0] == "fan_in":
        amount = check_size("fan_in", amount)
    else:
        check_fraction(found[0], amount)
    return Rule(kind, found[0], amount, said)


def _quoted(names: Any) -> str:
    return ", ".join(f'"{name}"' for name in names)
