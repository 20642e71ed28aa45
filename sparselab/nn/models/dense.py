"""Which layers of a model a set of rules makes sparse, and which it leaves dense, with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from sparselab._names import Key, Keys, as_keys, first_keys, match
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
    choice = _choose("rules", weights, read, match("rules", read, _owners(weights), "dense layers"))
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
        for key, names in match(argument, keys, _owners(weights), "dense layers").items()
    }
    rule = Rule("sparse", "sparsity", 0.0, {})
    return _choose("include", weights, {key: None if key in unwanted else rule for key in found}, found)


def _require_layers(model: nn.Module) -> None:
    if any(dense_parts(model)):
        raise ValueError(
            f"model must contain the layers to swap, got a {type(model).__name__} itself, which cannot be "
            "swapped in place; use SparseLinear.from_dense or that of its kind"
        )


def _owners(weights: Mapping[str, Weights]) -> dict[str, nn.Module]:
    return {name: each.owner for name, each in weights.items()}


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
    first = first_keys(found)
    layers: dict[str, tuple[DenseLayer, Rule]] = {}
    left: dict[str, LeftLayer] = {}
    for name, each in weights.items():
        rule = rules[first[name]] if name in first else None
        if rule is None:
            continue
        reason = each.reason
        if reason is None and each.layer is not None:
            # The check of a rule refuses what is named outright.
            if first[name] == name or rule.fits(each.layer.linear):
                layers[name] = each.layer, rule
                continue
            reason = f"is of class {type(each.owner).__name__}, which has no layer of kind {rule.kind!r}"
        left[name] = _left(each, str(reason))
    working = {first[name] for name in layers}
    return Choice(
        layers,
        tuple(left.values()),
        tuple(each for name, each in left.items() if not (weights[name].aside and first[name] in working)),
        tuple(each for name, each in weights.items() if name in first and name not in layers),
    )


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
