"""Which layers of a model a set of rules makes sparse, and which it leaves dense, with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn

from sparselab._names import Pattern, first_match, listed, matches
from sparselab.nn.layers.dense import DenseLayer, dense_base, dense_parts, dense_type
from sparselab.nn.layers.extras import extras

Value = TypeVar("Value")


@dataclass(frozen=True)
class LeftLayer:
    """A layer that rules match and that stays dense: its name, its class, and why."""

    name: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name!r} {self.reason}"


@dataclass(frozen=True)
class Choice(Generic[Value]):
    """Layers by name, each with the value of the first pattern that matches it; and those that are left."""

    layers: dict[str, tuple[DenseLayer, Value]]
    left: tuple[LeftLayer, ...]

    def warn(self, what: str) -> None:
        """Tell of what is left, if there is anything: nothing stays dense in silence."""
        if self.left:
            warnings.warn(
                f"{what} leaves layers that the rules match as they are: {'; '.join(map(str, self.left))}. "
                'A rule of None, such as {"name": None}, leaves a layer dense without this warning.',
                stacklevel=3,
            )


def find_dense(model: nn.Module) -> dict[str, DenseLayer]:
    """The layers by qualified name, in the order of the model; those of an attention are its projections."""
    return {
        f"{name}.{layer.part}".strip("."): layer
        for name, module in model.named_modules()
        for layer in dense_parts(module)
    }


def choose(model: nn.Module, rules: Mapping[Pattern, Value | None]) -> Choice[Value]:
    """The layers that match, by name, each with the value of the first pattern that does.

    Layers that cannot be swapped stay dense where a glob or an expression matches them. A value of None says
    that what its pattern matches shall stay dense.

    Raises
    ------
    ValueError
        If the model is itself such a layer, a pattern matches none that can be swapped, or a str that is the
        name of a layer names one that cannot.
    """
    if any(dense_parts(model)):
        raise ValueError(
            f"model must contain the layers to swap, got a {type(model).__name__} itself, which cannot be "
            "swapped in place; use SparseLinear.from_dense or that of its kind"
        )
    layers = find_dense(model)
    stuck = {each.name: each for each in _find_stuck(model, layers)}
    able = [name for name in layers if name not in stuck]
    for pattern, value in rules.items():
        if pattern in stuck and value is not None:
            raise ValueError(
                f"rules must not name a layer that cannot be swapped, got {stuck[str(pattern)]}; "
                "change that first, or leave the layer dense"
            )
        wanted = able if value is not None else [*able, *stuck]
        if not any(matches(name, pattern) for name in wanted):
            refused = "; ".join(str(each) for name, each in stuck.items() if matches(name, pattern))
            raise ValueError(
                f"rules must match at least one layer each, got {pattern!r} without one; "
                f"those of the model that can be swapped are: {listed(able)}"
                + (f"; of those that match, {refused}" if refused else "")
            )
    chosen: dict[str, tuple[DenseLayer, Value]] = {}
    left = []
    for name in (*layers, *(name for name in stuck if name not in layers)):
        first = first_match(name, rules)
        value = None if first is None else rules[first]
        if value is None:
            continue
        if name in stuck:
            left.append(stuck[name])
        else:
            chosen[name] = layers[name], value
    return Choice(chosen, tuple(left))


def _find_stuck(model: nn.Module, layers: Mapping[str, DenseLayer]) -> Iterator[LeftLayer]:
    """What looks like a layer to swap and cannot be swapped without losing something."""
    users = parameter_users(model)
    for name, layer in layers.items():
        if reason := _reason_to_leave(layer, users):
            yield LeftLayer(name, type(layer.owner).__name__, reason)
    for name, module in model.named_modules():
        base = dense_base(type(module))
        if base is not None and name not in layers and not any(dense_parts(module)):
            reason = f"is of class {type(module).__name__}, which may compute or be read in a way of its own"
            if found := extras(module, [*module._parameters, *module._buffers, *module._modules]):
                reason = f"has {' and '.join(found)}"
            yield LeftLayer(name, type(module).__name__, reason)


def _reason_to_leave(layer: DenseLayer, users: Mapping[int, list[str]]) -> str | None:
    for source in layer.sources:
        if not isinstance(source, nn.Parameter):
            return "computes its weight (as under torch.nn.utils.weight_norm, spectral_norm or prune)"
        if len(names := users[id(source)]) > 1:
            return f"shares its weight or bias: {' and '.join(map(repr, names))} hold the same one"
    known = dense_type(type(layer.owner))
    found = extras(layer.owner, known.known if known else ())
    return f"has {' and '.join(found)}" if found else None


def parameter_users(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter, by its id."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(name)
    return users
