"""Putting modules into the places of others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from sparselab.nn.follow.hosts import note_sparse
from sparselab.nn.layers.base import is_sparse
from sparselab.nn.layers.composed.tied import TiedLinear, retie
from sparselab.nn.layers.dense import DenseLayer, dense_type
from sparselab.nn.models.weights import find_heads


def swap(model: nn.Module, swaps: Iterable[tuple[DenseLayer, nn.Module]]) -> None:
    """Put layers in the place of dense ones, in place; what holds parts is made anew with them."""
    whole: dict[nn.Module, nn.Module] = {}
    parts: dict[nn.Module, dict[str, nn.Module]] = {}
    for old, new in swaps:
        if old.part:
            parts.setdefault(old.owner, {})[old.part] = new
        else:
            whole[old.owner] = new
    for owner, layers in parts.items():
        known = dense_type(type(owner))
        assert known is not None
        assert known.join is not None
        whole[owner] = known.join(owner, layers)
    modules = dict(model.named_modules())
    for head, embedding in find_heads(model).items():
        if modules[embedding] in whole:
            whole[modules[head]] = tied_head(modules[head], whole[modules[embedding]])
    replace(model, whole)


def tied_head(head: nn.Module, embedding: nn.Module) -> TiedLinear:
    """A layer in the place of a linear one, with its bias and the weight of the embedding."""
    new = TiedLinear(embedding, bias=False)
    new.register_parameter("bias", head._parameters["bias"])
    return new.train(head.training)


def replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, wherever these are in a model; what is tied to them follows.

    Raises
    ------
    TypeError, ValueError
        If it cannot follow. Nothing has been changed then.
    """
    retie(model, new)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, name, new[child])
                _leave_fused_encoder(model, parent)
    note_sparse(model, is_sparse)


def _leave_fused_encoder(model: nn.Module, layer: nn.Module) -> None:
    """Keep torch's Transformer encoders from reading the weights of the layers that were swapped.

    In evaluation they hand the weights of attention and linear layers to one fused function, unless these two
    attributes, which nothing else reads, say that it does not apply.
    """
    if isinstance(layer, nn.TransformerEncoderLayer):
        layer.activation_relu_or_gelu = 0
        for encoder in model.modules():
            if isinstance(encoder, nn.TransformerEncoder) and layer in list(encoder.layers):
                encoder.use_nested_tensor = False
