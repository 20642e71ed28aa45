"""Whole models: swapping dense layers for sparse ones, and saying what that would change."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from sparselab._names import Pattern
from sparselab._table import aligned
from sparselab.nn.layers.base import SparseLayer, find_sparse
from sparselab.nn.layers.dense import DenseLayer
from sparselab.nn.layers.kinds import find_kind
from sparselab.nn.models.dense import Choice, LeftLayer, choose, find_dense
from sparselab.nn.models.rules import Given, Rule, read_rules
from sparselab.nn.models.swap import swap
from sparselab.nn.storage.checks import check_dtype

Model = TypeVar("Model", bound=nn.Module)


def sparsify(
    model: Model,
    rules: Mapping[Pattern, Given],
    *,
    init: Literal["random", "magnitude"] = "random",
    layer: str = "sparse",
) -> Model:
    """Swap the named layers of a model for sparse ones, in place.

    Parameters
    ----------
    model : torch.nn.Module
        On the meta device, too: its layers then become sparse ones there, which `materialize` gives memory,
        connections and weights, and no dense weight ever exists.
    rules : mapping of str or re.Pattern to float, mapping or None
        Pattern of qualified layer names to what the layers become. In a str ``*`` matches any characters,
        dots included, ``?`` one character, ``[...]`` a set; upper and lower case differ. A compiled regular
        expression must match the whole name. Of the patterns that match a layer, the first one counts.
        A number is a sparsity in [0, 1]. A mapping says ``"layer"``, the kind, which may be left out; exactly
        one of ``"sparsity"``, ``"density"`` (1 minus the sparsity) and, of the kind "fan_in", ``"fan_in"``;
        and of the kind "block" the ``"block_shape"``, (32, 32) by default. None leaves layers dense.
    init : {"random", "magnitude"}
        "random": a new random topology and new weights, to train from scratch. "magnitude": the largest
        weights of the dense layer stay.
    layer : {"sparse", "masked", "fan_in", "block"}, or another registered kind
        The kind of layer where a rule does not say one; see `sparselab.nn.LayerKind`. "sparse":
        `SparseLinear` and `SparseConv2d`.
        "masked": `MaskedLinear` and `MaskedConv2d`, which simulate the same model at the cost of the dense
        one; with the same seed of torch's generator both get the same topology and weights. "fan_in":
        `FanInLinear`, and `SparseConv2d` with a constant fan-in. "block": `BlockSparseLinear`, of linear
        layers only.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError, ValueError
        If the model is itself such a layer, a pattern matches none, a rule says too much, too little or
        what its kind of layer cannot be, init or layer is none of its choices, init is "magnitude" and a
        layer on the meta device, or a layer that must stay dense (see Notes) is named outright. Nothing has
        been changed then.

    Warns
    -----
    UserWarning
        If a glob or an expression matches layers that must stay dense; they are named with the reason.

    Notes
    -----
    A layer stays dense that shares a parameter with another module, computes its weight (as under
    `torch.nn.utils.parametrize` or ``spectral_norm``), has hooks, or parameters, buffers or modules beside
    those of its class: a sparse layer in its place would lose them. `plan_sparsify` lists them without a
    change.

    The layers are those whose class is exactly one of these, or was registered with
    `sparselab.nn.register_dense`; a subclass may compute or be read by its owner in ways of its own, and
    stays dense likewise.

    - `torch.nn.Linear`.
    - `torch.nn.Conv2d`.
    - ``transformers.pytorch_utils.Conv1D``, a linear layer with a transposed weight, as GPT-2 has it.
    - The projections of `torch.nn.MultiheadAttention`, which go by ``q_proj``, ``k_proj``, ``v_proj`` and
      ``out_proj`` below the name of the attention; where any matches, the attention becomes a
      `SparseMultiheadAttention`.

    Torch's Transformer encoders leave the fused path of evaluation where a layer in them was swapped.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    >>> sparsify(model, {"0": 0.9, "2": {"layer": "masked", "density": 0.5}})
    Sequential(
      (0): SparseLinear(in_features=64, out_features=256, bias=True, sparsity=0.9, nnz=1638)
      (1): ReLU()
      (2): MaskedLinear(in_features=256, out_features=10, bias=True, sparsity=0.5, nnz=1280)
    )
    """
    if init not in ("random", "magnitude"):
        raise ValueError(f'init must be "random" or "magnitude", got {init!r}')
    choice = _choose(model, rules, layer)
    if init == "magnitude":
        for name, (each, _) in choice.layers.items():
            if each.linear.weight.is_meta:
                raise ValueError(f'init must be "random" on the meta device, where {name!r} has no weights')
    choice.warn("sparsify")
    swap(model, [(each, rule.make(each.linear, init)) for each, rule in choice.layers.values()])
    return model


def _choose(model: nn.Module, rules: Mapping[Pattern, Given], layer: str) -> Choice[Rule]:
    choice = choose(model, read_rules(rules, layer))
    for name, (each, rule) in choice.layers.items():
        rule.check(name, each.linear)
    return choice


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

    `left` are layers that the rules match and that stay dense, each with the reason.
    """

    layers: tuple[PlannedLayer, ...]
    left: tuple[LeftLayer, ...] = ()

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
        left = (f"left dense: {each}" for each in self.left)
        return "\n".join((aligned(rows, left=3), *left))


