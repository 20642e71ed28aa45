"""Removing what a model computes for nothing: outputs without a connection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from sparselab.nn.layers.fan_in import FanInLinear
from sparselab.nn.layers.linear import LinearLayer, SparseLinear

#: Activations that treat each number by itself, and alike.
_ELEMENTWISE = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus,
    nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip

_SPARSE = (SparseLinear, FanInLinear)


@dataclass(frozen=True)
class CondensedLayer:
    """What `condense` removed from one layer, and from the layer that reads it.

    Attributes
    ----------
    name, reader : str
        Qualified names of both.
    outputs_before, outputs_after : int
        Outputs of the layer, which are the inputs of its reader.
    connections_removed : int
        Weights by which the reader read them.
    """

    name: str
    reader: str
    outputs_before: int
    outputs_after: int
    connections_removed: int


@dataclass(frozen=True)
class _Place:
    """A module of a chain, and where it is."""

    owner: nn.Module
    key: str
    name: str

    @property
    def module(self) -> nn.Module:
        module = self.owner._modules[self.key]
        assert module is not None
        return module


@torch.no_grad()
def condense(model: nn.Module) -> tuple[CondensedLayer, ...]:
    """Remove the outputs that have no connection, in place, where what the model computes stays the same.

    Such an output, of which `SRigL` leaves many, is the same for every input: ``act(bias)`` behind an
    activation. Where one layer reads it, its weights for it go too, and their share of the sum is added to
    that layer's bias (which it is given if it has none and the share is not 0). A layer that thereby loses
    all connections of an output is condensed in turn.

    Parameters
    ----------
    model : torch.nn.Module
        For inference, in eval mode. Layers that change are replaced by new ones: optimizers and algorithms
        that hold the old ones are of no more use.

    Returns
    -------
    tuple of CondensedLayer
        What was removed; empty if nothing was.

    Raises
    ------
    ValueError
        If a sparse layer is on the meta device. Nothing has been changed then.

    Notes
    -----
    Looked for are, in each `torch.nn.Sequential` (nested ones as if they were one), a `SparseLinear` or
    `FanInLinear`; then any number of elementwise activations, `torch.nn.Identity` and, in eval mode, dropout;
    then a `SparseLinear`, `FanInLinear` or `torch.nn.Linear`. All else is left as it is: the last layer of a
    model, layers behind which something else comes, layers used in several places, subclasses, and what has
    hooks. That nothing but the Sequential calls its layers is taken for granted.

    Connections that a `forward_mask` leaves out go, too, where a layer changes. A `FanInLinear` that reads
    removed outputs with some of its rows only becomes a `SparseLinear`.

    Outputs are equal to rounding, as sums are made in another order. A row and a column of W are removed for
    each output: SRigL (Lasby et al., ICLR 2024, section 4.4) calls this the structured representation.

    Examples
    --------
    >>> import numpy as np
    >>> first = SparseLinear.from_pattern(np.arange(8)[:, None] % 2 * np.ones((8, 6)) == 1)
    >>> model = nn.Sequential(first, nn.ReLU(), nn.Linear(8, 3)).eval()
    >>> condense(model)
    (CondensedLayer(name='0', reader='2', outputs_before=8, outputs_after=4, connections_removed=12),)
    >>> model[2]
    Linear(in_features=4, out_features=3, bias=True)
    """
    for name, module in model.named_modules():
        if isinstance(module, _SPARSE) and module.weight_values.is_meta:
            raise ValueError(f"model must hold data, got {name!r} on the meta device; see materialize")
    uses = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    chains = [(name, module) for name, module in model.named_modules() if _is_chain(module)]
    condensed: list[CondensedLayer] = []
    for name, chain in chains:
        condensed += _condense_chain(list(_flatten(chain, f"{name}." if name else "")), uses)
    return tuple(condensed)


def _is_chain(module: nn.Module) -> bool:
    return type(module) is nn.Sequential and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_elementwise(module: nn.Module) -> bool:
    if _has_hooks(module):
        return False
    if type(module) in (nn.Dropout, nn.AlphaDropout):
        return not module.training
    return type(module) in _ELEMENTWISE or (type(module) is nn.PReLU and module.num_parameters == 1)


def _flatten(chain: nn.Module, prefix: str) -> Iterator[_Place]:
    """What a Sequential calls, in turn, with what nested ones call in their place."""
    for key, module in chain._modules.items():
        if module is not None and _is_chain(module):
            yield from _flatten(module, f"{prefix}{key}.")
        else:
            yield _Place(chain, key, prefix + key)


def _condense_chain(chain: Sequence[_Place], uses: Counter[nn.Module]) -> Iterator[CondensedLayer]:
    for i, place in enumerate(chain):
        between = list(takewhile(_is_elementwise, (each.module for each in chain[i + 1 :])))
        if (at := i + 1 + len(between)) == len(chain):
            continue
        layer, reader = place.module, chain[at].module
        if type(layer) not in _SPARSE or type(reader) not in (*_SPARSE, nn.Linear):
            continue
        if any(uses[each] > 1 or _has_hooks(each) for each in (layer, reader)):
            continue
        assert isinstance(layer, LinearLayer)
        assert isinstance(reader, (LinearLayer, nn.Linear))
        live = torch.zeros(layer.out_features, dtype=torch.bool, device=layer.weight_values.device)
        live[_connections(layer)[0]] = True
        if live.all():
            continue
        constants = torch.zeros_like(live, dtype=layer.weight_values.dtype)
        constants[~live] = _behind(between, constants[~live] if layer.bias is None else layer.bias[~live])
        narrow = _select_inputs(reader, live, constants)
        for each, new in ((place, _select_outputs(layer, live)), (chain[at], narrow)):
            uses[new] = 1
            setattr(each.owner, each.key, new)
        removed = _n_weights(reader) - _n_weights(narrow)
        yield CondensedLayer(place.name, chain[at].name, layer.out_features, int(live.sum()), removed)


def _behind(modules: Sequence[nn.Module], numbers: Tensor) -> Tensor:
    for module in modules:
        numbers = module(numbers)
    return numbers


def _connections(layer: LinearLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and weights of the connections in use."""
    positions, weights = layer.positions(), layer.per_connection(layer.weight_values)
    if layer.forward_mask is not None:
        used = layer.per_connection(layer.forward_mask)
        positions, weights = positions[used], weights[used]
    return positions // max(layer.in_features, 1), positions % max(layer.in_features, 1), weights


