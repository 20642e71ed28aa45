"""Whole models: swapping dense layers for sparse ones, and measuring the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Literal, TypeVar

from torch import Tensor, nn

from sparselab.kernels import n_connections
from sparselab.nn._checks import check_dtype
from sparselab.nn._layer import SparseLayer
from sparselab.nn.linear import SparseLinear
from sparselab.nn.masked import MaskedLinear
from sparselab.nn.topology import is_sparse

Model = TypeVar("Model", bound=nn.Module)

_KINDS: dict[str, type[SparseLinear | MaskedLinear]] = {"sparse": SparseLinear, "masked": MaskedLinear}


def sparsify(
    model: Model,
    rules: Mapping[str, float],
    *,
    init: Literal["random", "magnitude"] = "random",
    layer: Literal["sparse", "masked"] = "sparse",
) -> Model:
    """Swap the named `torch.nn.Linear` layers of a model for `SparseLinear`, in place.

    Parameters
    ----------
    model : torch.nn.Module
    rules : mapping of str to float
        Pattern of qualified layer names to sparsity in [0, 1]. ``*`` matches any characters, dots included,
        ``?`` one character, ``[...]`` a set; upper and lower case differ. Of the patterns that match a layer,
        the first one counts.
    init : {"random", "magnitude"}
        "random": a new random topology and new weights, to train from scratch. "magnitude": the largest
        weights of the dense layer stay.
    layer : {"sparse", "masked"}
        "masked": `MaskedLinear` layers instead, which simulate the same model at the cost of the dense one.
        With the same seed of torch's generator both kinds get the same topology and weights.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    ValueError
        If the model is itself a linear layer, a pattern matches none, a sparsity is not in [0, 1], init or
        layer is none of its choices, or a matching layer shares a parameter with another module or computes
        its weight (as under `torch.nn.utils.spectral_norm`). Nothing has been changed then.

    Notes
    -----
    Only modules whose class is exactly `torch.nn.Linear` are swapped: a subclass may be read by its owner in
    ways of its own, as `torch.nn.MultiheadAttention` reads the weight of its output projection.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    >>> sparsify(model, {"0": 0.9})[0].nnz
    1638
    """
    if init not in ("random", "magnitude"):
        raise ValueError(f'init must be "random" or "magnitude", got {init!r}')
    if layer not in _KINDS:
        raise ValueError(f'layer must be "sparse" or "masked", got {layer!r}')
    for sparsity in rules.values():
        n_connections((1, 1), sparsity)
    chosen = _choose(model, rules)
    _refuse_shared_parameters(model, chosen)
    make = _KINDS[layer].from_dense if init == "magnitude" else _KINDS[layer]._like
    _swap(model, {linear: make(linear, sparsity) for linear, sparsity in chosen.items()})
    return model


def find_linear(
    model: nn.Module, include: str | Iterable[str] = "*", exempt: str | Iterable[str] = ()
) -> dict[str, nn.Linear]:
    """The `torch.nn.Linear` layers that can be swapped, by qualified name, in the order of the model.

    Parameters
    ----------
    model : torch.nn.Module
    include, exempt : str or iterable of str
        Patterns of names as in `sparsify`: layers that match one of `include` and none of `exempt`.

    Raises
    ------
    TypeError, ValueError
        As `sparsify` does for its patterns and layers; `exempt` must match too. And if no layer is left.
    """
    wanted, unwanted = ((each,) if isinstance(each, str) else tuple(each) for each in (include, exempt))
    excluded = _choose(model, dict.fromkeys(unwanted, 0.0))
    chosen = [linear for linear in _choose(model, dict.fromkeys(wanted, 0.0)) if linear not in excluded]
    if not chosen:
        raise ValueError(f"include must match a layer that exempt does not, got {wanted} and {unwanted}")
    _refuse_shared_parameters(model, chosen)
    for linear in chosen:
        check_dtype("dtype", linear.weight.dtype)
    names = {module: name for name, module in model.named_modules()}
    return {names[linear]: linear for linear in chosen}


def keep_positions(model: nn.Module, kept: Mapping[nn.Linear, Tensor]) -> None:
    """Swap layers of `find_linear` for `SparseLinear` with the weights at int64 positions, ascending."""
    _swap(model, {linear: SparseLinear._from_positions(linear, at) for linear, at in kept.items()})


def _swap(model: nn.Module, new: Mapping[nn.Linear, SparseLayer]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.Linear) and child in new:
                setattr(parent, name, new[child])
                _leave_fused_encoder(model, parent)


def _leave_fused_encoder(model: nn.Module, layer: nn.Module) -> None:
    """Keep torch's Transformer encoders from reading ``weight`` of the swapped layers.

    In evaluation they hand the weights of their two linear layers to one fused function, unless these two
    attributes, which nothing else reads, say that it does not apply.
    """
    if isinstance(layer, nn.TransformerEncoderLayer):
        layer.activation_relu_or_gelu = 0
        for encoder in model.modules():
            if isinstance(encoder, nn.TransformerEncoder) and layer in list(encoder.layers):
                encoder.use_nested_tensor = False


def _choose(model: nn.Module, rules: Mapping[str, float]) -> dict[nn.Linear, float]:
    if type(model) is nn.Linear:
        raise ValueError(
            "model must contain the layers to swap, got a linear layer itself, which cannot be swapped in "
            "place; use SparseLinear or SparseLinear.from_dense"
        )
    chosen: dict[nn.Linear, float] = {}
    unused = set(rules)
    names = []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        names.append(name)
        matching = [pattern for pattern in rules if fnmatchcase(name, pattern)]
        unused.difference_update(matching)
        if matching:
            chosen[module] = rules[matching[0]]
    if unused:
        listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ValueError(
            f"rules must match at least one nn.Linear each, got {min(unused)!r} without one; "
            f"the model's linear layers are: {listed or 'none'}"
        )
    return chosen


def _refuse_shared_parameters(model: nn.Module, chosen: Iterable[nn.Linear]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    names = {module: name for name, module in model.named_modules()}
    for layer in chosen:
        if "weight" not in layer._parameters:
            raise ValueError(
                f"rules must not match a layer that computes its weight, got {names[layer]!r}; remove what "
                "computes it (torch.nn.utils.weight_norm, spectral_norm, ...) first, or leave the layer dense"
            )
        for parameter in layer.parameters():
            if len(shared := owners[id(parameter)]) > 1:
                raise ValueError(
                    f"rules must not match a layer whose weight or bias another module uses too, got "
                    f"{shared[0]!r} and {shared[1]!r}; untie them first, or leave the layer dense"
                )


def measure_sparsity(model: nn.Module) -> float:
    """Fraction of a model's weight positions that do not exist.

    Counts sparse layers and, as fully live, every other parameter of two or more dimensions, once where
    modules share it; biases and norms are left out. 0 for a model without weights.

    Examples
    --------
    >>> measure_sparsity(SparseLinear(100, 10, sparsity=0.75))
    0.75
    """
    live = positions = 0
    dense: dict[int, int] = {}
    for module in model.modules():
        if is_sparse(module):
            live += module.nnz
            positions += module.shape[0] * module.shape[1]
        else:
            dense.update(
                (id(p), p.numel()) for p in module._parameters.values() if p is not None and p.ndim >= 2
            )
    positions += sum(dense.values())
    live += sum(dense.values())
    return 1 - live / positions if positions else 0.0