def plan_sparsify(model: nn.Module, rules: Mapping[Pattern, Given], *, layer: str = "sparse") -> SparsifyPlan:
    """List what ``sparsify(model, rules, layer=layer)`` would change, and change nothing.

    Parameters
    ----------
    model : torch.nn.Module
    rules, layer
        As of `sparsify`.

    Returns
    -------
    SparsifyPlan
        Its ``layers`` have a name, the class they are and the one they become, shape, sparsity, number of
        connections, and bytes before and after (weights, topology, bias). Its ``left`` are layers that the
        rules match and that would stay dense, each with its name, class and reason.

    Raises
    ------
    TypeError, ValueError
        Where `sparsify` would.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    >>> print(plan_sparsify(model, {"0": 0.9}))
    layer  kind    becomes          shape  sparsity  connections  bytes before  bytes after
    0      Linear  SparseLinear  256 x 64       0.9        1,638        66,560       12,908
    total                                                  1,638        66,560       12,908
    """
    choice = _choose(model, rules, layer)
    planned = (_planned(name, each, rule) for name, (each, rule) in choice.layers.items())
    return SparsifyPlan(tuple(planned), choice.left)


def _planned(name: str, layer: DenseLayer, rule: Rule) -> PlannedLayer:
    after = rule.sketch(layer.linear)
    before, after_bytes = (_bytes(each) for each in (layer.linear, after))
    return PlannedLayer(
        name, type(layer.owner).__name__, type(after).__name__, tuple(layer.linear.weight.shape),
        rule.sparsity(layer.linear), round(after.density * math.prod(after.shape)), before, after_bytes,
    )  # fmt: skip


def _bytes(layer: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))


def find_linear(
    model: nn.Module, include: Pattern | Iterable[Pattern] = "*", exempt: Pattern | Iterable[Pattern] = ()
) -> dict[str, nn.Linear | nn.Conv2d]:
    """The linear layers and convolutions that can be swapped, by qualified name, in the order of the model.

    Linear ones of another class than `torch.nn.Linear` are given as one with their weights, in their memory.

    Parameters
    ----------
    model : torch.nn.Module
    include, exempt : pattern or iterable of patterns
        Patterns of names as in `sparsify`: layers that match one of `include` and none of `exempt`.

    Raises
    ------
    TypeError, ValueError
        As `sparsify` does for its patterns and layers; `exempt` must match too. And if no layer is left.
    """
    wanted, unwanted = (
        (each,) if isinstance(each, (str, re.Pattern)) else tuple(each) for each in (include, exempt)
    )
    rules: dict[Pattern, float | None] = dict.fromkeys(unwanted)
    choice = choose(model, {**rules, **{each: 0.0 for each in wanted if each not in rules}})
    chosen = {name: layer for name, (layer, _) in choice.layers.items()}
    if not chosen:
        raise ValueError(f"include must match a layer that exempt does not, got {wanted} and {unwanted}")
    choice.warn("prune")
    for layer in chosen.values():
        check_dtype("dtype", layer.linear.weight.dtype)
    return {name: layer.linear for name, layer in chosen.items()}


def keep_positions(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Swap layers of `find_linear` for sparse ones with the weights at int64 positions, ascending."""
    layers = find_dense(model)
    new = {name: _keep(layers[name].linear, at) for name, at in kept.items()}
    swap(model, [(layers[name], layer) for name, layer in new.items()])


def _keep(dense: nn.Module, at: Tensor) -> SparseLayer:
    kind = find_kind("sparse", dense)
    assert kind is not None, "find_linear gives layers that have a sparse kind"
    cls: Any = kind.cls
    new: SparseLayer = cls.from_positions(dense, at)
    return new


def measure_sparsity(model: nn.Module) -> float:
    """Fraction of a model's weight positions that do not exist.

    Counts sparse layers and, as fully live, every other parameter of two or more dimensions, once where
    modules share it; biases and norms are left out. 0 for a model without weights.

    Examples
    --------
    >>> from sparselab import SparseLinear
    >>> measure_sparsity(SparseLinear(100, 10, sparsity=0.75))
    0.75
    """
    sparse = [layer for _, layer in find_sparse(model)]
    positions = sum(math.prod(layer.shape) for layer in sparse)
    live = sum(round(math.prod(layer.shape) * layer.density) for layer in sparse)
    counted = {id(parameter) for layer in sparse for parameter in layer.parameters()}
    for parameter in model.parameters():
        if parameter.ndim >= 2 and id(parameter) not in counted:
            positions += parameter.numel()
            live += parameter.numel()
    return 1 - live / positions if positions else 0.0
