"""What `sparsify` would change, and what would stay dense."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparselab._table import aligned
from sparselab.nn.layers.dense import DenseLayer
from sparselab.nn.models.dense import Choice, LeftLayer
from sparselab.nn.models.rules import Rule


@dataclass(frozen=True)
class PlannedLayer:
    """What would become of one layer; shape is that of the weight, bytes include the bias."""

    name: str
    kind: str
    becomes: str
    shape: tuple[int, ...]
    sparsity: float
    connections: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class SparsifyPlan:
    """What `sparsify` would change, layer by layer; ``str()`` of it is a table with totals.

    Attributes
    ----------
    layers : tuple of PlannedLayer
    left : tuple of LeftLayer
        What has a rule and stays dense all the same, each with the reason. What a rule of None leaves dense
        is not among them.
    parameters_swapped, parameters_left, parameters_elsewhere : int
        Entries of Parameters, shared ones once: in the layers that become sparse, as they are now; in what
        rules match and stays dense, also by a rule of None; and in all the rest of the model.
    bytes_before, bytes_after : int
        Of the Parameters and buffers of the whole model.
    """

    layers: tuple[PlannedLayer, ...]
    left: tuple[LeftLayer, ...]
    parameters_swapped: int
    parameters_left: int
    parameters_elsewhere: int
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("layer", "kind", "becomes", "shape", "sparsity", "connections", "bytes before", "bytes after")
        ]
        for each in self.layers:
            shape = " x ".join(map(str, each.shape))
            numbers = (f"{n:,}" for n in (each.connections, each.bytes_before, each.bytes_after))
            rows.append((each.name, each.kind, each.becomes, shape, f"{each.sparsity:.4g}", *numbers))
        totals = (
            sum(getattr(each, field) for each in self.layers)
            for field in ("connections", "bytes_before", "bytes_after")
        )
        rows.append(("total", "", "", "", "", *(f"{n:,}" for n in totals)))
        model = (
            f"parameters of the model: {self.parameters_swapped:,} in layers that become sparse, "
            f"{self.parameters_left:,} in layers left dense, {self.parameters_elsewhere:,} elsewhere",
            f"bytes of the model: {self.bytes_before:,} before, {self.bytes_after:,} after",
        )
        left = (f"left dense: {each}, {each.bytes:,} bytes" for each in self.left)
        return "\n".join((aligned(rows, left=3), *model, *left))


def draw_plan(model: nn.Module, choice: Choice) -> SparsifyPlan:
    """The plan of what was chosen; takes no memory, where the kinds of layers allow it."""
    layers = tuple(_planned(name, each, rule) for name, (each, rule) in choice.layers.items())
    swapped = sum(_size(layer.linear.parameters()) for layer, _ in choice.layers.values())
    dense = {key: size for each in choice.dense for key, (size, _) in each.tensors.items()}
    left = sum(dense.values())
    before = _bytes(model)
    return SparsifyPlan(
        layers, choice.left, swapped, left, _size(model.parameters()) - swapped - left, before,
        before + sum(each.bytes_after - each.bytes_before for each in layers),
    )  # fmt: skip


def _planned(name: str, layer: DenseLayer, rule: Rule) -> PlannedLayer:
    after = rule.sketch(layer.linear)
    before, after_bytes = (_bytes(each) for each in (layer.linear, after))
    return PlannedLayer(
        name, type(layer.owner).__name__, type(after).__name__, tuple(layer.linear.weight.shape),
        rule.sparsity(layer.linear), round(after.density * math.prod(after.shape)), before, after_bytes,
    )  # fmt: skip


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(each.numel() for each in parameters if not is_lazy(each))


def _bytes(module: nn.Module) -> int:
    return sum(each.nbytes for each in (*module.parameters(), *module.buffers()) if not is_lazy(each))
