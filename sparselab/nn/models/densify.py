"""Whole models: making sparse layers dense again, without losing anything in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from sparselab.nn.layers.base import find_sparse
from sparselab.nn.layers.composed.tied import find_tied
from sparselab.nn.layers.dense import dense_type
from sparselab.nn.layers.extras import refuse_to_lose
from sparselab.nn.models.swap import replace
from sparselab.nn.models.weights import parameter_users

Model = TypeVar("Model", bound=nn.Module)


def densify(model: Model) -> Model:
    """Make the sparse layers of a model dense again, in place; its outputs stay the same to rounding.

    Sparse layers of every kind become `torch.nn.Linear`, or the ``Conv1D`` of transformers that `sparsify`
    made them from, so that its checkpoints fit again; a `TiedLinear` of one becomes a `torch.nn.Linear` with
    its Parameter; convolutions become those of torch, and
    `SparseMultiheadAttention` becomes `torch.nn.MultiheadAttention`. What `sparsify` made from a subclass
    becomes the base: the ``__init__`` of the subclass may take anything. Modes and trainability are kept. The
    encoders of torch that `sparsify` has kept off their fused path stay off it.

    Parameters
    ----------
    model : torch.nn.Module
        Without sparse layers it is left as it is.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError
        If a dense layer would lose something: what a subclass redefines without a ``to_dense`` of its own,
        hooks, parametrizations, or tensors beside those of the class. And if a projection of an attention is
        no linear layer. The layer is named; nothing has been changed then.
    ValueError
        If the model is itself a sparse layer, a sparse layer is on the meta device, or it shares a parameter
        with another. Nothing has been changed then.

    Examples
    --------
    >>> from sparselab import SparseLinear
    >>> densify(nn.Sequential(SparseLinear(8, 4), nn.ReLU()))[0]
    Linear(in_features=8, out_features=4, bias=True)
    """
    found = _find_convertible(model)
    if "" in found:
        raise ValueError(
            f"model must contain the layers to make dense, got a {type(model).__name__} itself; use its "
            "to_dense()"
        )
    for name, layer in find_sparse(model):
        if any(tensor.is_meta for tensor in layer.parameters()):
            raise ValueError(f"model must hold data, got {name!r} on the meta device; see materialize")
    _refuse_shared(model, found)
    shared = [tied for _, tied in find_tied(model) if tied.layer in found.values()]
    for tied in shared:
        refuse_to_lose(tied, "untied", ("bias",))
    replace(model, {layer: _to_dense_class(name, layer) for name, layer in found.items()})
    replace(model, {tied: tied.untied() for tied in shared if not tied.transposed})
    return model


def _find_convertible(model: nn.Module) -> dict[str, Any]:
    """What has a dense form, by name; of attentions with sparse projections the whole, not the parts."""
    found: dict[str, Any] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module not in inside and all(hasattr(module, each) for each in ("to_dense", "dense_class")):
            found[name] = module
            inside.update(module.modules())
    return found


def _refuse_shared(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if a layer shares a parameter, which its dense form would have for itself alone."""
    users = parameter_users(model)
    for name, layer in layers.items():
        for parameter in layer.parameters():
            if len(names := users[id(parameter)]) > 1:
                raise ValueError(
                    f"model must share no parameter of a layer to make dense, got {name!r}, of which "
                    f"{' and '.join(map(repr, names))} hold the same one; untie them first"
                )


def _to_dense_class(name: str, layer: Any) -> nn.Module:
    try:
        plain: nn.Module = layer.to_dense()
    except (NotImplementedError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from error
    cls = getattr(layer, "dense_class", type(plain))
    known = dense_type(cls)
    if type(plain) is cls or known is None or known.restore is None:
        return plain
    return known.restore(plain, cls).train(layer.training)
