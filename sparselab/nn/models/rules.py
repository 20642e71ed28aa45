"""What a rule of `sparsify` says of a layer: its kind, how sparse it is, and the kind's own settings."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from sparselab._names import Key, told
from sparselab.kernels.arrays import check_fraction, n_connections
from sparselab.nn.layers.base import SparseLayer
from sparselab.nn.layers.kinds import LayerKind, find_kind, kind_names, kinds_named, recognise
from sparselab.nn.storage.checks import check_size, warn_if_none

#: A sparsity, or what the docstring of `sparsify` lists; None leaves a layer dense.
Given: TypeAlias = float | Mapping[str, Any] | None

#: A sparsity for everything, or rules by key. A mapping is invariant in its keys: one of str alone would not
#: be one of `Key`.
Rules: TypeAlias = float | Mapping[Any, Given]

#: What says how sparse a layer is.
_AMOUNTS = ("sparsity", "density", "fan_in")


class Rule(NamedTuple):
    """One rule, checked as far as it can be without a layer."""

    #: Name of the kind.
    kind: str
    #: One of `_AMOUNTS`.
    said: str
    amount: float
    settings: dict[str, Any]

    def fits(self, dense: nn.Module) -> bool:
        """Whether its kind has a layer that replaces a dense one."""
        return find_kind(self.kind, dense) is not None

    def check(self, name: str, dense: nn.Module) -> None:
        """Raise ValueError if the rule asks of a layer what it does not have."""
        if not self.fits(dense):
            known = [each.__name__ for kind in kinds_named(self.kind) for each in kind.dense_types]
            raise ValueError(
                f"a layer of kind {self.kind!r} must replace one of {', '.join(known)}, got {name!r}, a "
                f"{type(dense).__name__}"
            )
        columns = _columns(dense)
        if self.said == "fan_in" and self.amount > columns:
            raise ValueError(f"fan_in must be at most the {columns} inputs of {name!r}, got {self.amount}")

    def sparsity(self, dense: nn.Module) -> float:
        """Of the layer that is made from a dense one."""
        if self.said == "sparsity":
            return self.amount
        return 1 - (self.amount / max(_columns(dense), 1) if self.said == "fan_in" else self.amount)

    def make(self, dense: nn.Module, init: str = "random", device: str | None = None) -> SparseLayer:
        """The layer: a new one on `device` (that of the dense one by default), or its largest weights."""
        kind = self._find(dense)
        sparsity = self.sparsity(dense)
        amount: dict[str, Any] = {"sparsity": sparsity}
        if "fan_in" in kind.settings:
            grid = 1, _columns(dense)
            amount = {"fan_in": n_connections(grid, sparsity)}
            warn_if_none(amount["fan_in"], grid, 1.0 if self.said == "fan_in" else sparsity)
        cls: Any = kind.cls
        if init == "magnitude":
            new: SparseLayer = cls.from_dense(dense, **amount, **self.settings)
        else:
            new = cls.like(dense, device=device, **amount, **self.settings)
        return new

    def sketch(self, dense: nn.Module) -> SparseLayer:
        """As the new layer of `make`, to read sizes of; takes no memory where the kind allows it."""
        try:
            return self.make(dense, device="meta")
        except NotImplementedError:
            # Such as a masked layer, which counts its connections in its mask: it must exist and draw them.
            with torch.random.fork_rng(devices=()):
                return self.make(dense)

    def _find(self, dense: nn.Module) -> LayerKind:
        kind = find_kind(self.kind, dense)
        assert kind is not None, "check was called before"
        return kind


def _columns(dense: Any) -> int:
    """Inputs of each output."""
    return math.prod(dense.weight.shape[1:])


def read_rules(rules: Rules, layer: str, names: Collection[str]) -> dict[Key, Rule | None]:
    """The rules, where a number is a sparsity of the kind named `layer`, and None leaves a layer dense.

    Parameters
    ----------
    rules : float or mapping
        A number is that of all layers.
    layer : str
    names : collection of str
        Of the layers of the model, by which a mapping of rules is told from a rule.

    Raises
    ------
    TypeError, ValueError
        If the rules are none, a kind is unknown, a rule says what its kind does not have, or an amount is
        missing, said twice or out of range.
    """
    kinds_named(layer)
    if not isinstance(rules, Mapping):
        check_fraction("rules, if they are no mapping,", rules)
        rules = {"*": rules}
    if rules.keys() <= _words() and not rules.keys() <= set(names):
        raise ValueError(
            f"rules must map layers to what they become, got a rule alone; for all layers, write "
            f'{{"*": {dict(rules)}}}'
        )
    return {key: None if given is None else _read(key, given, layer) for key, given in rules.items()}


def _words() -> set[str]:
    """The words that a rule may say."""
    return {
        "layer",
        *_AMOUNTS,
        *(each for name in kind_names() for kind in kinds_named(name) for each in kind.settings),
    }


def rule_of_saved(state: Mapping[str, torch.Tensor]) -> Given:
    """What makes a layer into which the tensors that a layer has saved load; None if that one was dense.

    Its sparsity is any: a layer takes that of what it loads.
    """
    found = recognise(state)
    if found is None:
        return None
    kind, settings = found
    return {"layer": kind.name, "sparsity": 0.9, **settings}


def layers_of_saved(state: Mapping[str, torch.Tensor]) -> dict[str, Given]:
    """The sparse layers of a model whose ``state_dict`` was saved, by name: `rule_of_saved` of each."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        layer, _, part = name.rpartition(".")
        layers.setdefault(layer, {})[part] = tensor
    rules = {layer: rule_of_saved(parts) for layer, parts in layers.items()}
    return {layer: rule for layer, rule in rules.items() if rule is not None}


def _read(key: Key, given: float | Mapping[str, Any], default: str) -> Rule:
    said: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"sparsity": given}
    name = said.pop("layer", default)
    settings = dict.fromkeys(setting for kind in kinds_named(name) for setting in kind.settings)
    known = ("sparsity", "density", *settings)
    if unknown := [key for key in said if key not in known]:
        raise ValueError(
            f"rules must say no more of a layer of kind {name!r} than {_quoted(('layer', *known))}, got "
            f"{unknown[0]!r} for {told(key)}"
        )
    amounts = [key for key in _AMOUNTS if key in known]
    found = [key for key in amounts if key in said]
    if len(found) != 1:
        raise ValueError(
            f"rules must say exactly one of {_quoted(amounts)} of a layer of kind {name!r}, got "
            f"{_quoted(found) or 'none'} for {told(key)}"
        )
    amount: Any = said.pop(found[0])
    if found[0] == "fan_in":
        amount = check_size("fan_in", amount)
    else:
        check_fraction(found[0], amount)
    return Rule(name, found[0], amount, said)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
