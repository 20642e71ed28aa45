"""Whole models: swapping dense layers for sparse ones, and measuring the result."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, TypeVar

from torch import nn

from sparselab.kernels import n_connections
from sparselab.nn.linear import SparseLinear
from sparselab.nn.topology import is_sparse

Model = TypeVar("Model", bound=nn.Module)


def sparsify(
    model: Model, rules: Mapping[str, float], *, init: Literal["random", "magnitude"] = "random"
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

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    ValueError
        If the model is itself a linear layer, a pattern matches none, a sparsity is not in [0, 1], init is
        neither choice, or a matching layer shares a parameter with another module or computes its weight (as
        under `torch.nn.utils.spectral_norm`). Nothing has been changed then.

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
    for sparsity in rules.values():
        n_connections((1, 1), sparsity)
    chosen = _choose(model, rules)
    _refuse_shared_parameters(model, chosen)
    new = {
        layer: SparseLinear.from_dense(layer, sparsity)
        if init == "magnitude"
        else SparseLinear._like(layer, sparsity)
        for layer, sparsity in chosen.items()
    }
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.Linear) and child in new:
                setattr(parent, name, new[child])
                _leave_fused_encoder(model, parent)
    return model


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


def _refuse_shared_parameters(model: nn.Module, chosen: Mapping[nn.Linear, float]) -> None:
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
