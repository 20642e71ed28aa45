"""Removing what a model computes for nothing: outputs without a connection."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparselab.nn.layers.base import SparseLayer, find_sparse
from sparselab.nn.layers.composed.tied import find_tied
from sparselab.nn.layers.extras import extras
from sparselab.nn.layers.kinds import LayerKind, find_kind, kind_of
from sparselab.nn.models.weights import parameter_users

#: Activations that treat each number by itself, and alike.
_ELEMENTWISE = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus,
    nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip


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

    Warns
    -----
    UserWarning
        If outputs could go but for what a layer is or has: its kind does not allow it (see
        `sparselab.nn.LayerKind`), it is of a subclass, or it has hooks, parametrizations, tensors beside
        those of its class or shared parameters. The layer is named and left as it is.

    Notes
    -----
    Looked for are, in each `torch.nn.Sequential` (nested ones as if they were one), a `SparseLinear`,
    `FanInLinear` or another layer whose kind allows it; then any number of elementwise activations,
    `torch.nn.Identity` and, in eval mode, dropout; then such a layer again or a `torch.nn.Linear`. All else
    is left as it is: the last layer of a model, layers behind which something else comes, and layers used in
    several places. That nothing but the Sequential calls its layers is taken for granted.

    Connections that a `forward_mask` leaves out go, too, where a layer changes. A `FanInLinear` that reads
    removed outputs with some of its rows only becomes a `SparseLinear`.

    Outputs are equal to rounding, as sums are made in another order. A row and a column of W are removed for
    each output: SRigL (Lasby et al., ICLR 2024, section 4.4) calls this the structured representation.

    Examples
    --------
    >>> import numpy as np
    >>> from sparselab import SparseLinear
    >>> first = SparseLinear.from_pattern(np.arange(8)[:, None] % 2 * np.ones((8, 6)) == 1)
    >>> model = nn.Sequential(first, nn.ReLU(), nn.Linear(8, 3)).eval()
    >>> condense(model)
    (CondensedLayer(name='0', reader='2', outputs_before=8, outputs_after=4, connections_removed=12),)
    >>> model[2]
    Linear(in_features=4, out_features=3, bias=True)
    """
    for name, sparse in find_sparse(model):
        if sparse.stored.is_meta:
            raise ValueError(f"model must hold data, got {name!r} on the meta device; see materialize")
    uses = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    chains = [(name, module) for name, module in model.named_modules() if _is_chain(module)]
    condensed: list[CondensedLayer] = []
    left: list[str] = []
    for name, chain in chains:
        places = list(_flatten(chain, f"{name}." if name else ""))
        for layer, reader, between in _pairs(places, uses):
            if reason := _reason_to_leave(model, layer) or _reason_to_leave(model, reader):
                left.append(reason)
            else:
                condensed.append(_condense_pair(layer, reader, between, uses))
    if left:
        warnings.warn(
            f"condense leaves outputs without a connection where they are: {'; '.join(left)}", stacklevel=2
        )
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


def _pairs(
    places: Sequence[_Place], uses: Counter[nn.Module]
) -> Iterator[tuple[_Place, _Place, list[nn.Module]]]:
    """Each sparse layer with outputs that are constant, what reads it, and the activations in between."""
    for i, place in enumerate(places):
        between = list(takewhile(_is_elementwise, (each.module for each in places[i + 1 :])))
        if (at := i + 1 + len(between)) == len(places):
            continue
        layer, reader = place.module, places[at].module
        if not isinstance(layer, SparseLayer) or not (_reads_rows(layer) and _reads_rows(reader)):
            continue
        if uses[layer] > 1 or uses[reader] > 1 or _live(layer).all():
            continue
        yield place, places[at], between


def _reads_rows(module: nn.Module) -> bool:
    """Whether inputs of a module are columns of a matrix, and outputs its rows; constant ones can go."""
    return getattr(module, "dense_class", type(module)) is nn.Linear or isinstance(module, nn.Linear)


