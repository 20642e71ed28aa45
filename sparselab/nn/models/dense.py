"""The dense layers of a model that can be made sparse, whatever their kind: linear ones and convolutions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sparselab._names import Pattern, first_match, listed, matches

#: Of `torch.nn.MultiheadAttention`, in the order of its packed weight.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")

Value = TypeVar("Value")


class LinearView(nn.Linear):
    """Weights of a dense layer of another kind, in the layout of `torch.nn.Linear` and in their own memory.

    `dense_class` is what a layer made from it becomes again when it is made dense.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, training: bool, dense_class: type[nn.Module] = nn.Linear
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach(), weight.requires_grad)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach(), bias.requires_grad)
        )
        self.dense_class = dense_class
        self.train(training)


@dataclass(frozen=True)
class DenseLayer:
    """One layer: the module it belongs to, its name there if it is a part, a view, what holds its data.

    The view is a `torch.nn.Linear`, or a `torch.nn.Conv2d` as it is.
    """

    owner: nn.Module
    part: str
    linear: Any
    sources: tuple[Tensor, ...]


def projections(attention: nn.MultiheadAttention) -> dict[str, DenseLayer]:
    """The four projections of a dense attention, by name."""
    packed, bias, out = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj
    sources: list[Tensor]
    weights: list[Tensor]
    if attention._qkv_same_embed_dim:
        sources, weights = [packed] * 3, list(packed.chunk(3))
    else:
        sources = weights = [getattr(attention, f"{name}_weight") for name in PROJECTIONS[:3]]
    biases = [None] * 3 if bias is None else bias.chunk(3)
    found = {
        name: DenseLayer(attention, name, LinearView(w, b, attention.training), _present(source, bias))
        for name, source, w, b in zip(PROJECTIONS, sources, weights, biases, strict=False)
    }
    found["out_proj"] = DenseLayer(attention, "out_proj", out, _present(out.weight, out.bias))
    return found


def find_dense(model: nn.Module) -> dict[str, DenseLayer]:
    """The layers by qualified name, in the order of the model; those of an attention are its projections."""
    return {
        f"{name}.{layer.part}".strip("."): layer
        for name, module in model.named_modules()
        for layer in dense_parts(module)
    }


def dense_parts(module: nn.Module) -> Iterable[DenseLayer]:
    """What can be made sparse of a module's own weights.

    Exact classes only: a subclass may be read by its owner in ways of its own.
    """
    if type(module) is nn.Linear:
        return [DenseLayer(module, "", module, _present(module.weight, module.bias))]
    if type(module) is nn.Conv2d:
        return [DenseLayer(module, "", module, _present(module.weight, module.bias))]
    if _is_conv1d(type(module)):
        weight, bias = (getattr(module, name) for name in ("weight", "bias"))
        view = LinearView(weight.t(), bias, module.training, type(module))
        return [DenseLayer(module, "", view, (weight, bias))]
    if type(module) is nn.MultiheadAttention and type(module.out_proj) is NonDynamicallyQuantizableLinear:
        return projections(module).values()
    return []


def choose(model: nn.Module, rules: Mapping[Pattern, Value]) -> dict[str, tuple[DenseLayer, Value]]:
    """The layers that match, by name, each with the value of the first pattern that does.

    Raises
    ------
    ValueError
        If the model is itself such a layer, or a pattern matches none.
    """
    if any(dense_parts(model)):
        raise ValueError(
            f"model must contain the layers to swap, got a {type(model).__name__} itself, which cannot be "
            "swapped in place; use SparseLinear.from_dense or that of its kind"
        )
    layers = find_dense(model)
    for pattern in rules:
        if not any(matches(name, pattern) for name in layers):
            raise ValueError(
                f"rules must match at least one layer each, got {pattern!r} without one; "
                f"those of the model that can be swapped are: {listed(layers)}"
            )
    first = {name: first_match(name, rules) for name in layers}
    return {name: (layers[name], rules[pattern]) for name, pattern in first.items() if pattern is not None}


def refuse_entangled(model: nn.Module, chosen: Mapping[str, DenseLayer]) -> None:
    """Raise ValueError if a layer computes its weight, or shares it or its bias with another module."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(name)
    for name, layer in chosen.items():
        for source in layer.sources:
            if not isinstance(source, nn.Parameter):
                raise ValueError(
                    f"rules must not match a layer that computes its weight, got {name!r}; remove what "
                    "computes it (torch.nn.utils.weight_norm, spectral_norm, ...) first, or leave the layer "
                    "dense"
                )
            if len(shared := users[id(source)]) > 1:
                raise ValueError(
                    f"rules must not match a layer whose weight or bias another module uses too, got "
                    f"{shared[0]!r} and {shared[1]!r}; untie them first, or leave the layer dense"
                )


def _is_conv1d(kind: type[nn.Module]) -> bool:
    """Whether this is the transposed linear layer of transformers, which need not be installed."""
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)
