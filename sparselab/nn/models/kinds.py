"""What a rule of `sparsify` says of a layer: its kind, how sparse it is, and the kind's own settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from sparselab._names import Pattern
from sparselab.kernels.arrays import check_fraction, n_connections
from sparselab.nn.layers.base import SparseLayer
from sparselab.nn.layers.block import BlockSparseLinear
from sparselab.nn.layers.conv import SparseConv2d
from sparselab.nn.layers.fan_in import FanInLinear
from sparselab.nn.layers.linear import SparseLinear
from sparselab.nn.layers.masked import MaskedConv2d, MaskedLayer, MaskedLinear
from sparselab.nn.storage.checks import check_size

#: A sparsity, or what the docstring of `sparsify` lists.
Given: TypeAlias = float | Mapping[str, Any]
Dense: TypeAlias = nn.Linear | nn.Conv2d


class Kind(NamedTuple):
    """Classes of layers, and what a rule may say of them besides ``sparsity`` and ``density``."""

    linear: type[SparseLayer]
    settings: tuple[str, ...] = ()
    convolution: type[SparseLayer] | None = None


KINDS = {
    "sparse": Kind(SparseLinear, (), SparseConv2d),
    "masked": Kind(MaskedLinear, (), MaskedConv2d),
    "fan_in": Kind(FanInLinear, ("fan_in",), SparseConv2d),
    "block": Kind(BlockSparseLinear, ("block_shape",)),
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

    def check(self, name: str, dense: Dense) -> None:
        """Raise ValueError if the rule asks of a layer what it does not have."""
        columns = _columns(dense)
        if self.said == "fan_in" and self.amount > columns:
            raise ValueError(f"fan_in must be at most the {columns} inputs of {name!r}, got {self.amount}")
        if isinstance(dense, nn.Conv2d) and self.kind.convolution is None:
            raise ValueError(
                f"{self.kind.linear.__name__} must replace a linear layer, got {name!r}, a Conv2d"
            )

    def sparsity(self, dense: Dense) -> float:
        """Of the layer that is made from a dense one."""
        if self.said == "sparsity":
            return self.amount
        return 1 - (self.amount / max(_columns(dense), 1) if self.said == "fan_in" else self.amount)

    def make(self, dense: Dense, init: str = "random", device: str | None = None) -> SparseLayer:
        """The layer: a new one on `device` (that of the dense one by default), or its largest weights."""
        kind: Any = self._class(dense)
        sparsity, settings = self.sparsity(dense), self.settings
        if kind is SparseConv2d and "fan_in" in self.kind.settings:
            settings = {**settings, "fan_in": n_connections((1, _columns(dense)), sparsity)}
        new: SparseLayer
        if init == "magnitude":
            new = kind.from_dense(dense, None if "fan_in" in settings else sparsity, **settings)
        else:
            new = kind.like(dense, None if "fan_in" in settings else sparsity, device, **settings)
        return new

    def sketch(self, dense: Dense) -> SparseLayer:
        """As the new layer of `make`, to read sizes of; takes no memory where the kind allows it."""
        # A masked layer counts its connections in its mask, so it must exist and draw them.
        if not issubclass(self._class(dense), MaskedLayer):
            return self.make(dense, device="meta")
        with torch.random.fork_rng(devices=()):
            return self.make(dense)

    def _class(self, dense: Dense) -> type[SparseLayer]:
        if not isinstance(dense, nn.Conv2d):
            return self.kind.linear
        assert self.kind.convolution is not None
        return self.kind.convolution


def _columns(dense: Dense) -> int:
    """Inputs of each output."""
    return math.prod(dense.weight.shape[1:])


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
    if "indices" not in state:
        return None
    block_shape = tuple(state["weight_values"].shape[1:])
    if block_shape != (1, 1):
        return {"layer": "block", "sparsity": 0.9, "block_shape": block_shape}
    return {"layer": "sparse" if "indptr" in state else "fan_in", "sparsity": 0.9}


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