def _live(layer: SparseLayer) -> Tensor:
    """bool (out_features,): outputs that have connections in use."""
    positions, height = layer.positions(), layer.block_shape[0]
    if layer.forward_mask is not None:
        used = layer.per_connection(layer.forward_mask)
        positions = positions[used.reshape(len(used), -1).any(1)]
    rows, columns = layer.grid
    live = torch.zeros(rows, dtype=torch.bool, device=positions.device)
    live[positions // max(columns, 1)] = True
    return live[:, None].expand(-1, height).reshape(-1)[: layer.out_features]


def _reason_to_leave(model: nn.Module, place: _Place) -> str | None:
    """Why a layer must not be replaced by one of another shape, if it must not."""
    module: Any = place.module
    kind = kind_of(module)
    if type(module) is nn.Linear:
        found = extras(module, ("weight", "bias"))
    elif kind is None:
        return f"{place.name!r} is of class {type(module).__name__}, which may compute in a way of its own"
    elif not kind.condenses:
        return f"{place.name!r} is of kind {kind.name!r}, which is not condensed"
    else:
        found = extras(module, module.tensor_names)
    users = parameter_users(model)
    shared = [name for name, parameter in module.named_parameters() if len(users[id(parameter)]) > 1]
    found += [f"the shared parameter {name}" for name in shared]
    found += [f"its weight shared by {name!r}" for name, tied in find_tied(model) if tied.layer is module]
    return f"{place.name!r} has {' and '.join(found)}" if found else None


def _condense_pair(
    place: _Place, behind: _Place, between: Sequence[nn.Module], uses: Counter[nn.Module]
) -> CondensedLayer:
    layer: Any = place.module
    reader: Any = behind.module
    live = _live(layer)
    constants = torch.zeros_like(live, dtype=layer.stored.dtype)
    constants[~live] = _behind(between, constants[~live] if layer.bias is None else layer.bias[~live])
    narrow = _select_inputs(reader, live, constants)
    for each, new in ((place, _select_outputs(layer, live)), (behind, narrow)):
        uses[new] = 1
        setattr(each.owner, each.key, new)
    removed = _n_weights(reader) - _n_weights(narrow)
    return CondensedLayer(place.name, behind.name, layer.out_features, int(live.sum()), removed)


def _behind(modules: Sequence[nn.Module], numbers: Tensor) -> Tensor:
    for module in modules:
        numbers = module(numbers)
    return numbers


def _connections(layer: SparseLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and weights of the connections in use."""
    positions, weights = layer.positions(), layer.per_connection(layer.stored)
    if layer.forward_mask is not None:
        used = layer.per_connection(layer.forward_mask)
        positions, weights = positions[used], weights[used]
    return positions // max(layer.in_features, 1), positions % max(layer.in_features, 1), weights


def _n_weights(layer: Any) -> int:
    return layer.weight.numel() if type(layer) is nn.Linear else layer.nnz


def _select_outputs(layer: SparseLayer, live: Tensor) -> nn.Module:
    """The layer with these outputs alone; the others have no connection."""
    rows, columns, weights = _connections(layer)
    number = live.cumsum(0) - 1
    bias = None if layer.bias is None else layer.bias[live]
    return _make(layer, (int(live.sum()), layer.in_features), number[rows], columns, weights, bias)


def _select_inputs(layer: Any, live: Tensor, constants: Tensor) -> nn.Module:
    """The layer with these inputs alone, where the others always have these numbers."""
    if type(layer) is nn.Linear:
        return _select_dense_inputs(layer, live, constants)
    number = live.cumsum(0) - 1
    rows, columns, weights = _connections(layer)
    stays, goes = live[columns], ~live[columns]
    gone = torch.zeros(layer.out_features, dtype=torch.float64, device=live.device)
    gone.index_add_(0, rows[goes], weights[goes].double() * constants[columns[goes]].double())
    shape = layer.out_features, int(live.sum())
    bias = _add(layer.bias, gone, weights.dtype)
    return _make(layer, shape, rows[stays], number[columns[stays]], weights[stays], bias)


def _select_dense_inputs(layer: nn.Linear, live: Tensor, constants: Tensor) -> nn.Linear:
    gone = layer.weight[:, ~live].double() @ constants[~live].double()
    with torch.device("meta"):
        dense = nn.Linear(1, layer.out_features)
    dense.in_features = int(live.sum())
    dense.weight = nn.Parameter(layer.weight[:, live], layer.weight.requires_grad)
    bias = _add(layer.bias, gone, layer.weight.dtype)
    dense.register_parameter("bias", _parameter(bias, layer.bias, layer.weight))
    return dense.train(layer.training)


def _add(bias: Tensor | None, more: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The sum; None if there is no bias and nothing to add."""
    if bias is None:
        return more.to(dtype) if more.any() else None
    return (bias.double() + more).to(dtype)


def _make(
    like: SparseLayer, shape: tuple[int, int], rows: Tensor, columns: Tensor, weights: Tensor,
    bias: Tensor | None,
) -> nn.Module:  # fmt: skip
    """A layer of another shape; of its own kind, or a `SparseLinear` where that cannot have such rows."""
    order = torch.argsort(rows * max(shape[1], 1) + columns)
    counts = torch.bincount(rows, minlength=shape[0])
    indptr = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    with warnings.catch_warnings():
        # Torch calls the layout a beta each time that a process first makes one.
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        pattern = torch.sparse_csr_tensor(
            indptr.cpu(), columns[order].cpu(), weights[order].detach().double().cpu(), shape,
            check_invariants=False,
        )  # fmt: skip
    kind, plain = kind_of(like), find_kind("sparse", nn.Linear(1, 1, device="meta"))
    assert kind is not None
    assert plain is not None
    settings: Mapping[str, Any] = {"bias": bias is not None, "dtype": weights.dtype}
    new: Any = _first_that_fits((kind, plain), pattern, settings).to(weights.device)
    new.stored.requires_grad_(like.stored.requires_grad)
    new.bias = _parameter(bias, like.bias, like.stored)
    new.dense_class = like.dense_class
    new.train(like.training)
    return new  # type: ignore[no-any-return]


def _first_that_fits(kinds: Sequence[LayerKind], pattern: Tensor, settings: Mapping[str, Any]) -> Any:
    first, other = (cast(Any, kind.cls) for kind in kinds)
    with torch.random.fork_rng(devices=()):
        try:
            return first.from_pattern(pattern, **settings)
        except ValueError:  # rows of unequal length, where a kind has none
            return other.from_pattern(pattern, **settings)


def _parameter(bias: Tensor | None, before: Tensor | None, weight: Tensor) -> nn.Parameter | None:
    """A bias that is trained as the one before, or else as the weight."""
    if bias is None:
        return None
    return nn.Parameter(bias, (weight if before is None else before).requires_grad)