def _n_weights(layer: LinearLayer | nn.Linear) -> int:
    return layer.nnz if isinstance(layer, LinearLayer) else layer.weight.numel()


def _select_outputs(layer: LinearLayer, live: Tensor) -> LinearLayer:
    """The layer with these outputs alone; the others have no connection."""
    rows, columns, weights = _connections(layer)
    number = live.cumsum(0) - 1
    bias = None if layer.bias is None else layer.bias[live]
    return _make(layer, (int(live.sum()), layer.in_features), number[rows], columns, weights, bias)


def _select_inputs(
    layer: LinearLayer | nn.Linear, live: Tensor, constants: Tensor
) -> LinearLayer | nn.Linear:
    """The layer with these inputs alone, where the others always have these numbers."""
    n_live, number = int(live.sum()), live.cumsum(0) - 1
    if isinstance(layer, nn.Linear):
        gone = layer.weight[:, ~live].double() @ constants[~live].double()
        with torch.device("meta"):
            dense = nn.Linear(1, layer.out_features)
        dense.in_features = n_live
        dense.weight = nn.Parameter(layer.weight[:, live], layer.weight.requires_grad)
        bias = _add(layer.bias, gone, layer.weight.dtype)
        dense.register_parameter("bias", _parameter(bias, layer.bias, layer.weight))
        return dense.train(layer.training)
    rows, columns, weights = _connections(layer)
    stays, goes = live[columns], ~live[columns]
    gone = torch.zeros(layer.out_features, dtype=torch.float64, device=live.device)
    gone.index_add_(0, rows[goes], weights[goes].double() * constants[columns[goes]].double())
    shape = layer.out_features, n_live
    return _make(
        layer,
        shape,
        rows[stays],
        number[columns[stays]],
        weights[stays],
        _add(layer.bias, gone, weights.dtype),
    )


def _add(bias: Tensor | None, more: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The sum; None if there is no bias and nothing to add."""
    if bias is None:
        return more.to(dtype) if more.any() else None
    return (bias.double() + more).to(dtype)


def _make(
    like: LinearLayer, shape: tuple[int, int], rows: Tensor, columns: Tensor, weights: Tensor,
    bias: Tensor | None,
) -> LinearLayer:  # fmt: skip
    """A layer of another shape; one of rows of equal length only if they are."""
    row_nnz = torch.bincount(rows, minlength=shape[0])
    equal = bool((row_nnz[row_nnz > 0] == row_nnz.max()).all()) if len(rows) else True
    kind: Any = FanInLinear if equal and isinstance(like, FanInLinear) else SparseLinear
    new = kind(
        shape[1], shape[0], bias is not None, sparsity=1.0, device="meta", dtype=weights.dtype
    ).to_empty(device=weights.device)
    new._connect(rows * shape[1] + columns, weights)
    new.weight_values.requires_grad_(like.weight_values.requires_grad)
    new.bias = _parameter(bias, like.bias, like.weight_values)
    new.dense_class = like.dense_class
    made: LinearLayer = new.train(like.training)
    return made


def _parameter(bias: Tensor | None, before: Tensor | None, weight: Tensor) -> nn.Parameter | None:
    """A bias that is trained as the one before, or else as the weight."""
    if bias is None:
        return None
    return nn.Parameter(bias, (weight if before is None else before).requires_grad)
