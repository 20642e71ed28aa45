"""Which layers of a model a set of rules makes sparse, and which it leaves dense, with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from sparselab._names import Key, Keys, as_keys, first_keys, listed, match
from sparselab.nn.layers.base import find_sparse
from sparselab.nn.layers.dense import DenseLayer, dense_parts
from sparselab.nn.models.rules import Rule, Rules, read_rules
from sparselab.nn.models.weights import Weights, find_weights


@dataclass(frozen=True)
class LeftLayer:
    """What rules match and that stays dense: its name, its class, why, its Parameters' entries and bytes."""

    name: str
    kind: str
    reason: str
    parameters: int
    bytes: int

    def __str__(self) -> str:
        return f"{_quoted([self.name])} {self.reason}"


@dataclass(frozen=True)
class Choice:
    """What the first key that matches it says of each layer.

    Attributes
    ----------
    layers : dict
        What becomes sparse: layers by name, with their rules.
    left : tuple of LeftLayer
        What has a rule and stays dense.
    told : tuple of LeftLayer
        What of that comes as a surprise.
    dense : tuple of Weights
        All that stays dense of what the keys match, also by a rule of None.
    """

    layers: dict[str, tuple[DenseLayer, Rule]]
    left: tuple[LeftLayer, ...]
    told: tuple[LeftLayer, ...]
    dense: tuple[Weights, ...]

    def warn(self, what: str, instead: str) -> None:
        """Tell of what is left, if there is anything: no layer stays dense in silence."""
        if self.told:
            warnings.warn(
                f"{what} leaves layers that the rules match as they are: {_joined(self.told)}. {instead} "
                "leaves a layer dense without this warning.",
                stacklevel=3,
            )


def choose(model: nn.Module, rules: Rules, layer: str) -> Choice:
    """The layers that match, by name, each with the rule of the first key that does.

    Layers that cannot be swapped stay dense where anything but their very name matches them. A rule of None
    says that what its key matches shall stay dense.

    Raises
    ------
    TypeError, ValueError
        If the model is itself such a layer, a key or a rule is none, a key matches nothing, a str that is the
        name of a layer names one that cannot be swapped, or a rule asks of a layer what it does not have. And
        if rules ask for sparse layers and there is none.
    """
    _require_layers(model)
    weights = find_weights(model)
    read = read_rules(rules, layer, weights)
    choice = _choose("rules", weights, read, _match("rules", read, weights, model))
    for name, (each, rule) in choice.layers.items():
        rule.check(name, each.linear)
    if not choice.layers and any(rule is not None for rule in read.values()):
        raise ValueError(
            "rules must make at least one layer sparse, got none: "
            + (_joined(choice.left) or "a rule of None comes first for all that match")
        )
    return choice


def select(model: nn.Module, include: Keys, exempt: Keys) -> Choice:
    """As `choose`, for layers with single connections that match one of `include` and none of `exempt`."""
    _require_layers(model)
    weights = find_weights(model)
    wanted, unwanted = as_keys("include", include), as_keys("exempt", exempt)
    found = {
        key: names
        for argument, keys in (("exempt", unwanted), ("include", wanted))
        for key, names in _match(argument, keys, weights, model).items()
    }
    rule = Rule("sparse", "sparsity", 0.0, {})
    return _choose("include", weights, {key: None if key in unwanted else rule for key in found}, found)


def _require_layers(model: nn.Module) -> None:
    if any(dense_parts(model)):
        raise ValueError(
            f"model must contain the layers to swap, got a {type(model).__name__} itself, which cannot be "
            "swapped in place; use SparseLinear.from_dense or that of its kind"
        )


def _match(
    argument: str, keys: Iterable[Key], weights: Mapping[str, Weights], model: nn.Module
) -> dict[Key, list[str]]:
    sparse = [name for name, _ in find_sparse(model)]
    already = f"; sparse already, until sparselab.densify(model): {listed(sparse)}" if sparse else ""
    owners = {name: each.owner for name, each in weights.items()}
    return match(argument, keys, owners, "dense layers", already)


def _choose(
    argument: str,
    weights: Mapping[str, Weights],
    rules: Mapping[Key, Rule | None],
    found: Mapping[Key, list[str]],
) -> Choice:
    for name, each in weights.items():
        if each.reason is not None and rules.get(name) is not None:
            raise ValueError(
                f"{argument} must not name a layer that cannot be swapped, got {name!r} {each.reason}; "
                "change that first, or leave the layer dense"
            )
    apart = {key for key, names in found.items() if all(weights[name].apart for name in names)}
    meant = first_keys(
        {
            key: [n for n in names if key in apart or rules[key] is None or not weights[n].apart]
            for key, names in found.items()
        }
    )
    first = {**first_keys(found), **meant}
    pairs = _rules_of_pairs(argument, weights, {n: rules[key] for n, key in meant.items() if key in apart})
    layers: dict[str, tuple[DenseLayer, Rule]] = {}
    left: dict[str, LeftLayer] = {}
    for name, each in weights.items():
        pair = each.tied_to or name
        rule = pairs[pair] if pair in pairs else rules[first[name]] if name in first else None
        if rule is None or (pair in pairs and each.tied_to):  # goes with the embedding
            continue
        reason = each.reason or ("" if pair in pairs or name in meant else each.apart)
        if not reason and each.layer is not None:
            # The check of a rule refuses what is named outright.
            if rule.fits(each.layer.linear) or first.get(name, name) == name:
                layers[name] = each.layer, rule
                continue
            reason = f"is of class {type(each.owner).__name__}, which has no layer of kind {rule.kind!r}"
        left[name] = _left(each, reason)
    working = {first[name] for name in layers if name in first}
    return Choice(
        layers,
        tuple(left.values()),
        tuple(each for name, each in left.items() if not (weights[name].aside and first[name] in working)),
        tuple(
            each for name, each in weights.items() if name in first and (each.tied_to or name) not in layers
        ),
    )


def _rules_of_pairs(
    argument: str, weights: Mapping[str, Weights], rules: Mapping[str, Rule | None]
) -> dict[str, Rule | None]:
    """The rule of each embedding and what is tied to it, by the name of the embedding, where one has a rule.

    Parameters
    ----------
    argument : str
        What errors call the keys.
    weights : mapping
    rules : mapping
        Of layers that are meant by a key of their own, by name.
    """
    found: dict[str, Rule | None] = {}
    said: dict[str, str] = {}
    tied = {each.tied_to for each in weights.values() if each.tied_to}
    for name, rule in rules.items():
        pair = weights[name].tied_to or name
        if pair not in tied:
            continue
        if pair in found and found[pair] != rule:
            raise ValueError(
                f"{argument} must say the same of tied layers, got different rules for {said[pair]!r} and "
                f"{name!r}, which share one weight; a rule for either is one for both"
            )
        found[pair], said[pair] = rule, name
    return found


def _left(weights: Weights, reason: str) -> LeftLayer:
    numbers = zip(*weights.tensors.values(), strict=True)
    parameters, size = (sum(each) for each in numbers) if weights.tensors else (0, 0)
    return LeftLayer(weights.name, type(weights.owner).__name__, reason, parameters, size)


def _joined(left: Iterable[LeftLayer]) -> str:
    """All of them for a message, those of one reason together."""
    names: dict[str, list[str]] = {}
    for each in left:
        names.setdefault(each.reason, []).append(each.name)
    return "; ".join(f"{_several(same)} {reason}" for reason, same in names.items())


def _several(names: list[str]) -> str:
    if len(names) == 1:
        return _quoted(names)
    return f"{_quoted(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''} each"


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) if name else "the model" for name in names)
